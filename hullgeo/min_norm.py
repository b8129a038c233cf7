"""The point nearest to the origin of a convex set that is known by its extreme points alone.

    minimise |x| over x in C,   C given by   g -> a point of C minimising <u, g>  (and a bound).

Fully-corrective Frank-Wolfe in float64, a few points a pass, the problem on the points in hand
solved exactly (Wolfe 1976, `active_set.py`). It serves sets whose extreme points are too many to
list: differences of two hulls, hulls of balls. Every pass yields the lower bound
`min_C <u, g> / |g|`, which the oracle proves, rounding included.

Lanes are independent problems of one shape; an oracle is a function of directions `(lanes, dim)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _numerics, active_set

_SWEEPS = 4  # moves of the inner problem per slot and pass
_STALL = 1 - 2.0**-40  # a pass that shortens |x|^2 by less makes no progress
_TINY = 2.0**-44  # |x| relative to the set's size below which a direction means nothing


class Named(NamedTuple):
    """What an oracle says about directions g of length one.

    Attributes:
      points: points of the set, the first of them the minimiser, `(lanes, new, dim)`.
      tags: whatever identifies them, `(lanes, new, tag)`.
      least: at most `min <u, g>` over the set, `(lanes,)`.
    """

    points: Float[Array, "lanes new dim"]
    tags: Int[Array, "lanes new tag"]
    least: Float[Array, " lanes"]


class Nearest(NamedTuple):
    """Where the search ended; weights belong to slots.

    Attributes:
      points: points in hand, `(lanes, slots, dim)`.
      tags: their tags.
      weights: nonnegative, summing to one; 0 for slots without use.
      lower: proved lower bound of the distance.
      direction: g of length one that proved it.
      gap: computed Frank-Wolfe gap of the weights.
      num_steps: passes.
      done: whether `stop` held.
    """

    points: Float[Array, "lanes slots dim"]
    tags: Int[Array, "lanes slots tag"]
    weights: Float[Array, "lanes slots"]
    lower: Float[Array, " lanes"]
    direction: Float[Array, "lanes dim"]
    gap: Float[Array, " lanes"]
    num_steps: Int[Array, " lanes"]
    done: Bool[Array, " lanes"]


class _State(NamedTuple):
    nearest: Nearest
    square: Float[Array, " lanes"]
    going: Bool[Array, " lanes"]


def search(
    oracle: Callable[[Float[Array, "lanes dim"]], Named],
    start: Named,
    stop: Callable[[Nearest], Bool[Array, " lanes"]],
    *,
    slots: int,
    size: Float[Array, " lanes"],
    max_steps: Any,
) -> Nearest:
    """Run all lanes to the end; trace it inside a float64 island.

    Args:
      oracle: the set.
      start: any points of the set to begin with; their bound is not used.
      stop: whether a lane has reached what is wanted, asked after every pass.
      slots: points in hand at most; at least `dim + 1` plus those named in a pass.
      size: a bound of the norms of the set's points, which scales the problem.
      max_steps: limit of passes.
    """
    scale = jnp.where(size > 0, size, 1.0)
    lanes, new, dim = start.points.shape
    zero = 0.0 * start.points[:, :1, :]
    points = jnp.broadcast_to(zero, (lanes, slots, dim)).at[:, :new].set(start.points)
    tags = jnp.broadcast_to(0 * start.tags[:, :1], (lanes, slots, start.tags.shape[2]))
    tags = tags.at[:, :new].set(start.tags)
    taken = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32) < new, (lanes, slots))
    nothing = 0.0 * size
    nearest = Nearest(
        points=points,
        tags=tags,
        weights=_solve(points, taken, scale),
        lower=nothing,
        direction=zero[:, 0],
        gap=nothing + jnp.inf,
        num_steps=nothing.astype(jnp.int32),
        done=nothing > 0,
    )
    state = _State(nearest, nothing + jnp.inf, nothing == 0)

    def step(state: _State) -> _State:
        return _pass(oracle, stop, scale, state, max_steps)

    return lax.while_loop(lambda state: jnp.any(state.going), step, state).nearest


def _pass(oracle: Any, stop: Any, scale: Any, state: _State, max_steps: Any) -> _State:
    old = state.nearest
    point = active_set.combine(old.weights, old.points)
    length = _numerics.norm(point)
    direction = point / jnp.where(length > 0, length, 1.0)[:, None]
    named = oracle(direction)
    better = named.least > old.lower
    seen = old._replace(
        lower=jnp.maximum(old.lower, named.least),
        direction=jnp.where(better[:, None], direction, old.direction),
        gap=jnp.maximum(length * (length - named.least), 0.0),
        num_steps=old.num_steps + 1,
    )
    seen = seen._replace(done=stop(seen))
    square = length * length
    stuck = (square > _STALL * state.square) | (length <= _TINY * scale)
    going = state.going & ~seen.done & ~stuck & (seen.num_steps < max_steps)
    grown, place = _admit(seen, named)
    weights = _solve(grown.points, grown.weights >= 0, scale)
    # Where points in hand are nearly dependent, as on a curved set, the solution may be poor: then
    # the classic step towards the point just named is taken.
    plain = _toward(grown, place, point, named.points[:, 0])
    solved, stepped = (
        _numerics.norm(active_set.combine(any_weights, grown.points))
        for any_weights in (weights, plain)
    )
    moved = grown._replace(weights=jnp.where((solved <= stepped)[:, None], weights, plain))

    def choose(new: Array, kept: Array, where: Array) -> Array:
        return jnp.where(where.reshape(-1, *[1] * (new.ndim - 1)), new, kept)

    nearest = jax.tree.map(lambda new, kept: choose(new, kept, going), moved, seen)
    nearest = jax.tree.map(lambda new, kept: choose(new, kept, state.going), nearest, old)
    return _State(nearest, jnp.where(state.going, square, state.square), going)


def _admit(nearest: Nearest, named: Named) -> tuple[Nearest, Int[Array, "lanes new"]]:
    """New points in slots without weight, and which; slots that hold nothing get a weight of -1."""
    lanes, slots = nearest.weights.shape
    new = named.points.shape[1]
    used = nearest.weights > 0
    order = jnp.cumsum((~used).astype(jnp.int32), axis=1, dtype=jnp.int32) - 1
    order = jnp.where(used, jnp.int32(new), order)
    lane = jnp.arange(lanes, dtype=jnp.int32)[:, None]
    place = jnp.full((lanes, new), slots, jnp.int32)
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), used.shape)
    place = place.at[lane, order].set(slot, mode="drop")
    weights = jnp.where(used, nearest.weights, -1.0)
    grown = nearest._replace(
        points=nearest.points.at[lane, place].set(named.points, mode="drop"),
        tags=nearest.tags.at[lane, place].set(named.tags, mode="drop"),
        weights=weights.at[lane, place].set(0.0, mode="drop"),
    )
    return grown, place


def _toward(grown: Nearest, place: Array, point: Array, new: Array) -> Float[Array, "lanes slots"]:
    """Weights of the shortest point between the present one and the new point in its slot."""
    way = point - new
    square = jnp.sum(way * way, axis=1)
    share = jnp.sum(point * way, axis=1) / jnp.where(square > 0, square, 1.0)
    has_slot = place[:, 0] < grown.weights.shape[1]
    share = jnp.where(has_slot, jnp.clip(share, 0.0, 1.0), 0.0)
    weights = jnp.maximum(grown.weights, 0.0) * (1 - share)[:, None]
    lane = jnp.arange(place.shape[0], dtype=jnp.int32)
    weights = weights.at[lane, place[:, 0]].add(share, mode="drop")
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _solve(points: Array, used: Array, scale: Array) -> Float[Array, "lanes slots"]:
    """Weights of the point of their hull nearest to the origin."""
    rows = points / scale[:, None, None]
    constant = 0.0 * scale + 2.0**-4
    index = jnp.zeros_like(used, jnp.int32)
    active = active_set.from_rows(index, used, rows, constant)
    start = jnp.where(used, 1.0, 0.0) + 0.0 * rows[:, :, 0]
    live = scale > 0
    solved, _ = active_set.solve(
        active, start, live, constant, 0.0 * scale + 2.0**-50, _SWEEPS * points.shape[1]
    )
    return active_set.weights(solved)
