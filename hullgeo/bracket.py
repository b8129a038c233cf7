"""What is proved about a batch of queries: brackets of the distance, and the answer returned.

For weights w and any direction g, with u_i = v_i - q,

    min_i <u_i, g> / |g|  <=  distance(q, conv V)  <=  |sum_i w_i u_i| / sum_i w_i .

The left minimum runs over all vertices: those in slots are scored in enclosed float64
(`enclosure.py`), all others are bounded by one float32 pass (`oracle.py`). `docs/hull.md` has the
proofs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import active_set, enclosure
from hullgeo._numerics import narrow, round_down, round_up
from hullgeo.active_set import ActiveSet
from hullgeo.oracle import Oracle, flushed, power_of_two
from hullgeo.result import HullProjection, Status

# How a lane stands. One that has ended in a pass that decides nothing waits for one that does.
ACTIVE, ENDED, FULL, STUCK, BAD, WAITS = range(6)

_AGREEMENT = 2.0**-34  # of the scores of a basis, relative: one round of refinement was enough


class Tolerances(NamedTuple):
    """Traced, so that sweeping them compiles nothing. `atol` in the units of half the square."""

    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    max_steps: Int[Array, ""]
    verdict: Bool[Array, ""]  # a query proved outside is finished, however wide its bracket


class Lanes(NamedTuple):
    """The state of a batch of queries.

    Attributes:
      query: as passed by the caller.
      shifted: `(q - center) / scale` in float64.
      constant: c of Wolfe's homogeneous form.
      active: slots, in float32 while naming and float64 while finishing.
      direction: the float32 unit direction of the last pass, or of the first to come.
      floor: the least value screened there.
      nearby: vertices that the last pass over all has named besides.
      upper: a proved upper bound of the scaled distance (while finishing).
      lower: the best proved lower bound.
      square: least |x|^2 of all passes.
      stalls: passes since it last fell noticeably.
      idle: the last pass did not change the basis.
      steps: passes so far.
      code: one of the codes above.
    """

    query: Array
    shifted: Array
    constant: Array
    active: ActiveSet
    direction: Array
    floor: Array
    nearby: Array
    upper: Array
    lower: Array
    square: Array
    stalls: Array
    idle: Array
    steps: Array
    code: Array


def rows_of(oracle: Oracle, query: Array, index: Array) -> Array:
    """u = (v - q) / scale in float64, each entry rounded once."""
    scale = power_of_two(-oracle.exponent)
    wide = query.astype(jnp.float64) * scale
    # The barrier keeps this from being done again for every vertex.
    wide = lax.optimization_barrier(jnp.where(jnp.isfinite(wide), wide, 0))
    return oracle.gather(index).astype(jnp.float64) * scale - wide[:, None, :]


def lost(oracle: Oracle, query: Array) -> Array:
    """Bound of what flushing subnormal numbers may have moved, per query, scaled."""
    return oracle.flushed.astype(jnp.float64) + flushed(query, oracle.exponent)


def least_score(
    oracle: Oracle,
    lanes: Lanes,
    scored: tuple[Float[Array, "lanes slots"], Float[Array, "lanes slots"]],
    unit: Float[Array, "lanes dim"],
    direction: Float[Array, "lanes dim"],
    floor: Float[Array, " lanes"],
) -> Float[Array, " lanes"]:
    """A number proved to be at most min_i <u_i, unit>, by a float64 direction of norm about one.

    `scored` holds the scores of the slots and the errors of these; all other vertices are bounded
    by the pass that screened the float32 `direction` near `unit` and found `floor` at least.
    """
    dim = unit.shape[1]
    value, error = scored
    on_slots = jnp.min(jnp.where(lanes.active.used, value - error, jnp.inf), axis=1)
    offset = jnp.sum(lanes.shifted * unit, axis=1)
    rounding = 1.1 * (dim + 6) * enclosure.U64 * (enclosure.length(lanes.shifted) + 1)
    others = floor.astype(jnp.float64) - offset - oracle.error(unit, direction) - rounding
    return jnp.minimum(on_slots, others) - 1.1 * lost(oracle, lanes.query)


def lower_bound(
    oracle: Oracle,
    lanes: Lanes,
    scored: tuple[Array, Array],
    unit: Array,
    direction: Array,
    floor: Array,
) -> Float[Array, " lanes"]:
    """Proved lower bound of the scaled distance; see `least_score`."""
    least = least_score(oracle, lanes, scored, unit, direction, floor)
    size = enclosure.length(unit) * (1 + (unit.shape[1] + 4) * enclosure.U64)
    bound = least / jnp.where(size > 0, size, 1) * (1 - 4 * enclosure.U64)
    return jnp.where(bound > 0, bound, 0)


def upper_bound(oracle: Oracle, lanes: Lanes, point: Array, error: Array) -> Array:
    """Proved upper bound of the scaled distance: the norm of a point known up to `error`."""
    dim = point.shape[1]
    size = enclosure.length(point) * (1 + (dim + 4) * enclosure.U64)
    return size + error + 1.1 * lost(oracle, lanes.query)


def has_converged(oracle: Oracle, tolerances: Tolerances, upper: Array, lower: Array) -> Array:
    """(upper^2 - lower^2) / 2 <= atol + rtol upper^2 / 2, or the verdict; never for NaN."""
    width = (upper - lower) * (upper + lower) / 2
    down = power_of_two(-oracle.exponent)
    atol = tolerances.atol.astype(jnp.float64) * down * down
    close = width <= atol + tolerances.rtol.astype(jnp.float64) * upper * upper / 2
    return close | (tolerances.verdict & (lower > 0) & (upper < jnp.inf))


class Decision(NamedTuple):
    """What is proved about each lane, scaled, in float64; `weights` belong to its slots."""

    weights: Array
    point: Array
    upper: Array
    lower: Array
    gap: Array
    radius: Array
    converged: Array


def decide(
    oracle: Oracle, lanes: Lanes, tolerances: Tolerances, dtype: jnp.dtype, *, inside: bool
) -> Decision:
    """Float64 solution on the support and the bracket it proves, for weights returned in `dtype`.

    The last pass of each lane bounds the vertices off its slots, so that nothing is priced again.

    Args:
      oracle: the vertices.
      lanes: in float32 or float64; lanes that have not been screened prove no lower bound.
      tolerances: what counts as converged.
      dtype: type of the returned weights.
      inside: try to prove that queries lie inside (float64 lanes).
    """
    active = lanes.active
    exact = active.rows.dtype == jnp.float64
    rows = active.rows if exact else rows_of(oracle, lanes.query, active.index)
    # A bound of all norms spares a pass over the rows; next to the hull theirs are worth it.
    reach = oracle.radius.astype(jnp.float64) + enclosure.length(lanes.shifted)
    norms = jnp.broadcast_to(reach[:, None], rows.shape[:2])
    norms = enclosure.length(rows) if exact else norms
    waits = (lanes.code == ACTIVE) | (lanes.code == BAD)

    def agree(value: Array) -> Array:
        most = jnp.max(jnp.where(active.basic, value, -jnp.inf), axis=1)
        least = jnp.min(jnp.where(active.basic, value, jnp.inf), axis=1)
        share = jnp.minimum(_AGREEMENT, tolerances.rtol.astype(jnp.float64) / 16)
        return jnp.all((most - least <= share * least) | waits)

    weights = active_set.weights(active).astype(jnp.float64)
    # A lane without support, where float32 got nowhere, has its first slot's vertex for a point.
    nothing = ~(jnp.sum(weights, axis=1, keepdims=True) > 0)
    first = jnp.arange(weights.shape[1], dtype=jnp.int32)[None] == 0
    weights = jnp.where(nothing, first.astype(jnp.float64), weights)
    direction = active_set.combine(weights, rows)
    refined, direction, value = enclosure.refine(
        active, rows, weights, direction, None if exact else agree
    )
    refined = jnp.where(jnp.all(refined >= 0, axis=1, keepdims=True), refined, weights)
    refined, norms = _at_vertex(active.used, rows, value, refined, norms)
    size = enclosure.length(direction)
    size = jnp.where(size > 0, size, 1)[:, None]
    unit = direction / size
    if exact:
        scored = enclosure.scores(rows, unit, norms, exact=True)
    else:
        scored = value / size, enclosure.score_error(rows.shape[2], norms)
    bound = lower_bound(oracle, lanes, scored, unit, lanes.direction, lanes.floor)
    lower = jnp.maximum(lanes.lower, bound)

    def screened_too() -> Array:
        unit = lanes.direction.astype(jnp.float64)
        scored = enclosure.scores(rows, unit, norms, exact=exact)
        bound = lower_bound(oracle, lanes, scored, unit, lanes.direction, lanes.floor)
        return jnp.maximum(lower, bound)

    # Where passes ended early, the direction that was screened may prove more than a refined one.
    lower = lax.cond(tolerances.verdict, screened_too, lambda: lower)

    total = jnp.sum(refined, axis=1, keepdims=True)
    refined = refined / jnp.where(total > 0, total, 1)
    rounded = narrow(refined, dtype)
    point, error = enclosure.point(rounded.astype(jnp.float64), rows, norms, exact=exact)
    upper = jnp.minimum(lanes.upper, upper_bound(oracle, lanes, point, error))

    def unrounded_too() -> Array:
        bound = upper_bound(oracle, lanes, *enclosure.point(refined, rows, norms, exact=exact))
        return jnp.minimum(upper, bound)

    # Rounding the weights costs its square, which matters next to the hull alone.
    close = has_converged(oracle, tolerances, upper, lower) | waits
    upper = lax.cond(jnp.all(close), lambda: upper, unrounded_too)
    size = enclosure.length(point)
    unit = point / jnp.where(size > 0, size, 1)[:, None]
    scored = enclosure.scores(rows, unit, norms, exact=exact)
    least = least_score(oracle, lanes, scored, unit, lanes.direction, lanes.floor)
    gap = _gap(point, error, least, reach)

    radius = 0 * upper
    if inside:
        level = oracle.center.astype(jnp.float64)[None] == lanes.query.astype(jnp.float64)
        constant = oracle.constant[None] & level
        best, off = enclosure.point(refined, rows, norms, exact=True)
        tried = (bound == 0) & (upper < 2.0**-20)
        off = off + 1.1 * lost(oracle, lanes.query)
        size = enclosure.length(best) * (1 + (best.shape[1] + 4) * enclosure.U64)

        def prove(lane: tuple[Array, ...]) -> Array:
            attempt, *rest = lane
            return lax.cond(attempt, lambda: enclosure.interior_radius(*rest), lambda: 0 * rest[-1])

        radius = lax.map(prove, (tried, rows, refined, constant, size, off))
    proved = radius > 0
    upper = jnp.where(proved, 0, upper)
    converged = has_converged(oracle, tolerances, upper, lower) & jnp.isfinite(upper)
    return Decision(rounded, point, upper, lower, gap, radius, converged)


def _at_vertex(
    used: Array, rows: Array, scores: Array, weights: Array, norms: Array
) -> tuple[Array, Array]:
    """All weight on a vertex that equals the query: its score, norm and distance are exactly 0."""

    def choose() -> tuple[Array, Array]:
        hit = used & jnp.all(rows == 0, axis=2)
        first = hit & (jnp.cumsum(hit, axis=1, dtype=jnp.int32) == 1)
        some = jnp.any(hit, axis=1, keepdims=True)
        return jnp.where(some, first.astype(weights.dtype), weights), jnp.where(hit, 0, norms)

    return lax.cond(jnp.any(used & (scores == 0)), choose, lambda: (weights, norms))


def _gap(point: Array, error: Array, least: Array, reach: Array) -> Array:
    """At least the Frank-Wolfe gap max_i <x, x - u_i> of a point x known up to `error`.

    `least` is a number proved to be at most min_i <u_i, x / |x|>, `reach` at least max_i |u_i|.
    """
    size = enclosure.length(point)
    grown = size * (1 + (point.shape[1] + 8) * enclosure.U64) + error
    gap = grown * grown - jnp.where(least > 0, size * (1 - 1e-14), grown) * least
    return jnp.maximum(gap + 1.1 * error * reach, 0)


def answer(
    oracle: Oracle,
    lanes: Lanes,
    decision: Decision,
    tolerances: Tolerances,
    dtype: jnp.dtype,
) -> HullProjection:
    """The result in the caller's units and type, bracket rounded outwards."""
    scale = power_of_two(oracle.exponent)
    heaviest = jnp.take_along_axis(
        lanes.active.index, lax.argmax(decision.weights, 1, jnp.int32)[:, None], axis=1
    )
    query = lanes.query.astype(dtype)
    finite = jnp.all(jnp.isfinite(lanes.query), axis=1)
    distance = round_up(decision.upper * scale, dtype)
    good = finite & jnp.isfinite(distance)
    inside = decision.radius > 0
    point = lanes.query.astype(jnp.float64) + decision.point * scale
    point = jnp.where(inside[:, None], lanes.query.astype(jnp.float64), point).astype(dtype)
    limit = lanes.steps >= tolerances.max_steps
    failure = jnp.where(limit, jnp.int32(Status.STEP_LIMIT), jnp.int32(Status.PRECISION_LIMIT))
    failure = jnp.where(lanes.code == FULL, jnp.int32(Status.CAPACITY), failure)
    status = jnp.where(decision.converged, jnp.int32(Status.CONVERGED), failure)
    unknown = jnp.where(good, 0, jnp.nan).astype(dtype)
    return HullProjection(
        point=point + unknown[:, None],
        distance=distance + unknown,
        distance_lower_bound=round_down(decision.lower * scale, dtype) + unknown,
        interior_radius=round_down(decision.radius * scale, dtype) + unknown,
        support=jnp.where(decision.weights > 0, lanes.active.index, heaviest),
        weights=decision.weights + unknown[:, None],
        gap=round_up(decision.gap * scale * scale, dtype) + unknown,
        num_steps=lanes.steps,
        status=jnp.where(good, status, jnp.int32(Status.NONFINITE)),
        query=query,
    )
