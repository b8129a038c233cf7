"""Batched fully-corrective Frank-Wolfe: the projection engine. `docs/hull.md` derives it.

    minimise |sum_i w_i (v_i - q)|^2 / 2  over the simplex, for many queries q at once.

Each pass prices all vertices for all live queries with one matrix product (`oracle.py`), admits the
best violators of the optimality conditions <u_i, x> >= |x|^2 to the support, and solves the problem
on the support exactly (`active_set.py`). Trust is cheap, so precision is spent where it decides:

1. *name*: passes over a sample of the vertices, then over all of them, first in their principal
   components where few hold nearly everything, then in bfloat16 where that pays, and at last in
   float32, until nothing violates beyond float32 noise; of many vertices, those that such a pass
   names besides, for all queries of a batch, are searched before the next. Vertices that rounding
   cannot tell from the least join the slots, so that they are scored exactly later. Proves nothing.
2. *decide*: float64 rows of the support alone, solution and direction refined, bracket enclosed
   (`enclosure.py`); the last pass bounds all the other vertices. Most queries end here.
3. *finish*: float64 passes for the queries that are left: near or inside the hull, or with more
   vertices than slots.

The state of a batch is a pytree with one lane per query, all loops are traced, and a lane that has
ended is frozen.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import active_set, bracket, enclosure
from hullgeo._numerics import HIGHEST, narrow, product
from hullgeo.active_set import ActiveSet
from hullgeo.bracket import ACTIVE, BAD, ENDED, FULL, STUCK, WAITS, Lanes, Tolerances
from hullgeo.oracle import (
    COARSE,
    FINE,
    NEARBY,
    SAMPLE,
    SKETCH,
    Hull,
    Oracle,
    Screened,
    power_of_two,
)
from hullgeo.sketch import Sketch

_U32 = 2.0**-24
_NOISE = 4 * _U32  # of a float32 score, relative to |x| R: where naming candidates ends
_COARSE_NOISE = 2.0**-12  # of a bfloat16 score, relative to |x| R, mostly; naming needs no more
_SAMPLE_GAP = 0.5  # relative gap at which the sample has served
# Eighths of the lanes: when so many at most are active, passes that decide nothing have served.
# Those over a sample or few vertices or in few components soon find less than a float32 pass does,
# except the one direction that a verdict needs.
_SERVED, _SOON_SERVED = 4, 7
# Changes of the basis in a row without progress, in float32 and float64: more may be a cycle of
# rounding. In float64 a badly conditioned basis may recover late.
_STALLS = (2, 20)
_LEAST_HALF = 8  # lanes of a product: fewer are no faster
_NEAR_HULL = 2.0**-17  # |x| / R below which float32 names nothing useful
_ON_HULL = 2.0**-42  # the same for float64: the query is inside, or nobody can tell


def num_candidates(num_vertices: int) -> int:
    """Vertices admitted in one pass at most."""
    return 8 if num_vertices <= 2048 else 16


def start(oracle: Oracle, query: Float[Array, "lanes dim"], slots: int) -> Lanes:
    """Lanes without support, in float32."""
    scale = power_of_two(-oracle.exponent)
    center = oracle.center.astype(jnp.float64) * scale
    shifted = query.astype(jnp.float64) * scale - center[None]
    square = jnp.sum(shifted * shifted, axis=1)
    bad = ~(square < 2.0**500)  # NaN and infinity too
    shifted = jnp.where(bad[:, None], 0, shifted)
    constant = jnp.where(bad, 0, square) + 2.0**-4
    start_row = shifted.astype(jnp.float32)
    code = jnp.where(bad, BAD, ACTIVE).astype(jnp.int32)
    return Lanes(
        query=query,
        shifted=shifted,
        constant=constant,
        active=active_set.empty(start_row, slots),
        direction=oracle.first_direction(shifted),
        floor=jnp.full_like(start_row[:, 0], -jnp.inf) + 0 * start_row[:, 0],
        nearby=jnp.broadcast_to(0 * code[:, None], (len(code), oracle.num_nearby)),
        upper=jnp.full_like(square, jnp.inf) + 0 * constant,
        lower=0 * constant,
        square=jnp.full_like(square, jnp.inf) + 0 * constant,
        stalls=0 * code,
        idle=code < 0,
        steps=0 * code,
        code=code,
    )


def name_candidates(
    oracle: Oracle,
    lanes: Lanes,
    tolerances: Tolerances,
    *,
    phase: int | Int[Array, ""],
    leave: int | Int[Array, ""] = 0,
) -> Lanes:
    """Passes of all phases from this one on, until at most `leave` lanes are active in the last.

    Passes over the sample, in few components or over few vertices cost a fraction of one and do
    not count as `steps`.
    """
    return _loop(oracle, lanes, tolerances, phase, exact=False, leave=leave)


def start_in_components(
    hull: Hull, query: Float[Array, "lanes dim"], tolerances: Tolerances, slots: int
) -> Lanes:
    """Lanes whose supports are from passes in components alone, the problem on them solved.

    Slots that are left are for the vertices that are nearly named. Queries that seem to be inside,
    as far as components tell, get none.
    """
    lanes = start(hull, query, slots)
    shifted = product(lanes.shifted.astype(jnp.float32), hull.components)
    sketch = Sketch(hull)
    few = start(sketch, shifted, slots)._replace(code=lanes.code)
    leave = _SOON_SERVED * few.code.shape[0] // 8
    few = name_candidates(sketch, few, tolerances, phase=SAMPLE, leave=leave)
    weights = active_set.weights(few.active)
    point = active_set.combine(weights, few.active.rows)
    square = jnp.sum(point * point, axis=1, keepdims=True)
    beyond = jnp.sum(weights**2 * sketch.left_out(few.active.index), axis=1, keepdims=True)
    held = jnp.where(weights > 0, few.active.index, jnp.int32(hull.num_vertices))
    found = sketch.screen(point / jnp.sqrt(jnp.where(square > 0, square, 1)), held, phase=SKETCH)
    # Screened values are within 2, by size, so that these follow all of positive weight.
    others = -3 - found.value
    index = jnp.concatenate([few.active.index, found.index], axis=1)
    rank = jnp.concatenate([jnp.where(weights > 0, weights, -jnp.inf), others], axis=1)
    rank, at = lax.top_k(rank, slots)
    index = jnp.take_along_axis(index, at, axis=1)
    used = (rank > -jnp.inf) & (square > beyond)
    lanes = lanes._replace(direction=product(few.direction, hull.components.T))
    # Rounded once more than rows that are read in float64, which only names vertices and is faster.
    rows = hull.rows.reshape(-1, hull.rows.shape[2])[hull.place(index)]
    rows = rows - lax.optimization_barrier(lanes.shifted.astype(jnp.float32))[:, None]
    return _solve_supports(lanes, index, used, rows)


def warm_start(oracle: Oracle, lanes: Lanes, support: Array, weights: Array) -> Lanes:
    """Lanes made by `start` with given supports, the problem on them solved; heaviest first.

    Args:
      oracle: the vertices.
      lanes: in float32, without support.
      support: indices of vertices, `(lanes, any)`.
      weights: only what is positive counts.
    """
    slots = lanes.active.index.shape[1]
    extra = max(0, slots - support.shape[1])
    weights = jnp.pad(weights, ((0, 0), (0, extra)))
    heaviest, at = lax.top_k(jnp.where(jnp.isfinite(weights), weights, 0), slots)
    index = jnp.take_along_axis(jnp.pad(support, ((0, 0), (0, extra))), at, axis=1)
    index = jnp.clip(index, 0, oracle.num_vertices - 1).astype(jnp.int32)
    rows = bracket.rows_of(oracle, lanes.query, index).astype(jnp.float32)
    return _solve_supports(lanes, index, heaviest > 0, rows)


def _solve_supports(lanes: Lanes, index: Array, used: Array, rows: Array) -> Lanes:
    """Lanes with these vertices in their slots, the problem on them solved."""
    used = used & (lanes.code == ACTIVE)[:, None]
    constant = lanes.constant.astype(jnp.float32)
    active = active_set.from_rows(index, used, rows, constant)
    first = jnp.where(used, 1, 0).astype(jnp.float32)
    most = 2 * index.shape[1]
    solved, _ = active_set.solve(
        active, first, jnp.any(used, axis=1), constant, _NOISE * constant, most
    )
    return lanes._replace(active=solved)


def widen(oracle: Oracle, lanes: Lanes, slots: int) -> Lanes:
    """The same supports in float64, with room to grow; the first pass solves for them anew."""
    extra = slots - lanes.active.index.shape[1]
    index = jnp.pad(lanes.active.index, ((0, 0), (0, extra)))
    used = jnp.pad(lanes.active.value > 0, ((0, 0), (0, extra)))
    live = (lanes.code != ENDED) & (lanes.code != BAD)
    rows = bracket.rows_of(oracle, lanes.query, index)
    return lanes._replace(
        active=active_set.from_rows(index, used, rows, lanes.constant),
        square=jnp.maximum(lanes.square, jnp.inf),
        stalls=0 * lanes.stalls,
        idle=lanes.idle & False,
        code=jnp.where(live, ACTIVE, lanes.code).astype(jnp.int32),
    )


def finish(oracle: Oracle, lanes: Lanes, tolerances: Tolerances) -> Lanes:
    """Float64 passes, every one of them bracketed, for lanes made by `widen`."""
    return _loop(oracle, lanes, tolerances, FINE, exact=True)


def _loop(
    oracle: Oracle,
    lanes: Lanes,
    tolerances: Tolerances,
    phase: int | Array,
    *,
    exact: bool,
    leave: int | Array = 0,
) -> Lanes:
    phases = (FINE,) if exact else oracle.phases
    last, before = len(phases) - 1, lanes.steps
    alternates = not exact and oracle.num_nearby > 0  # passes over all with ones over few
    phases += (NEARBY,) * alternates
    kind = jnp.asarray(phases, jnp.int32)

    def number_active(lanes: Lanes, at: Array) -> Array:
        return jnp.sum(_is_active(lanes, tolerances, kind[at]), dtype=jnp.int32)

    def going(carry: tuple[Lanes, Array, Array]) -> Array:
        lanes, at, _ = carry
        return (at != last) | (number_active(lanes, at) > leave)

    def step(carry: tuple[Lanes, Array, Array]) -> tuple[Lanes, Array, Array]:
        lanes, at, home = carry
        lanes = _step(oracle, lanes, at, tolerances=tolerances, phases=phases, exact=exact)
        if len(phases) == 1:
            return lanes, at, home
        number, nearby = number_active(lanes, at), at > last
        # The next phase starts from the points where this one left them.
        soon = (kind[at] == SKETCH) | ((kind[at] == SAMPLE) & ~tolerances.verdict) | nearby
        few = jnp.where(soon, _SOON_SERVED, _SERVED) * lanes.code.shape[0] // 8
        over, back = (at < last) & (number <= few), nearby & (number <= few)
        lanes = lanes._replace(
            code=jnp.where((over | back) & (lanes.code == WAITS), ACTIVE, lanes.code),
            steps=jnp.where(over & (kind[at] < COARSE), before, lanes.steps),
            square=jnp.where(over, jnp.inf, lanes.square),
            stalls=jnp.where(over, 0, lanes.stalls),
            idle=lanes.idle & ~over,
        )
        following = at + over.astype(jnp.int32)
        if not alternates:
            return lanes, following, home
        # After a pass over all some over what it has named besides, then back.
        away = (kind[at] >= COARSE) & ~nearby & ~over & ((at < last) | (number > leave))
        following = jnp.where(back, home, jnp.where(away, jnp.int32(last + 1), following))
        return lanes, following, jnp.where(away, at, home)

    nothing = 0 * lanes.code[0]
    first = jnp.minimum(jnp.sum(kind < phase, dtype=jnp.int32), len(phases) - 1) + nothing
    # One float32 pass may prove a verdict at once; a rough one would prove nothing.
    first = jnp.where(tolerances.verdict & (kind[first] > SAMPLE), jnp.int32(last), first)
    return lax.while_loop(going, step, (lanes, first, last + nothing))[0]


def _is_active(lanes: Lanes, tolerances: Tolerances, phase: int | Array) -> Array:
    """Lanes that go on; bfloat16 leaves a pass to float32, which alone proves anything."""
    limit = tolerances.max_steps - jnp.where(jnp.asarray(phase) == COARSE, 1, 0).astype(jnp.int32)
    return (lanes.code == ACTIVE) & (lanes.steps < limit)


def screen_live(
    oracle: Oracle, live: Bool[Array, " lanes"], direction: Array, masked: Array
) -> Screened:
    """A float32 pass for the lanes that are live: for a half or three quarters that hold all."""
    lanes = live.shape[0]
    widths = (lanes // 2, 3 * lanes // 4)
    everyone = partial(oracle.screen, phase=FINE)
    if widths[0] < _LEAST_HALF:
        return everyone(direction, masked)

    def gathered(width: int, direction: Array, masked: Array) -> Screened:
        place = jnp.cumsum(live, dtype=jnp.int32) - 1
        lane = jnp.arange(lanes, dtype=jnp.int32)
        chosen = jnp.zeros((width,), jnp.int32)
        chosen = chosen.at[jnp.where(live, place, jnp.int32(width))].set(lane, mode="drop")
        found = everyone(direction[chosen], masked[chosen])
        found = Screened(*(array[jnp.clip(place, 0, width - 1)] for array in found))
        return found._replace(value=jnp.where(live[:, None], found.value, jnp.inf))

    number = jnp.sum(live, dtype=jnp.int32)
    which = sum((number > width).astype(jnp.int32) for width in widths)
    branches = [*(partial(gathered, width) for width in widths), everyone]
    return lax.switch(which, branches, direction, masked)


def _columns_in_use(
    make: Callable[[int], Array], named: Bool[Array, "lanes candidates"], *, axis: int
) -> Array:
    """`make` with the fewest columns that hold every named candidate; zeros for the others.

    First passes name as many as there may be, late ones hardly any.
    """
    count = named.shape[1]
    widths = sorted({max(1, count // 4), max(1, count // 2), count})

    def branch(width: int) -> Array:
        array = make(width)
        extra = [(0, 0)] * array.ndim
        extra[axis] = (0, count - width)
        return jnp.pad(array, extra)

    too_narrow = [jnp.any(named[:, width]) for width in widths[:-1]]
    which = jnp.sum(jnp.stack(too_narrow), dtype=jnp.int32)
    return lax.switch(which, [partial(branch, width) for width in widths])


def _step(
    oracle: Oracle,
    lanes: Lanes,
    at: Array,
    *,
    tolerances: Tolerances,
    phases: tuple[int, ...],
    exact: bool,
) -> Lanes:
    """One pass: price, bound, admit, solve on the support. `phases[at]` says what is priced."""
    phase = jnp.asarray(phases, jnp.int32)[at]
    sampling, fine = phase == SAMPLE, phase == FINE
    rough = (phase == SKETCH) | (phase == COARSE) | (phase == NEARBY)
    active = lanes.active
    slots = active.index.shape[1]
    dtype = active.rows.dtype
    constant = lanes.constant.astype(dtype)
    if not exact and SKETCH not in phases:
        # Rounding in the direction costs many lanes a pass over all. Where components come first,
        # few passes follow a new table, and long rows are not read twice more for nothing.
        value = lax.cond(
            fine, active_set.corrected, lambda active, _: active.value, active, constant
        )
        active = active._replace(value=value)
    weights = active_set.weights(active)
    started = jnp.sum(active.value, axis=1) > 0
    point = active_set.combine(weights, active.rows)
    point = jnp.where(started[:, None], point, lanes.direction.astype(dtype))
    square = jnp.sum(point * point, axis=1)
    size = jnp.sqrt(square)
    sketch = oracle if isinstance(oracle, Sketch) else None
    left_out = None if sketch is None else sketch.left_out(active.index)
    if left_out is not None:
        square = square + jnp.sum(weights**2 * left_out, axis=1)
    unit = point / jnp.where(size > 0, size, 1)[:, None]
    if exact:
        _, unit, _ = enclosure.refine(active, active.rows, weights, unit)
        unit_size = enclosure.length(unit)
        unit = unit / jnp.where(unit_size > 0, unit_size, 1)[:, None]
    direction = narrow(unit, jnp.float32)
    score = active_set.scores(active.rows, point)
    if left_out is not None:
        score = score + weights * left_out
    tolerance = (2.0**-50 if exact else _NOISE) * size
    # Vertices off the slots that a screened value cannot tell from the least lie within this.
    error = oracle.error(unit.astype(jnp.float64), direction).astype(dtype)
    margin = tolerance + 2 * error * size
    # Slots off the basis are given up unless they violate, or cannot be told from violating.
    # This precedes the pass, so that it bounds every vertex that is not in a slot.
    keep = (
        active.basic
        | (active.value > 0)
        | (active.used & ((score < (square + 2 * margin)[:, None]) | ~started[:, None]))
    )
    active = active._replace(used=keep)
    masked = jnp.where(keep, active.index, jnp.int32(oracle.num_vertices))
    live = _is_active(lanes, tolerances, phase)
    nearby = jnp.where(live[:, None], lanes.nearby, jnp.int32(oracle.num_vertices))
    special = {
        FINE: partial(screen_live, oracle, live),
        NEARBY: partial(oracle.screen_nearby, nearby=nearby),
    }
    screens = [special.get(phase, partial(oracle.screen, phase=phase)) for phase in phases]
    found = lax.switch(at, screens, direction, masked)
    offset = jnp.sum(lanes.shifted.astype(dtype) * unit, axis=1)
    value = found.value.astype(dtype) - offset[:, None]  # <v - q, unit>, screened
    screened = jnp.where(fine, jnp.min(found.value, axis=1), -jnp.inf)

    wide_square = jnp.where(started, square.astype(jnp.float64), jnp.inf)
    stalled = wide_square > (1 - (2.0**-50 if exact else 2.0**-20)) * lanes.square
    cycling = stalled & (lanes.stalls >= _STALLS[exact])
    lower, upper = lanes.lower, lanes.upper
    if exact:
        held = lanes._replace(active=active)
        norms = enclosure.length(active.rows)
        scored = enclosure.scores(active.rows, unit, norms, exact=True)
        bound = bracket.lower_bound(oracle, held, scored, unit, direction, screened)
        lower = jnp.maximum(lower, bound)
        exact_point, off = enclosure.point(weights, active.rows, norms, exact=True)
        upper = bracket.upper_bound(oracle, lanes, exact_point, off)
        upper = jnp.where(started, upper, jnp.inf)
        ended = bracket.has_converged(oracle, tolerances, upper, lower)
        separated = False
        near_hull = size < _ON_HULL
        hopeless = near_hull | cycling
        banded = started  # vertices inside the band are always welcome
    else:
        least = jnp.minimum(
            jnp.min(value, axis=1) * size, jnp.min(jnp.where(keep, score, jnp.inf), axis=1)
        )
        relative = jnp.where(sampling, _SAMPLE_GAP, tolerances.rtol).astype(dtype)
        enough = 0.5 * jnp.maximum(relative * square, 2 * tolerances.atol.astype(dtype))
        near = square - least <= jnp.maximum(enough, tolerance)
        # Named. Vertices inside the band join the slots, so that the decision scores them exactly.
        banded = fine & near & (jnp.min(value, axis=1) * size < square + margin)
        ended = near & ~banded & ~rough
        separated = tolerances.verdict & (least > margin) & (started | fine)
        near_hull = size < _NEAR_HULL
        # What is idle may only have to admit the vertices of the band.
        hopeless = near_hull | (stalled & lanes.idle & ~banded) | cycling
    ended = live & started & ended
    hopeless = live & ~ended & started & hopeless
    going = live & ~ended & ~hopeless

    violation = jnp.where(started[:, None], size[:, None] - value, -value)
    threshold = jnp.where(banded | rough, -margin, tolerance)
    # What a rough pass cannot tell from a violation is a candidate, in few components whatever it
    # finds; scores decide below.
    slack = jnp.where(phase == COARSE, _COARSE_NOISE * oracle.radius, 0).astype(dtype)
    violates = (violation + slack) * size[:, None] > threshold[:, None]
    violates |= phase == SKETCH
    # Without any vertex yet, all candidates are welcome; with a support to solve for, none is.
    empty = ~jnp.any(keep, axis=1, keepdims=True)
    wanted = jnp.isfinite(value) & jnp.where(started[:, None], violates, empty)
    candidate, slot, named = active_set.assign_slots(
        found.index, violation, wanted & going[:, None], keep, num_candidates(oracle.num_vertices)
    )
    rows = _columns_in_use(
        lambda used: bracket.rows_of(oracle, lanes.query, candidate[:, :used]).astype(dtype),
        named,
        axis=1,
    )
    new_score = active_set.scores(rows, point)
    # Once nothing violates, what the band will hold joins, which spares a float32 pass for it.
    violating = named & (square[:, None] - new_score > tolerance[:, None])
    inside = named & (square[:, None] - new_score > -margin[:, None])
    settled = ~jnp.any(violating, axis=1, keepdims=True)
    accepted = jnp.where(rough & started[:, None], jnp.where(settled, inside, violating), named)
    slot = jnp.where(accepted, slot, jnp.int32(slots))
    # A lane that is given up while it wants vertices may have lacked slots; in few components, all
    # are candidates, wanted or not.
    unmet = jnp.any(wanted, axis=1) & (phase != SKETCH)
    wanting = jnp.where(going, jnp.any(accepted, axis=1), unmet)
    no_room = wanting & jnp.all(keep, axis=1)
    lane = jnp.arange(candidate.shape[0], dtype=jnp.int32)[:, None]
    score = score.at[lane, slot].set(new_score, mode="drop")
    total = (square + constant)[:, None]
    residual = jnp.where(started[:, None], (square[:, None] - score) / total, 1)
    scaled = active._replace(value=jnp.where(started[:, None], weights / total, 0))
    placed = active_set.place(scaled, slot, candidate, rows)
    gram = _columns_in_use(
        lambda used: jnp.einsum("bmd,bad->bma", placed.rows, rows[:, :used], precision=HIGHEST),
        named,
        axis=2,
    )
    if sketch is not None:
        column = jnp.arange(candidate.shape[1], dtype=jnp.int32)[None, :]
        gram = gram.at[lane, slot, column].add(sketch.left_out(candidate), mode="drop")
    filled, trial = active_set.insert(placed, slot, gram + constant[:, None, None], residual)
    floor = tolerance / total[:, 0]
    solved, sweeps = active_set.solve(
        filled, trial, going, constant, jnp.where(started, floor, 0), 2 * slots if exact else 16
    )
    # Twice without a change of the basis: once may have moved the weights, which the next pass
    # sees. A vertex admitted only because it is inside the band is progress too.
    idle = (sweeps == 0) & ~(jnp.any(slot < slots, axis=1) & (banded | rough))
    # Passes over few end for a lane that gains nothing: they are not counted, so nothing else would
    # end them. A pass over all has yet to find it idle twice.
    served = (phase == NEARBY) & (idle | ~started)
    stuck = hopeless | (going & (served | (idle & (lanes.idle | no_room))))
    idle = idle & (lanes.idle | (phase != NEARBY))
    stalls = jnp.where(stalled, lanes.stalls + jnp.minimum(sweeps, 1), 0)
    full = no_room & ~near_hull
    code = jnp.where(stuck, jnp.where(full, FULL, jnp.where(fine, STUCK, WAITS)), lanes.code)
    ended = ended | (rough & going & started & ~wanting & (sweeps == 0)) | (live & separated)
    code = jnp.where(ended, jnp.where(fine, ENDED, WAITS), code)

    def frozen(old: Array, new: Array, where: Array) -> Array:
        return jnp.where(where.reshape(where.shape + (1,) * (old.ndim - 1)), new, old)

    return lanes._replace(
        active=ActiveSet(
            index=solved.index,
            used=frozen(lanes.active.used, frozen(keep, solved.used, going), live),
            basic=solved.basic,
            value=frozen(lanes.active.value, solved.value, going),
            table=solved.table,
            rows=solved.rows,
        ),
        direction=frozen(lanes.direction, direction, live),
        floor=frozen(lanes.floor, screened, live),
        nearby=frozen(lanes.nearby, found.nearby, live & ((phase == COARSE) | fine)),
        upper=frozen(lanes.upper, upper, live),
        lower=frozen(lanes.lower, lower, live),
        square=frozen(lanes.square, jnp.minimum(wide_square, lanes.square), live),
        stalls=frozen(lanes.stalls, stalls, live),
        idle=frozen(lanes.idle, idle, live),
        steps=lanes.steps + (live & (phase != NEARBY)).astype(jnp.int32),
        code=code.astype(jnp.int32),
    )
