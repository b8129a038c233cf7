"""Supports from the Gram matrix, where there are no more vertices than dimensions.

With G = V V' and p = V q, the scores of all vertices at x = V' w are G w - p: a pass over n numbers
a vertex in place of d, which never touches a row. Rounding of G is of the order of u R^2: that
names the support and proves nothing, but one pass of the oracle in the direction found bounds the
vertices off it. What is left undecided goes on with rows, in `fully_corrective.py`.
"""

from typing import Any, TypeGuard

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
_MOST_PASSES = 64
_MOST_SWEEPS = 16


def serves(oracle: Any) -> TypeGuard[Hull]:
    """Whether these vertices have a Gram matrix."""
    return isinstance(oracle, Hull) and oracle.gram.shape[0] > 0


def name_supports(hull: Hull, lanes: Lanes) -> Lanes:
    """Supports for lanes made by `fully_corrective.start`, without rows, and one pass with them."""
    number, dim = hull.vertices.shape
    rows = hull.rows.reshape(-1, dim)
    queries = lanes.shifted.astype(jnp.float32)
    places = hull.place(jnp.arange(number, dtype=jnp.int32))
    against = product(queries, rows.T)[:, places]
    size = jnp.sum(queries * queries, axis=1)
    noise = _NOISE * (1 + jnp.sqrt(size))
    constant = lanes.constant.astype(jnp.float32)
    lane = jnp.arange(queries.shape[0], dtype=jnp.int32)[:, None]
    classes = min(_CANDIDATES, number)
    count = min(classes, lanes.active.index.shape[1])
    length = -(-number // classes)
    position = jnp.arange(classes * length, dtype=jnp.int32).reshape(1, classes, length)

    def dense_weights(active: ActiveSet) -> Array:
        index = jnp.where(active.value > 0, active.index, jnp.int32(number))
        return (0 * against).at[lane, index].add(active_set.weights(active), mode="drop")

    def going(carry: tuple[ActiveSet, Array, Array]) -> Array:
        _, live, passes = carry
        return jnp.any(live) & (passes < _MOST_PASSES)

    def step(carry: tuple[ActiveSet, Array, Array]) -> tuple[ActiveSet, Array, Array]:
        active, live, passes = carry
        started = jnp.sum(active.value, axis=1) > 0
        dense = dense_weights(active)
        # <v, x - q> of all vertices, <x, x - q> and |x - q|^2.
        score = product(dense, hull.gram) - against
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
        return solved, live & (admitted | (sweeps > 0)), passes + 1

    empty = lanes.active._replace(rows=lanes.active.rows[:, :, :0])
    live = lanes.code == ACTIVE
    active, _, _ = lax.while_loop(going, step, (empty, live, 0 * lanes.code[0]))
    placed = jnp.zeros((queries.shape[0], rows.shape[0]), jnp.float32)
    point = product(placed.at[:, places].set(dense_weights(active)), rows) - queries
    length_of_point = jnp.sqrt(jnp.sum(point * point, axis=1, keepdims=True))
    direction = point / jnp.where(length_of_point > 0, length_of_point, 1)
    masked = jnp.where(active.used, active.index, jnp.int32(number))
    found = hull.screen(direction, masked, phase=FINE)
    return lanes._replace(
        active=active,
        direction=direction,
        floor=jnp.min(found.value, axis=1),
        steps=lanes.steps + live.astype(jnp.int32),
        code=jnp.where(live, ENDED, lanes.code).astype(jnp.int32),
    )
