"""The exact problem on few vertices: Wolfe's minimum-norm point, for a batch of queries.

With rows u_i = v_i - q of the slots in use, the nearest point of their hull to q solves

    minimise |sum_i w_i u_i|^2 / 2  over w >= 0, sum w = 1.

Wolfe's homogeneous form drops the last constraint: with H = U U' + c and any c > 0, w = y / sum(y)
for the minimiser y >= 0 of y' H y / 2 - sum(y) (P. Wolfe, "Finding the nearest point in a
polytope", Mathematical Programming 11, 1976; the non-negative problem is Lawson and Hanson's). The
basis S are the slots with y > 0. A sweep tableau T holds what its changes need,

    T_SS = -inv(H_SS),   T_NS = H_NS inv(H_SS),   T_NN = H_NN - H_NS inv(H_SS) H_SN,

so that one slot enters or leaves by a rank-1 update. T is carried from pass to pass, and its
rounding does no lasting harm: every pass solves for the *change* of y against residuals that are
computed afresh from the rows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo._numerics import HIGHEST

_LEAST = 2.0**-126  # stands in for zero in a divisor


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


def empty(like: Float[Array, "lanes dim"], slots: int) -> ActiveSet:
    """No vertices yet; in the type of `like`, from which every array is derived (shard_map)."""
    zero = (0 * like[:, :1]).astype(like.dtype)
    zero = jnp.where(jnp.isfinite(zero), zero, 0)
    plane = jnp.broadcast_to(zero, (like.shape[0], slots))
    index = plane.astype(jnp.int32)
    return ActiveSet(
        index=index,
        used=index > 0,
        basic=index > 0,
        value=plane,
        table=jnp.broadcast_to(plane[:, None, :], (like.shape[0], slots, slots)),
        rows=jnp.broadcast_to(zero[:, :, None], (like.shape[0], slots, like.shape[1])),
    )


def from_rows(
    index: Int[Array, "lanes slots"],
    used: Bool[Array, "lanes slots"],
    rows: Float[Array, "lanes slots dim"],
    constant: Float[Array, " lanes"],
) -> ActiveSet:
    """Slots that hold vertices, none of them in the basis yet: the table is H itself."""
    rows = jnp.where(used[:, :, None], rows, 0)
    gram = jnp.einsum("bmd,bnd->bmn", rows, rows, precision=HIGHEST)
    return ActiveSet(
        index=index,
        used=used,
        basic=used & False,
        value=0 * rows[:, :, 0],
        table=gram + constant[:, None, None],
        rows=rows,
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


def insert(
    active: ActiveSet,
    slot: Int[Array, "lanes new"],
    vertex: Int[Array, "lanes new"],
    rows: Float[Array, "lanes new dim"],
    residual: Float[Array, "lanes slots"],
    constant: Float[Array, " lanes"],
) -> tuple[ActiveSet, Array]:
    """Put vertices into free slots and start the solution of the changed problem.

    Args:
      active: the slots.
      slot: where each vertex goes, pairwise different and outside the basis; `slots` to drop it.
      vertex: indices of the vertices.
      rows: their u.
      residual: 1 - H y at all slots, those of the new vertices included.
      constant: c.

    Returns:
      the slots, and for every slot what `solve` starts from: on the basis the y that solves the
      equations of the basis, elsewhere the reduced cost (positive if entering improves).
    """
    slots = active.index.shape[1]
    lane = jnp.arange(active.index.shape[0], dtype=jnp.int32)[:, None]
    index = active.index.at[lane, slot].set(vertex, mode="drop")
    filled = active.rows.at[lane, slot].set(rows, mode="drop")
    gram = jnp.einsum("bmd,bad->bma", filled, rows, precision=HIGHEST) + constant[:, None, None]
    basic = active.basic[:, :, None]
    right = jnp.concatenate([gram, residual[:, :, None]], axis=2)
    swept = jnp.einsum("bmn,bna->bma", active.table, jnp.where(basic, right, 0), precision=HIGHEST)
    column = jnp.where(basic, -swept[:, :, :-1], gram - swept[:, :, :-1])
    on_basis = jnp.where(basic, column, 0)  # inv(H_SS) H_S,new
    clipped = jnp.minimum(slot, slots - 1)
    among = jnp.take_along_axis(gram, clipped[:, :, None], axis=1) - jnp.einsum(
        "bma,bmc->bac", on_basis, gram, precision=HIGHEST
    )
    column = jnp.swapaxes(column.at[lane, slot].set(among, mode="drop"), 1, 2)
    table = active.table.at[lane, slot].set(column, mode="drop")
    table = table.at[lane, :, slot].set(column, mode="drop")
    start = jnp.where(active.basic, active.value - swept[:, :, -1], residual - swept[:, :, -1])
    cost = jnp.take_along_axis(residual, clipped, axis=1) - jnp.einsum(
        "bma,bm->ba", on_basis, jnp.where(active.basic, residual, 0), precision=HIGHEST
    )
    start = start.at[lane, slot].set(cost, mode="drop")
    taken = active.used.at[lane, slot].set(True, mode="drop")
    return active._replace(index=index, used=taken, table=table, rows=filled), start


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

    class Sweeping(NamedTuple):
        table: Array  # its diagonal is kept apart and written back once
        diagonal: Array
        basic: Array
        value: Array
        trial: Array
        live: Array
        count: Array
        sweep: Array

    def going(state: Sweeping) -> Array:
        return (state.sweep < max_sweeps) & jnp.any(state.live)

    def sweep(state: Sweeping) -> Sweeping:
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
        row = jnp.take_along_axis(state.table, at[:, :, None], axis=1)[:, 0]
        row = jnp.where(live[:, None], row, 0)
        divisor = jnp.take_along_axis(diagonal, at, axis=1)
        cost = jnp.take_along_axis(trial, at, axis=1)
        slides = (live & ~infeasible)[:, None] & (divisor <= tiny[:, None])
        here = order == at
        limit = jnp.where(basic & (row > 0), value / jnp.maximum(row, _LEAST), jnp.inf)
        slid = jnp.minimum(
            jnp.min(limit, axis=1, keepdims=True), cost / jnp.maximum(divisor, _LEAST)
        )
        change = jnp.where(slides, slid, cost / jnp.where(divisor == 0, 1, divisor))
        change = jnp.where(live[:, None] & (change < jnp.inf), change, 0)
        divisor = jnp.where(live[:, None] & ~slides, divisor, 1)
        hit = here & live[:, None] & ~slides
        sign = jnp.where(infeasible, -1, 1).astype(row.dtype)[:, None]
        scaled = jnp.where(slides, 0, row / divisor)
        edge = sign * scaled
        table = jnp.where(
            hit[:, :, None],
            edge[:, None, :],
            jnp.where(
                hit[:, None, :],
                edge[:, :, None],
                state.table - row[:, :, None] * scaled[:, None, :],
            ),
        )
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
        return Sweeping(
            table=table,
            diagonal=jnp.where(hit, -1 / divisor, diagonal - row * scaled),
            basic=basic ^ hit,
            value=value,
            trial=jnp.where(slides, after, entered),
            live=live,
            count=state.count + live.astype(jnp.int32),
            sweep=state.sweep + 1,
        )

    end = lax.while_loop(
        going,
        sweep,
        Sweeping(
            table=active.table,
            diagonal=jnp.diagonal(active.table, axis1=1, axis2=2),
            basic=active.basic,
            value=active.value,
            trial=start,
            live=live,
            count=0 * live.astype(jnp.int32),
            sweep=jnp.int32(0),
        ),
    )
    table = jnp.where(jnp.eye(slots, dtype=bool)[None], end.diagonal[:, :, None], end.table)
    return active._replace(table=table, basic=end.basic, value=end.value), end.count
