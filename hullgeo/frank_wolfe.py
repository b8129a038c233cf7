"""Classic Frank-Wolfe variants: one state, one loop, a variant is its direction.

They minimise a smooth convex function over the convex hull of atoms that a linear minimisation
oracle names one at a time,

    min f(x)  over  x in conv(atoms),      gap(x) = max_v <grad f(x), x - v> >= f(x) - min f.

The iterate is a convex combination of an active set of atoms kept in slots, `x = weights @ atoms`.
With `v` the oracle's vertex, `a` the active atom of largest and `s` that of smallest product with
the gradient, a step moves the weights along

| variant            | direction                                                                 |
| ------------------ | ------------------------------------------------------------------------- |
| `vanilla`          | `v - x`                                                                   |
| `away`             | `v - x`, or `x - a` where that descends more steeply                      |
| `pairwise`         | `v - a`                                                                   |
| `blended_pairwise` | `s - a` where that descends at least as steeply as `v - x`, else `v - x`  |

by the exact step of a quadratic function, or by the short step of an L-smooth one. Sources:
S. Lacoste-Julien and M. Jaggi, "On the global linear convergence of Frank-Wolfe optimization
variants", NeurIPS 2015 (away, pairwise); K. Tsuji, K. Tanaka and S. Pokutta, "Pairwise conditional
gradients without swap steps and sparser kernel herding", ICML 2022 (blended pairwise).

An oracle takes a direction and returns the atom of smallest product with it; `hull_oracle` does so
for the rows of a matrix. Others are two lines:

>>> def simplex_oracle(direction):  # the probability simplex
...     best = jax.lax.argmin(direction, 0, jnp.int32)
...     return Atom(best, jax.nn.one_hot(best, direction.size, dtype=direction.dtype))
>>> def l1_ball_oracle(direction):  # {x: sum |x_i| <= 1}
...     best = jax.lax.argmax(jnp.abs(direction), 0, jnp.int32)
...     sign = -jnp.sign(direction[best])
...     point = sign * jax.nn.one_hot(best, direction.size, dtype=direction.dtype)
...     return Atom(jnp.where(sign < 0, best, best + direction.size), point)

Everything here is for a single problem and free of side effects: map it with `vmap`, stop it with
`minimize`, or drive `step` with `lax.scan` and record whatever is wanted:

>>> problem = Problem(lambda point: point - query, hull_oracle(vertices))
>>> state = init(problem, Atom(jnp.int32(0), vertices[0]), capacity=32)
>>> state, gaps = jax.lax.scan(lambda s, _: (step(problem, s, "pairwise"), s.gap), state, length=50)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _check, _numerics

VARIANTS = ("vanilla", "away", "pairwise", "blended_pairwise")


class Atom(NamedTuple):
    """One extreme point, as an oracle names it.

    Attributes:
      key: identity of the atom; the same key always means the same point.
      point: its coordinates.
    """

    key: Int[Array, ""]
    point: Float[Array, " dim"]


class Problem(NamedTuple):
    """A smooth convex function over the convex hull of an oracle's atoms.

    Attributes:
      gradient: `(dim,) -> (dim,)`, the gradient of the function.
      oracle: `(dim,) -> Atom`, an atom of smallest product with the direction.
      smoothness: a Lipschitz constant of the gradient, used by the short step; None takes the exact
        step, which is right for quadratic functions only and costs one more gradient.
    """

    gradient: Callable[[Array], Array]
    oracle: Callable[[Array], Atom]
    smoothness: float | Array | None = None


class State(NamedTuple):
    """An iterate, and what the oracle said about it.

    Attributes:
      point: the iterate, `weights @ atoms`.
      gradient: gradient there.
      vertex: the oracle's answer to that gradient.
      gap: Frank-Wolfe gap `<gradient, point - vertex>`.
      keys: identities of the atoms in the slots; a free slot has weight 0.
      atoms: coordinates of the atoms in the slots.
      weights: convex weights.
      num_steps: steps taken, one call of the oracle each.
      full: the vertex found no free slot; the state no longer changes.
      stalled: the gap has reached the rounding of its own computation.
    """

    point: Float[Array, " dim"]
    gradient: Float[Array, " dim"]
    vertex: Atom
    gap: Float[Array, ""]
    keys: Int[Array, " slots"]
    atoms: Float[Array, "slots dim"]
    weights: Float[Array, " slots"]
    num_steps: Int[Array, ""]
    full: Bool[Array, ""]
    stalled: Bool[Array, ""]


def hull_oracle(vertices: Float[Array, "vertices dim"]) -> Callable[[Array], Atom]:
    """The oracle of the convex hull of the rows of a matrix: a row minimum."""

    def oracle(direction: Float[Array, " dim"]) -> Atom:
        best = _numerics.argmin(_numerics.product(vertices, direction))
        return Atom(best, vertices[best])

    return oracle


def init(problem: Problem, start: Atom, *, capacity: int) -> State:
    """The state at an atom.

    Args:
      problem: function and oracle.
      start: the first iterate.
      capacity: number of slots, at least two; a step that needs more sets `full`.

    Returns:
      a state with the whole weight on `start`.

    Raises:
      ValueError: capacity below two.
    """
    _check.at_least("capacity", capacity, 2)
    first = jnp.arange(capacity, dtype=jnp.int32) == 0
    return _at(
        problem,
        keys=jnp.where(first, start.key, 0 * start.key),
        atoms=jnp.where(first[:, None], start.point[None], 0 * start.point[None]),
        weights=jnp.where(first, 1 + 0 * start.point[0], 0 * start.point[0]),
        num_steps=0 * start.key,
    )


def step(problem: Problem, state: State, variant: str) -> State:
    """One step of a variant; with an exact step the function never increases.

    Args:
      problem: the same function and oracle as at `init`.
      state: the current state.
      variant: one of `VARIANTS`.

    Returns:
      the next state; unchanged (but for `full`) where no slot is free for a new vertex.

    Raises:
      ValueError: unknown variant.
    """
    _check.one_of("variant", variant, VARIANTS)
    active = state.weights > 0
    known = active & (state.keys == state.vertex.key)
    slots = jnp.where(jnp.any(known), known, ~active)
    toward = slots & (jnp.cumsum(slots, dtype=jnp.int32) == 1)
    keys = jnp.where(toward, state.vertex.key, state.keys)
    atoms = jnp.where(toward[:, None], state.vertex.point[None], state.atoms)

    direction, longest = _direction(variant, state, toward)
    displacement = _numerics.product(direction, atoms)
    descent = -_dot(state.gradient, displacement)
    if problem.smoothness is None:
        change = problem.gradient(state.point + displacement) - state.gradient
        curvature = _dot(displacement, change)
    else:
        curvature = problem.smoothness * _dot(displacement, displacement)
    length = jnp.where(descent < curvature * longest, descent / curvature, longest)
    length = jnp.where(descent > 0, length, 0)
    weights = jnp.maximum(state.weights + length * direction, 0)
    drop = (length >= longest) & (direction < 0) & (state.weights <= -longest * direction)
    weights = jnp.where(drop, 0, weights)
    weights = weights / jnp.sum(weights)

    moved = _at(problem, keys, atoms, weights, state.num_steps + 1)
    full = ~jnp.any(slots)
    kept = jax.tree.map(lambda new, old: jnp.where(full, old, new), moved, state)
    return kept._replace(full=full)


def minimize(
    problem: Problem,
    state: State,
    *,
    variant: str,
    unfinished: Callable[[State], Array],
    max_steps: int | Array,
) -> State:
    """Step until `unfinished(state)` is false, the steps run out, or nothing more can be gained.

    Args:
      problem: function and oracle.
      state: where to start, from `init` or a former run.
      variant: one of `VARIANTS`.
      unfinished: the stopping rule; written so that NaN means finished, e.g. `gap > tolerance`.
      max_steps: limit of `state.num_steps`, traced.

    Returns:
      the first state that is finished, full, stalled, or at the limit.

    Raises:
      ValueError: unknown variant.
    """
    _check.one_of("variant", variant, VARIANTS)

    def keep_going(state):
        return unfinished(state) & (state.num_steps < max_steps) & ~state.full & ~state.stalled

    return lax.while_loop(keep_going, lambda state: step(problem, state, variant), state)


def _at(problem: Problem, keys: Array, atoms: Array, weights: Array, num_steps: Array) -> State:
    """Everything that follows from the active set, one gradient and one call of the oracle."""
    point = _numerics.product(weights, atoms)
    gradient = problem.gradient(point)
    vertex = problem.oracle(gradient)
    difference = point - vertex.point
    gap = _dot(gradient, difference)
    size = jnp.abs(gradient) + jnp.abs(point) + jnp.abs(vertex.point)
    noise = (
        4 * jnp.finfo(point.dtype).eps * jnp.sqrt(_dot(size, size) * _dot(difference, difference))
    )
    return State(
        point=point, gradient=gradient, vertex=vertex, gap=gap, keys=keys, atoms=atoms,
        weights=weights, num_steps=num_steps, full=num_steps < 0, stalled=gap <= noise,
    )  # fmt: skip


def _dot(left: Array, right: Array) -> Array:
    return jnp.vdot(left, right, precision=_numerics.HIGHEST)


def _direction(variant: str, state: State, toward: Array) -> tuple[Array, Array]:
    """Direction of a variant in the weights, and the longest step that keeps them nonnegative."""
    slots = jnp.arange(toward.size, dtype=jnp.int32)
    active = state.weights > 0
    score = _numerics.product(state.atoms, state.gradient)
    away = slots == _numerics.argmin(jnp.where(active, -score, jnp.inf))
    local = slots == _numerics.argmin(jnp.where(active, score, jnp.inf))

    def unit(mask):
        return mask.astype(state.weights.dtype)

    def weight(mask):
        return jnp.sum(jnp.where(mask, state.weights, 0))

    def value(mask):
        return jnp.sum(jnp.where(mask, score, 0))

    def choose(condition, one, other):
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)

    forward = unit(toward) - state.weights, 1 + 0 * state.gap
    if variant == "vanilla":
        return forward
    if variant == "away":
        whole = weight(away)
        back = state.weights - unit(away), whole / jnp.where(whole < 1, 1 - whole, 1)
        here = _dot(state.gradient, state.point)
        steeper = (value(away) - here > state.gap) & (whole < 1)
        return choose(steeper, back, forward)
    if variant == "pairwise":
        return unit(toward) - unit(away), weight(away)
    swap = unit(local) - unit(away), weight(away)
    return choose(value(away) - value(local) >= state.gap, swap, forward)
