"""Supports from the Gram matrix, where there are no more vertices than dimensions.

With G = V V' and p = V q, the scores of all vertices at x = V' w are G w - p: a pass over n numbers
a vertex in place of d, which never touches a row. Rounding of G is of the order of u R^2: that
names the support and proves nothing, but one pass of the oracle in the direction found bounds the
vertices off it. What is left undecided goes on with rows, in `fully_corrective.py`.
"""

from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from hullgeo import active_set
from hullgeo._numerics import product
from hullgeo.active_set import ActiveSet
from hullgeo.bracket import ACTIVE, ENDED, Lanes
from hullgeo.oracle import FINE, Hull

_U32 = 2.0**-24
_NOISE = 8 * _U32  # of a score, relative to R (R + |q|)
_CANDIDATES = 16  # of a pass at most, one of each class of neighbouring rows
_FEW = 4  # once one lane of so many is live, the others are left out
_MOST_PASSES = 64
_MOST_SWEEPS = 16


def serves(oracle: Any) -> TypeGuard[Hull]:
    """Whether these vertices have a Gram matrix."""
    return isinstance(oracle, Hull) and oracle.gram.shape[0] > 0


class _Named(NamedTuple):
    """Lanes on the way to their supports.

    Attributes:
      active: slots without rows.
      live: lanes that go on.
      against: p, the products of all vertices with the query.
      size: |q|^2.
      constant: c of Wolfe's homogeneous form.
    """

    active: ActiveSet
    live: Array
    against: Array
    size: Array
    constant: Array


def name_supports(hull: Hull, lanes: Lanes) -> Lanes:
    """Supports for lanes made by `fully_corrective.start`, without rows, and one pass with them."""
    number, dim = hull.vertices.shape
    rows = hull.rows.reshape(-1, dim)
    places = hull.place(jnp.arange(number, dtype=jnp.int32))
    queries = lanes.shifted.astype(jnp.float32)
    live = lanes.code == ACTIVE
    named = _Named(
        active=active_set.without_rows(lanes.active),
        live=live,
        against=product(queries, rows.T)[:, places],
        size=jnp.sum(queries * queries, axis=1),
        constant=lanes.constant.astype(jnp.float32),
    )
    few = queries.shape[0] // _FEW if queries.shape[0] >= 8 * _FEW else 0
    named, passes = _until(hull, named, few, 0 * lanes.code[0])
    if few:
        # The last passes are for few: their lanes alone.
        order = jnp.where(named.live, jnp.cumsum(named.live, dtype=jnp.int32) - 1, jnp.int32(few))
        lane = jnp.arange(queries.shape[0], dtype=jnp.int32)
        last = jnp.full((few,), lane.size, jnp.int32).at[order].set(lane, mode="drop")
        kept = jax.tree.map(lambda array: array.at[last].get(mode="clip"), named)
        kept, _ = _until(hull, kept._replace(live=last < lane.size), 0, passes)
        active = jax.tree.map(
            lambda old, new: old.at[last].set(new, mode="drop"), named.active, kept.active
        )
        named = named._replace(active=active)
    dense = _dense_weights(named.active, number)
    placed = jnp.zeros((queries.shape[0], rows.shape[0]), jnp.float32).at[:, places].set(dense)
    point = product(placed, rows) - queries
    length = jnp.sqrt(jnp.sum(point * point, axis=1, keepdims=True))
    direction = point / jnp.where(length > 0, length, 1)
    masked = jnp.where(named.active.used, named.active.index, jnp.int32(number))
    found = hull.screen(direction, masked, phase=FINE)
    return lanes._replace(
        active=named.active,
        direction=direction,
        floor=jnp.min(found.value, axis=1),
        steps=lanes.steps + live.astype(jnp.int32),
        code=jnp.where(live, ENDED, lanes.code).astype(jnp.int32),
    )


def _dense_weights(active: ActiveSet, number: int) -> Array:
    index = jnp.where(active.value > 0, active.index, jnp.int32(number))
    lane = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    nothing = 0 * active.value[:, :1]
    dense = jnp.broadcast_to(nothing, (index.shape[0], number))
    return dense.at[lane, index].add(active_set.weights(active), mode="drop")


def _until(hull: Hull, named: _Named, few: int, passes: Array) -> tuple[_Named, Array]:
    """Passes until at most so many lanes are live."""

    def going(carry: tuple[_Named, Array]) -> Array:
        return (jnp.sum(carry[0].live, dtype=jnp.int32) > few) & (carry[1] < _MOST_PASSES)

    def step(carry: tuple[_Named, Array]) -> tuple[_Named, Array]:
        return _step(hull, carry[0]), carry[1] + 1

    return lax.while_loop(going, step, (named, passes))


def _step(hull: Hull, named: _Named) -> _Named:
    active, live, against, size, constant = named
    number, dim = hull.vertices.shape
    lane = jnp.arange(against.shape[0], dtype=jnp.int32)[:, None]
    classes = min(_CANDIDATES, number)
    count = min(classes, active.index.shape[1])
    length = -(-number // classes)
    position = jnp.arange(classes * length, dtype=jnp.int32).reshape(1, classes, length)
    noise = _NOISE * (1 + jnp.sqrt(size))
    started = jnp.sum(active.value, axis=1) > 0
    dense = _dense_weights(active, number)
    # <v, x - q> of all vertices, <x, x - q> and |x - q|^2.
    score = -against + lax.cond(
        jnp.any(started), lambda: product(dense, hull.gram), lambda: 0 * dense
    )
    level = jnp.sum(dense * score, axis=1)
    square = jnp.maximum(level - jnp.sum(dense * against, axis=1) + size, 0)
    # What the pass cannot tell from the least joins the slots, so that it is scored exactly.
    band = noise + 4 * (dim + 4) * _U32 * jnp.sqrt(square)
    mine = jnp.take_along_axis(score, active.index, axis=1)
    near = mine < (level + 2 * band)[:, None]
    keep = active.basic | (active.value > 0) | (active.used & near)
    held = jnp.where(keep, active.index, jnp.int32(number))
    free = score.at[lane, held].set(jnp.inf, mode="drop")
    padding = ((0, 0), (0, classes * length - number))
    by_class = jnp.pad(free, padding, constant_values=jnp.inf).reshape(-1, classes, length)
    least = jnp.min(by_class, axis=2)
    found = jnp.where(by_class == least[:, :, None], position, jnp.int32(number - 1))
    found = jnp.min(found, axis=2)
    violation = level[:, None] - least
    over = jnp.max(violation, axis=1) <= noise
    threshold = jnp.where(over, -band, noise)
    wanted = jnp.where(started[:, None], violation > threshold[:, None], True)
    candidate, slot, _ = active_set.assign_slots(
        found, violation, wanted & (least < jnp.inf) & live[:, None], keep, count
    )
    total = (square + constant)[:, None]
    weights = active_set.weights(active)
    scaled = active._replace(used=keep, value=jnp.where(started[:, None], weights / total, 0))
    placed = active_set.place(scaled, slot, candidate, active.rows[:, :count])
    mine = jnp.take_along_axis(score, placed.index, axis=1)
    residual = jnp.where(started[:, None], (level[:, None] - mine) / total, 1)
    gram = (
        hull.gram[placed.index[:, :, None], candidate[:, None, :]]
        - jnp.take_along_axis(against, placed.index, axis=1)[:, :, None]
        - jnp.take_along_axis(against, candidate, axis=1)[:, None, :]
        + (size + constant)[:, None, None]
    )
    filled, trial = active_set.insert(placed, slot, gram, residual)
    floor = jnp.where(started, noise / total[:, 0], 0)
    solved, sweeps = active_set.solve(filled, trial, live, constant, floor, _MOST_SWEEPS)
    admitted = jnp.any(slot < keep.shape[1], axis=1)
    return named._replace(active=solved, live=live & (admitted | (sweeps > 0)))
