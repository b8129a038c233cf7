"""The exact problem on few vertices: Wolfe's minimum-norm point, for a batch of queries.

With rows u_i = v_i - q of the slots in use, the nearest point of their hull to q solves

    minimise |sum_i w_i u_i|^2 / 2  over w >= 0, sum w = 1.

Wolfe's homogeneous form drops the last constraint: with H = U U' + c and any c > 0, w = y / sum(y)
for the minimiser y >= 0 of y' H y / 2 - sum(y) (P. Wolfe, "Finding the nearest point in a
polytope", Mathematical Programming 11, 1976; the non-negative problem is Lawson and Hanson's). The
basis S are the slots with y > 0. A sweep tableau T holds what its changes need,

    T_SS = -inv(H_SS),   T_NS = H_NS inv(H_SS),   T_NN = H_NN - H_NS inv(H_SS) H_SN,

so that slot p enters or leaves by the rank-1 update T - a a' / T_pp, where a is row p of T less its
unit vector (entering) or plus it (leaving). A move computes its a alone, and T follows for a block
of moves at once: memory, not arithmetic, is what a move costs. T is carried from pass to pass, and
its rounding does no lasting harm: every pass solves for the *change* of y against residuals that
are computed afresh from the rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo._numerics import HIGHEST

_LEAST = 2.0**-126  # stands in for zero in a divisor
_BLOCK = 8  # moves after which the table follows


class ActiveSet(NamedTuple):
    """Slots of a batch of queries; the first axis is the lane, one query each.

    Attributes:
      index: vertex in each slot; meaningful where `used`.
      used: slots that hold a vertex.
      basic: slots of the basis, a part of `used`.
      value: y, homogeneous weights; off the basis 0 but for slots that are nearly dependent on it.
      table: T.
      rows: u, scaled; arbitrary but finite where not `used`.
    """

    index: Int[Array, "lanes slots"]
    used: Bool[Array, "lanes slots"]
    basic: Bool[Array, "lanes slots"]
    value: Float[Array, "lanes slots"]
    table: Float[Array, "lanes slots slots"]
    rows: Float[Array, "lanes slots dim"]


class _Sweeps(NamedTuple):
    """State of `solve`; the table itself waits for the end of the block.

    Attributes:
      factor: a of each sweep of the block, `(block, lanes, slots)`.
      inverse: its 1 / T_pp, 0 where nothing was swept.
      diagonal: of the table, up to date.
      basic: as in `ActiveSet`, like `value`.
      value: see `basic`.
      trial: as `insert` starts it.
      live: lanes that go on.
      count: moves of each lane.
      sweep: number of sweeps.
    """

    factor: Array
    inverse: Array
    diagonal: Array
    basic: Array
    value: Array
    trial: Array
    live: Array
    count: Array
    sweep: Array


def empty(like: Float[Array, "lanes dim"], slots: int) -> ActiveSet:
    """No vertices yet; in the type of `like`, from which every array is derived (shard_map)."""
    zero = 0 * like[0, 0]
    # The barrier leaves a plain fill, which is faster than a formula for every entry.
    zero = lax.optimization_barrier(jnp.where(jnp.isfinite(zero), zero, 0))
    plane = jnp.broadcast_to(zero, (like.shape[0], slots))
    index = plane.astype(jnp.int32)
    return ActiveSet(
        index=index,
        used=index > 0,
        basic=index > 0,
        value=plane,
        table=jnp.broadcast_to(zero, (like.shape[0], slots, slots)),
        rows=jnp.broadcast_to(zero, (like.shape[0], slots, like.shape[1])),
    )


def from_rows(
    index: Int[Array, "lanes slots"],
    used: Bool[Array, "lanes slots"],
    rows: Float[Array, "lanes slots dim"],
    constant: Float[Array, " lanes"],
) -> ActiveSet:
    """Slots that hold vertices, none of them in the basis yet: the table is H itself.

    What is behind the last slot in use of all lanes is not multiplied.
    """
    rows = jnp.where(used[:, :, None], rows, 0)
    slots = rows.shape[1]

    def products(width: int) -> Array:
        front = rows[:, :width]
        gram = jnp.einsum("bmd,bnd->bmn", front, front, precision=HIGHEST)
        return jnp.pad(gram, ((0, 0), (0, slots - width), (0, slots - width)))

    widths = sorted({-(-slots * sixths // 6) for sixths in (4, 5, 6)})
    too_narrow = [jnp.any(used[:, width:]) for width in widths[:-1]]
    which = sum(narrow.astype(jnp.int32) for narrow in too_narrow)
    gram = lax.switch(which, [partial(products, width) for width in widths])
    return ActiveSet(
        index=index,
        used=used,
        basic=used & False,
        value=jnp.where(used, 0 * constant[:, None], 0),
        table=gram + constant[:, None, None],
        rows=rows,
    )


def without_rows(active: ActiveSet) -> ActiveSet:
    """The slots without the rows of their vertices."""
    return active._replace(rows=active.rows[:, :, :0])


def narrow(active: ActiveSet, slots: int) -> ActiveSet:
    """The slots in use, of which there are so many at most, moved to the front of so many."""
    lanes, before = active.index.shape
    if slots == before:
        return active
    lane = jnp.arange(lanes, dtype=jnp.int32)[:, None]
    place = jnp.where(active.used, jnp.cumsum(active.used, axis=1, dtype=jnp.int32) - 1, slots)
    source = jnp.broadcast_to(jnp.arange(before, dtype=jnp.int32), place.shape)
    source = jnp.zeros((lanes, slots), jnp.int32).at[lane, place].set(source, mode="drop")
    number = jnp.sum(active.used, axis=1, keepdims=True, dtype=jnp.int32)
    used = jnp.arange(slots, dtype=jnp.int32)[None] < number
    table = jnp.take_along_axis(active.table, source[:, :, None], axis=1)
    return ActiveSet(
        index=jnp.take_along_axis(active.index, source, axis=1),
        used=used,
        basic=used & jnp.take_along_axis(active.basic, source, axis=1),
        value=jnp.where(used, jnp.take_along_axis(active.value, source, axis=1), 0),
        table=jnp.take_along_axis(table, source[:, None, :], axis=2),
        rows=jnp.take_along_axis(active.rows, source[:, :, None], axis=1),
    )


def weights(active: ActiveSet) -> Float[Array, "lanes slots"]:
    """w = y / sum(y); all zero for an empty basis."""
    total = jnp.sum(active.value, axis=1, keepdims=True)
    return active.value / jnp.where(total > 0, total, 1)


def combine(coefficients: Array, rows: Array) -> Float[Array, "lanes dim"]:
    """sum_i coefficients_i rows_i, lane by lane."""
    return jnp.einsum("bm,bmd->bd", coefficients, rows, precision=HIGHEST)


def scores(rows: Array, direction: Array) -> Float[Array, "lanes slots"]:
    """<row_i, direction>, lane by lane."""
    return jnp.einsum("bmd,bd->bm", rows, direction, precision=HIGHEST)


def solve_basis(active: ActiveSet, right: Array) -> Float[Array, "lanes slots"]:
    """inv(H_SS) right_S on the basis, 0 elsewhere."""
    inside = jnp.where(active.basic, right, 0).astype(active.table.dtype)
    product = jnp.einsum("bmn,bn->bm", active.table, inside, precision=HIGHEST)
    return jnp.where(active.basic, -product, 0)


def corrected(active: ActiveSet, constant: Float[Array, " lanes"]) -> Float[Array, "lanes slots"]:
    """Values after one step of iterative refinement, where that leaves the basis positive.

    The moves of `solve` carry their rounding along; here residuals are computed from the rows.
    """
    share = weights(active)
    point = combine(share, active.rows)
    square = jnp.sum(point * point, axis=1, keepdims=True)
    total = square + constant[:, None]
    residual = (square - scores(active.rows, point)) / total
    value = share / total + solve_basis(active, residual)
    sound = jnp.all((value > 0) | ~active.basic, axis=1) & jnp.any(active.basic, axis=1)
    return jnp.where(sound[:, None], value, active.value)


def assign_slots(
    index: Array, violation: Array, wanted: Array, taken: Array, count: int
) -> tuple[Array, Array, Array]:
    """The `count` most violating candidates, each with a free slot while there are any.

    Returns:
      candidates (lanes, count), their slots (`slots` where there is none), which are wanted at all:
      the first of each lane.
    """
    lanes, slots = taken.shape
    classes = index.shape[1]
    key = jnp.where(wanted, violation, -jnp.inf)
    order = jnp.arange(classes, dtype=jnp.int32)
    ahead = (key[:, None, :] > key[:, :, None]) | (
        (key[:, None, :] == key[:, :, None]) & (order[None, None, :] < order[None, :, None])
    )
    rank = jnp.sum(ahead, axis=2, dtype=jnp.int32)
    lane = jnp.arange(lanes, dtype=jnp.int32)[:, None]
    rank = jnp.where(wanted, rank, jnp.int32(count))
    nobody = 0 * index[:, :1]
    candidate = (nobody + jnp.zeros((1, count), jnp.int32)).at[lane, rank].set(index, mode="drop")
    number = jnp.sum(wanted, axis=1, dtype=jnp.int32)
    place = jnp.cumsum(~taken, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(taken, jnp.int32(count), place)
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), taken.shape)
    free = (nobody + jnp.full((1, count), slots, jnp.int32)).at[lane, place].set(slot, mode="drop")
    column = jnp.arange(count, dtype=jnp.int32)[None, :]
    named = column < number[:, None]
    return candidate, jnp.where(named, free, jnp.int32(slots)), named


def place(
    active: ActiveSet,
    slot: Int[Array, "lanes new"],
    vertex: Int[Array, "lanes new"],
    rows: Float[Array, "lanes new dim"],
) -> ActiveSet:
    """Put vertices, by index and row u, into free slots; `slot` is `slots` to drop one."""
    lane = jnp.arange(active.index.shape[0], dtype=jnp.int32)[:, None]
    return active._replace(
        index=active.index.at[lane, slot].set(vertex, mode="drop"),
        used=active.used.at[lane, slot].set(True, mode="drop"),
        rows=active.rows.at[lane, slot].set(rows, mode="drop"),
    )


def insert(
    active: ActiveSet,
    slot: Int[Array, "lanes new"],
    gram: Float[Array, "lanes slots new"],
    residual: Float[Array, "lanes slots"],
) -> tuple[ActiveSet, Array]:
    """Complete the table for slots just placed and start the solution of the changed problem.

    Args:
      active: the slots.
      slot: where each vertex was placed, pairwise different and outside the basis; `slots` where it
        was dropped.
      gram: H of all slots and the new vertices, c included.
      residual: 1 - H y at all slots, those of the new vertices included.

    Returns:
      the slots, and for every slot what `solve` starts from: on the basis the y that solves the
      equations of the basis, elsewhere the reduced cost (positive if entering improves).
    """
    slots = active.index.shape[1]
    lane = jnp.arange(active.index.shape[0], dtype=jnp.int32)[:, None]
    basic = active.basic[:, :, None]
    unmet = jnp.where(active.basic, residual, 0)
    # Two products: a seventeenth column would cost as much as sixteen more.
    swept = jnp.einsum("bmn,bna->bma", active.table, jnp.where(basic, gram, 0), precision=HIGHEST)
    moved = jnp.einsum("bmn,bn->bm", active.table, unmet, precision=HIGHEST)
    # Both are done with the table before it changes: else it would be copied.
    swept, moved = lax.optimization_barrier((swept, moved))
    column = jnp.where(basic, -swept, gram - swept)
    on_basis = jnp.where(basic, column, 0)  # inv(H_SS) H_S,new
    clipped = jnp.minimum(slot, slots - 1)
    # The barrier keeps the transposition out of the product, which would be slow.
    turned = lax.optimization_barrier(jnp.swapaxes(on_basis, 1, 2))
    among = jnp.take_along_axis(gram, clipped[:, :, None], axis=1) - jnp.einsum(
        "bam,bmc->bac", turned, gram, precision=HIGHEST
    )
    column = jnp.swapaxes(column.at[lane, slot].set(among, mode="drop"), 1, 2)
    table = active.table.at[lane, slot].set(column, mode="drop")
    table = table.at[lane, :, slot].set(column, mode="drop")
    start = jnp.where(active.basic, active.value, residual) - moved
    cost = jnp.take_along_axis(residual, clipped, axis=1) - jnp.einsum(
        "bma,bm->ba", on_basis, unmet, precision=HIGHEST
    )
    start = start.at[lane, slot].set(cost, mode="drop")
    return active._replace(table=table), start


def solve(
    active: ActiveSet,
    start: Float[Array, "lanes slots"],
    live: Bool[Array, " lanes"],
    constant: Float[Array, " lanes"],
    tolerance: Float[Array, " lanes"],
    max_sweeps: Any,
) -> tuple[ActiveSet, Int[Array, " lanes"]]:
    """Lawson and Hanson's method on the tableau, all lanes in lockstep.

    A lane whose trial y is infeasible goes as far as it can and drops the slot that blocks. A
    feasible one accepts it and lets the slot enter whose entry lowers the objective most
    (cost^2 / pivot), until no reduced cost exceeds the tolerance. A slot whose pivot is tiny, such
    as a copy of a vertex of the basis, may not enter: it *slides*, taking over weight until one of
    the basis reaches 0 and leaves. Stopping early, at `max_sweeps`, leaves y feasible.

    Args:
      active: the slots, and `start` as `insert` returns it.
      start: see `insert`.
      live: lanes to be solved; the others stay as they are.
      constant: c, which bounds the diagonal of H from below.
      tolerance: reduced costs up to this count as zero.
      max_sweeps: limit of moves.

    Returns:
      the solved slots and the number of moves of each lane.
    """
    slots = active.index.shape[1]
    order = jnp.arange(slots, dtype=jnp.int32)[None, :]
    tiny = constant * (2.0**-12 if active.rows.dtype == jnp.float32 else 2.0**-26)

    def sweep(table: Array, first: Any, state: _Sweeps) -> _Sweeps:
        value, trial, diagonal, basic = state.value, state.trial, state.diagonal, state.basic
        blocked = basic & (trial <= 0)
        ratio = jnp.where(blocked, value / jnp.maximum(value - trial, _LEAST), jnp.inf)
        least = jnp.min(ratio, axis=1)
        infeasible = least < jnp.inf
        reach = jnp.minimum(least, 1)
        moved = jnp.maximum(value + reach[:, None] * (trial - value), 0)
        value = jnp.where(basic & state.live[:, None], moved, value)
        outside = active.used & ~basic
        sound = diagonal > tiny[:, None]
        gain = trial * trial / jnp.where(sound, diagonal, tiny[:, None])
        # A slot that has slid and become independent enters before anything else.
        gain = jnp.where(sound & (value > 0), jnp.inf, gain)
        enters = outside & ((trial > tolerance[:, None]) | (sound & (value > 0)))
        # One merit for both moves: the smallest ratio leaves, else the largest gain enters.
        merit = jnp.where(infeasible[:, None], -ratio, jnp.where(enters, gain, -1))
        best = jnp.max(merit, axis=1)
        pivot = jnp.min(jnp.where(merit == best[:, None], order, slots - 1), axis=1)
        live = state.live & (infeasible | (best > 0))
        at = pivot[:, None]
        here = order == at
        divisor = jnp.take_along_axis(diagonal, at, axis=1)
        row = jnp.take_along_axis(table, at[:, :, None], axis=1)[:, 0]
        applied = jnp.take_along_axis(state.factor, at[None], axis=2)[:, :, 0] * state.inverse
        for number in range(_BLOCK):
            row = row - applied[number][:, None] * state.factor[number]
        row = jnp.where(live[:, None], jnp.where(here, divisor, row), 0)
        row = lax.optimization_barrier(row)  # else each of its uses sums again
        cost = jnp.take_along_axis(trial, at, axis=1)
        slides = (live & ~infeasible)[:, None] & (divisor <= tiny[:, None])
        limit = jnp.where(basic & (row > 0), value / jnp.maximum(row, _LEAST), jnp.inf)
        slid = jnp.minimum(
            jnp.min(limit, axis=1, keepdims=True), cost / jnp.maximum(divisor, _LEAST)
        )
        change = jnp.where(slides, slid, cost / jnp.where(divisor == 0, 1, divisor))
        change = jnp.where(live[:, None] & (change < jnp.inf), change, 0)
        divisor = jnp.where(live[:, None] & ~slides, divisor, 1)
        hit = here & live[:, None] & ~slides
        sign = jnp.where(infeasible, -1, 1).astype(row.dtype)[:, None]
        inverse = jnp.where(live[:, None] & ~slides, 1 / divisor, 0)
        entered = jnp.where(hit, sign * change + value, trial - row * change)
        # Sliding: the pivot takes on `change`, the basis gives it, one of them all it has.
        cost_left = jnp.maximum(cost - jnp.maximum(divisor, 0) * change, 0)
        given = jnp.where(limit == jnp.min(limit, axis=1, keepdims=True), 0, trial - row * change)
        after = jnp.where(basic, jnp.maximum(given, 0), trial - row * change)
        after = jnp.where(here, cost_left, after)
        value = jnp.where(
            slides,
            jnp.where(basic, after, jnp.where(here, value + change, value)),
            jnp.where(hit & infeasible[:, None], 0, value),
        )
        place = state.sweep - first
        return _Sweeps(
            factor=lax.dynamic_update_index_in_dim(
                state.factor, jnp.where(hit, divisor - sign, row), place, 0
            ),
            inverse=lax.dynamic_update_index_in_dim(state.inverse, inverse[:, 0], place, 0),
            diagonal=jnp.where(hit, -inverse, diagonal - row * (row * inverse)),
            basic=basic ^ hit,
            value=value,
            trial=jnp.where(slides, after, entered),
            live=live,
            count=state.count + live.astype(jnp.int32),
            sweep=state.sweep + 1,
        )

    def block(carry: tuple[Array, _Sweeps]) -> tuple[Array, _Sweeps]:
        table, state = carry
        end = jnp.minimum(state.sweep + _BLOCK, max_sweeps)
        state = state._replace(inverse=0 * state.inverse)
        state = lax.while_loop(
            lambda now: (now.sweep < end) & jnp.any(now.live),
            partial(sweep, table, state.sweep),
            state,
        )
        scaled = state.factor * state.inverse[:, :, None]
        for number in range(_BLOCK):
            table = table - scaled[number][:, :, None] * state.factor[number][:, None, :]
        diagonal = jnp.eye(slots, dtype=bool)[None]
        return jnp.where(diagonal, state.diagonal[:, :, None], table), state

    nothing = 0 * active.value[0, 0]
    start_at = _Sweeps(
        factor=jnp.broadcast_to(nothing, (_BLOCK, *active.value.shape)),
        inverse=jnp.broadcast_to(nothing, (_BLOCK, active.value.shape[0])),
        diagonal=jnp.diagonal(active.table, axis1=1, axis2=2),
        basic=active.basic,
        value=active.value,
        trial=start,
        live=live,
        count=0 * live.astype(jnp.int32),
        sweep=jnp.int32(0),
    )
    table, end = lax.while_loop(
        lambda carry: (carry[1].sweep < max_sweeps) & jnp.any(carry[1].live),
        block,
        (active.table, start_at),
    )
    return active._replace(table=table, basic=end.basic, value=end.value), end.count
