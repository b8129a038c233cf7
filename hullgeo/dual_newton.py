"""Projection onto linear conditions inside a convex set, through its dual, by semismooth Newton.

    minimise |x - q|^2 / 2  over x in D  with  g_j(x) = a_j x + b_j  = 0 (or <= 0),  |a_j| = 1 .

The dual has one variable per condition, `y_j` (`<= 0` for an inequality), and needs of D only its
projection P: the minimiser of the Lagrangian is `x(y) = P(q + A y)`, and

    f(y) = y g(x(y)) - |x(y) - q|^2 / 2

is convex with gradient `g(x(y))` and, where P is differentiable, Hessian `A' P' A`. A projected
Newton step with a Levenberg-Marquardt term is tried; the term shrinks where f falls as it should
and grows otherwise (projected Newton: Bertsekas, SIAM J. Control Optim. 20, 1982; the semismooth
dual of such projections: Li, Sun and Toh, arXiv:1607.05428, 2018). `-f(y)` bounds |x - q|^2 / 2
from below for every y, whatever became of the iteration.

One lane here is one problem; D enters through `Evaluation`, so that boxes and hulls share the loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _numerics

_LEAST = 1e-14  # Levenberg-Marquardt terms, relative to the unit columns
_GREATEST = 1e10
_SUFFICIENT = 1e-4


class Conditions(NamedTuple):
    """`a_j x + b_j = 0` where `equal`, `<= 0` otherwise; columns of length one (or zero)."""

    columns: Float[Array, "dim conditions"]
    offsets: Float[Array, " conditions"]
    equal: Bool[Array, " conditions"]
    used: Bool[Array, " conditions"]


class Evaluation(NamedTuple):
    """What the domain says about one dual point y.

    Attributes:
      point: `x(y)`.
      values: `g_j(x(y))`, 0 for conditions that are not used.
      slack: bound of the rounding of each value.
      hessian: `A' P' A`.
      objective: `f(y)`.
      impossible: whether y proves that no point of the domain meets the conditions.
    """

    point: Float[Array, " dim"]
    values: Float[Array, " conditions"]
    slack: Float[Array, " conditions"]
    hessian: Float[Array, "conditions conditions"]
    objective: Float[Array, ""]
    impossible: Bool[Array, ""]


class Search(NamedTuple):
    """Accepted dual point with its evaluation, and the point to be tried next."""

    accepted: Float[Array, " conditions"]
    evaluation: Evaluation
    trial: Float[Array, " conditions"]
    damping: Float[Array, ""]
    done: Bool[Array, ""]
    num_steps: Int[Array, ""]


def violation(
    conditions: Conditions, multipliers: Float[Array, " conditions"], evaluation: Evaluation
) -> Float[Array, " conditions"]:
    """How far each condition is from optimality, as a distance: ties, excess, complementarity."""
    tight = conditions.equal | (multipliers < 0)
    off = jnp.where(tight, jnp.abs(evaluation.values), jnp.maximum(evaluation.values, 0.0))
    return jnp.where(conditions.used, off, 0.0)


def start(conditions: Conditions, first: Evaluation) -> Search:
    """The search from y = 0, of which `first` is the evaluation."""
    zero = 0.0 * first.values
    search = Search(
        accepted=zero,
        evaluation=first,
        trial=zero,
        damping=0.0 * first.objective + _LEAST,
        done=first.impossible,
        num_steps=(0.0 * first.objective).astype(jnp.int32),
    )
    return _propose(conditions, search)


def advance(conditions: Conditions, search: Search, tried: Evaluation) -> Search:
    """Take or refuse the trial point, given its evaluation, and propose the next one."""
    old = search.evaluation
    step = search.trial - search.accepted
    expected = jnp.sum(old.values * step)  # negative: the slope along the projected step
    noise = 2.0**-48 * (jnp.abs(old.objective) + jnp.abs(tried.objective))
    noise += jnp.sum(jnp.abs(search.trial) * tried.slack)
    falls = tried.objective <= old.objective + _SUFFICIENT * jnp.minimum(expected, 0.0) + noise
    take = ~search.done & (falls | tried.impossible)
    frozen = search.done

    def choose(new, kept):
        return jnp.where(take, new, kept)

    smaller = jnp.maximum(search.damping * 1e-3, _LEAST)
    larger = jnp.maximum(search.damping * 1e2, 1e-10)
    damping = jnp.where(frozen, search.damping, jnp.where(take, smaller, larger))
    moved = Search(
        accepted=choose(search.trial, search.accepted),
        evaluation=jax.tree.map(choose, tried, old),
        trial=search.trial,
        damping=damping,
        done=search.done,
        num_steps=search.num_steps + jnp.where(frozen, 0, 1).astype(jnp.int32),
    )
    return _propose(conditions, moved)


def _propose(conditions: Conditions, search: Search) -> Search:
    """A damped Newton step on the conditions that are not held at their bound, projected."""
    evaluation, accepted = search.evaluation, search.accepted
    off = violation(conditions, accepted, evaluation)
    optimal = jnp.all(off <= 2 * evaluation.slack)
    held = ~conditions.equal & (accepted >= 0) & (evaluation.values <= 0)
    moving = conditions.used & ~held
    both = moving[:, None] & moving[None, :]
    matrix = jnp.where(both, evaluation.hessian, 0.0)
    diagonal = jnp.where(moving, search.damping, 1.0)
    matrix += diagonal[:, None] * jnp.eye(diagonal.shape[0], dtype=diagonal.dtype)
    right = jnp.where(moving, evaluation.values, 0.0)
    trial = accepted - _solve(matrix, right)
    trial = jnp.where(conditions.equal, trial, jnp.minimum(trial, 0.0))
    stuck = search.damping > _GREATEST
    done = search.done | optimal | stuck | evaluation.impossible
    return search._replace(trial=jnp.where(done, accepted, trial), done=done)


def _solve(matrix: Array, right: Array) -> Array:
    """Symmetric positive definite up to rounding; steepest descent where Cholesky fails."""
    factor = jnp.linalg.cholesky(matrix)
    solution = jax.scipy.linalg.cho_solve((factor, True), right)
    return jnp.where(jnp.all(jnp.isfinite(solution)), solution, right)


def singular_value(matrix: Float[Array, "rows columns"], rank: Int[Array, ""]) -> Float[Array, ""]:
    """A proved lower bound of the singular value number `rank` (from 1); infinite for rank 0."""
    num_rows, num_columns = matrix.shape
    gram = _numerics.product(matrix.T, matrix)
    values = jnp.linalg.eigvalsh(gram)
    size = jnp.sum(matrix * matrix)
    # Forming the Gram matrix and its eigenvalues: backward stable, bounded generously.
    error = 2.0**-52 * (num_rows + 20.0 * num_columns) * size
    index = jnp.clip(num_columns - rank, 0, num_columns - 1)
    square = jnp.where(rank <= num_columns, values[index] - error, 0.0)
    root = jnp.sqrt(jnp.maximum(square, 0.0)) * (1 - 2.0**-50)
    return jnp.where(rank == 0, jnp.inf, root)
