"""Linear conditions inside the convex hull of given points, through the dual of `dual_newton.py`.

    minimise |x - q|  over x in conv(V) with  a_j x + b_j  = 0 (or <= 0) .

The projection that the dual needs is that of `project_to_hull`; on the face that carries it,
projecting moves with the affine hull of the support, so that the dual's Hessian is `A' Q Q' A` with
an orthonormal basis Q of the support's differences. Lower bounds are weak duality with the proved
lower bound of the projection. That an exact solution exists near the answer is proved in the
weights of the support: they may move by residual / sigma, with sigma the least singular value of
the tight conditions on the support, as long as they stay positive.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _check, _numerics, dual_newton, planes
from hullgeo.domain import Found
from hullgeo.dual_newton import Conditions, Evaluation, Search
from hullgeo.hull import project_to_hull
from hullgeo.oracle import Hull
from hullgeo.planes import UNIT
from hullgeo.prepare import prepare_hull

_MAX_STEPS = 100
_BLOCK = 64  # lanes of a block outside jit
_RTOL = 1e-12  # of the projections: the engine's brackets end at rounding anyway
_REACH = 1e6  # longest pull A y, in radii of the hull: enough to prove that nothing qualifies
_SOLID = 1e-9  # weight below which a vertex does not count as part of the face
_MOVABLE = 1e-6  # weight from which a vertex may give or take some in a proof


class _State(NamedTuple):
    """A search together with the projection behind its accepted point."""

    search: Search
    support: Int[Array, "lanes slots"]
    weights: Float[Array, "lanes slots"]
    bound: Float[Array, " lanes"]


class _Hull(NamedTuple):
    """The hull as the engine wants it, with a ball around it."""

    prepared: Hull
    center: Float[Array, " dim"]
    radius: Float[Array, ""]

    def rows(self, index: Int[Array, " slots"]) -> Float[Array, "slots dim"]:
        """Vertices in float64."""
        return self.prepared.vertices[index].astype(jnp.float64)


def nearest_in_hull(
    queries: Float[Array, "lanes dim"],
    conditions: Conditions,
    contradiction: Bool[Array, " lanes"],
    vertices: Float[Array | np.ndarray, "vertices dim"] | Hull,
) -> Found:
    """Solve all lanes; call it inside a float64 island, with everything in float64.

    Args:
      queries: q.
      conditions: batched, columns `(lanes, dim, conditions)` of length one.
      contradiction: lanes known to have no solution.
      vertices: V, finite, or prepared by `prepare_hull`.
    """
    prepared = vertices if isinstance(vertices, Hull) else prepare_hull(vertices)
    hull = _surround(prepared)
    conditions = _inwards(conditions, hull)
    lanes = (queries, *conditions, contradiction, prepared.vertices)
    if all(_check.is_concrete(array) for array in lanes):
        return _solve_on_host(queries, conditions, contradiction, hull)
    state = lax.while_loop(
        lambda state: jnp.any(_unfinished(state)),
        lambda state: _advance(queries, conditions, hull, state),
        _begin(queries, conditions, contradiction, hull),
    )
    return _conclude(queries, conditions, state, hull)


def _solve_on_host(queries, conditions, contradiction, hull: _Hull) -> Found:
    """The same in blocks of one size, so that all is compiled once and finished lanes cost nothing.

    States are kept in NumPy between the blocks.
    """
    queries, conditions, contradiction = jax.tree.map(
        np.asarray, (queries, conditions, contradiction)
    )
    num_lanes = queries.shape[0]
    size = min(_BLOCK, 1 << (num_lanes - 1).bit_length())

    def in_blocks(function, rows, *lanes):
        """`function(*lanes)` of the given rows, block by block; the last one is padded."""
        parts = []
        for first in range(0, len(rows), size):
            taken = np.resize(rows[first : first + size], size)
            answer = function(*(_rows_of(part, taken) for part in lanes))
            parts.append(_rows_of(jax.tree.map(np.asarray, answer), slice(len(rows) - first)))
        return parts

    def begin(queries, conditions, contradiction):
        return _begin(queries, conditions, contradiction, hull)

    def advance(queries, conditions, state):
        return _advance(queries, conditions, hull, state)

    def conclude(queries, conditions, state):
        return _conclude(queries, conditions, state, hull)

    every = np.arange(num_lanes)
    state = _join(_same_slots(in_blocks(begin, every, queries, conditions, contradiction)))
    while len(rows := np.flatnonzero(_unfinished(state))):
        moved = in_blocks(advance, rows, queries, conditions, state)
        state, moved = _same_slots([state, _join(_same_slots(moved))])
        state = jax.tree.map(lambda old, new, rows=rows: _written(old, rows, new), state, moved)
    return _join(in_blocks(conclude, every, queries, conditions, state))


def _rows_of(tree, rows):
    return jax.tree.map(lambda array: array[rows], tree)


def _join(parts):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _written(old: np.ndarray, rows: np.ndarray, new: np.ndarray) -> np.ndarray:
    old = old.copy()
    old[rows] = new
    return old


@jax.jit
def _surround(prepared: Hull) -> _Hull:
    vertices = prepared.vertices.astype(jnp.float64)
    center = jnp.mean(vertices, axis=0)
    radius = jnp.max(_numerics.norm(vertices - center[None, :])) * (1 + 2.0**-40)
    return _Hull(prepared, center, radius)


def _unfinished(state: _State) -> Any:
    return ~state.search.done & (state.search.num_steps < _MAX_STEPS)


@jax.jit
def _inwards(conditions: Conditions, hull: _Hull) -> Conditions:
    """Inequalities tightened by a few roundings, so that their solutions provably qualify."""
    size = _numerics.norm(hull.center) + hull.radius + jnp.abs(conditions.offsets)
    extra = 32 * (hull.center.shape[0] + 6) * UNIT * size
    offsets = conditions.offsets + jnp.where(conditions.equal, 0.0, extra)
    return conditions._replace(offsets=offsets)


def _begin(queries, conditions, contradiction, hull: _Hull) -> _State:
    zero = 0.0 * conditions.offsets
    projection = project_to_hull(queries, hull.prepared, rtol=_RTOL)
    return _first_state(queries, conditions, contradiction, hull, zero, projection)


@jax.jit
def _first_state(queries, conditions, contradiction, hull, zero, projection) -> _State:
    evaluation, bound = _evaluate(queries, conditions, zero, hull, projection)
    evaluation = evaluation._replace(impossible=evaluation.impossible | contradiction)
    search = jax.vmap(dual_newton.start)(conditions, evaluation)
    return _State(search, projection.support, projection.weights, bound)


def _advance(queries, conditions, hull: _Hull, state: _State) -> _State:
    """One projection for every lane, and what follows from it."""
    trial, targets = _targets(queries, conditions, hull, state.search.trial)
    projection = project_to_hull(targets, hull.prepared, rtol=_RTOL)
    return _take_or_refuse(queries, conditions, hull, state, trial, projection)


@jax.jit
def _targets(queries, conditions, hull, trial):
    """Trial points whose pull is no longer than a proof of absence needs, and where they lead."""
    pull = jnp.einsum("ldc,lc->ld", conditions.columns, trial, precision=_numerics.HIGHEST)
    longest = _REACH * (hull.radius + _numerics.norm(queries - hull.center[None, :]))
    length = _numerics.norm(pull)
    factor = jnp.minimum(1.0, longest / jnp.where(length > 0, length, 1.0))[:, None]
    return trial * factor, queries + pull * factor


@jax.jit
def _take_or_refuse(queries, conditions, hull, state: _State, trial, projection) -> _State:
    evaluation, bound = _evaluate(queries, conditions, trial, hull, projection)
    before = state.search._replace(trial=trial)
    search = jax.vmap(dual_newton.advance)(conditions, before, evaluation)
    taken = jnp.all(search.accepted == trial, axis=1) & ~before.done
    best = jnp.maximum(state.bound, bound)
    old, new = _same_slots(
        [state, _State(search, projection.support, projection.weights, bound)], jnp
    )
    support = jnp.where(taken[:, None], new.support, old.support)
    weights = jnp.where(taken[:, None], new.weights, old.weights)
    return _State(search, support, weights, best)


def _same_slots(states: Sequence[_State], library: Any = np) -> list[_State]:
    """Supports padded to the same number of slots (a repeated vertex of weight 0)."""
    most = max(state.support.shape[1] for state in states)

    def widen(state):
        extra = ((0, 0), (0, most - state.support.shape[1]))
        return state._replace(
            support=library.pad(state.support, extra, mode="edge"),
            weights=library.pad(state.weights, extra),
        )

    return [widen(state) for state in states]


def _values(conditions: Conditions, point):
    values = _numerics.product(point, conditions.columns) + conditions.offsets
    return jnp.where(conditions.used, values, 0.0)


def _slack(conditions: Conditions, point, rounding):
    """Bound of the rounding of `_values`, `point` being known to within `rounding` itself."""
    size = _numerics.product(jnp.abs(point), jnp.abs(conditions.columns))
    return jnp.where(conditions.used, rounding * (size + jnp.abs(conditions.offsets)), 0.0)


def _face_basis(rows, weights):
    """Orthonormal rows that span the differences of the rows with weight."""
    solid = weights > _SOLID * jnp.max(weights)
    heaviest = rows[planes.first(weights == jnp.max(weights))]
    differences = jnp.where(solid[:, None], rows - heaviest[None, :], 0.0)
    _, values, basis = jnp.linalg.svd(differences, full_matrices=False)
    kept = values > 1e-11 * jnp.max(values)
    return jnp.where(kept[:, None], basis, 0.0)


@jax.jit
def _evaluate(queries, conditions: Conditions, dual, hull: _Hull, projection):
    """What the projections say about dual points: an `Evaluation` and its lower bound a lane."""

    def lane(query, conditions, dual, support, weights, target, distance):
        rounding = 2 * (query.shape[0] + weights.shape[0] + 6) * UNIT
        rows = hull.rows(support) - query[None, :]
        step = _numerics.product(weights, rows)
        point = query + step
        values = _values(conditions, point)
        slack = _slack(conditions, point, rounding)
        across = _numerics.product(_face_basis(rows, weights), conditions.columns)
        objective = jnp.sum(dual * values) - 0.5 * jnp.sum(step * step)
        # The same minimum by way of the projection's own lower bound.
        pull = target - query
        half, pulled = 0.5 * distance * distance, 0.5 * jnp.sum(pull * pull)
        at_query = jnp.sum(dual * _values(conditions, query))
        length, size = jnp.sum(jnp.abs(dual)), _numerics.norm(query)
        reach = hull.radius + _numerics.norm(query - hull.center)
        error = jnp.sum(jnp.abs(dual) * _slack(conditions, query, rounding))
        error += rounding * (half + pulled + (size + length) * (2 * size + reach))
        bound = half - pulled - at_query - error
        evaluation = Evaluation(
            point=point,
            values=values,
            slack=slack,
            hessian=_numerics.product(across.T, across),
            objective=objective,
            impossible=bound > 0.5 * reach * reach * (1 + 2.0**-40),
        )
        return evaluation, bound

    return jax.vmap(lane)(
        queries, conditions, dual, projection.support, projection.weights, projection.query,
        projection.distance_lower_bound,
    )  # fmt: skip


@jax.jit
def _conclude(queries, conditions: Conditions, state: _State, hull: _Hull) -> Found:
    def lane(query, conditions, search, support, weights, bound):
        dual, last = search.accepted, search.evaluation
        vertices = hull.rows(support)
        # Inequalities with a multiplier are met as equations, or else strictly.
        distance = jnp.minimum(
            _existence(query, conditions, conditions.equal | (dual < 0), vertices, weights),
            _existence(query, conditions, conditions.equal, vertices, weights),
        )
        lower_bound = jnp.sqrt(jnp.maximum(2 * bound, 0.0)) * (1 - 4 * UNIT)
        lower_bound = jnp.where(jnp.isnan(lower_bound), 0.0, lower_bound)
        residual = jnp.max(dual_newton.violation(conditions, dual, last))
        impossible = last.impossible
        return Found(
            point=jnp.where(impossible, jnp.nan, last.point),
            multipliers=dual,
            distance=jnp.where(impossible, jnp.inf, distance),
            lower_bound=jnp.where(impossible, jnp.inf, jnp.minimum(lower_bound, distance)),
            residual=jnp.where(impossible, jnp.inf, residual),
        )

    return jax.vmap(lane)(
        queries, conditions, state.search, state.support, state.weights, state.bound
    )


def _existence(query, conditions: Conditions, tight, vertices, weights):
    """Distance to a point of the hull proved to meet all conditions exactly, else infinity."""
    rounding = 2 * (query.shape[0] + weights.shape[0] + 6) * UNIT
    rows = vertices - query[None, :]
    solid = weights > _MOVABLE * jnp.max(weights)
    weights = weights / jnp.sum(weights)
    step = _numerics.product(weights, rows)
    point = query + step
    values, slack = _values(conditions, point), _slack(conditions, point, rounding)
    far = jnp.max(_numerics.norm(rows))
    scale = jnp.where(far > 0, far, 1.0)
    slack += jnp.where(conditions.used, rounding * far, 0.0)
    tight &= conditions.used
    # Unknown: changes of the weights on the support; they sum to zero and close what is tight.
    at_vertices = _numerics.product(vertices, conditions.columns) + conditions.offsets[None, :]
    matrix = jnp.where(solid[:, None] & tight[None, :], at_vertices / scale, 0.0)
    matrix = jnp.concatenate([matrix, jnp.where(solid, 1.0, 0.0)[:, None]], axis=1)
    rank = jnp.sum(tight).astype(jnp.int32) + 1
    least = dual_newton.singular_value(matrix, rank)
    residual = _numerics.norm(jnp.where(tight, (jnp.abs(values) + slack) / scale, 0.0))
    residual += rounding
    # Entries of the matrix are rounded as well.
    offset = jnp.max(jnp.abs(conditions.offsets), initial=0.0)
    least -= (
        rounding
        * (1 + (_numerics.norm(query) + far + offset) / scale)
        * jnp.sqrt(rank.astype(jnp.float64))
    )
    move = residual / jnp.where(least > 0, least, 0.0) * (1 + 64 * UNIT)
    spread = jnp.sqrt(jnp.sum(jnp.where(solid, jnp.sum(rows * rows, axis=1), 0.0)))
    others = jnp.where(tight | ~conditions.used, True, values + slack + move * spread <= 0)
    positive = move < jnp.min(jnp.where(solid, weights, jnp.inf))
    distance = _numerics.norm(step) + rounding * far + move * spread
    distance *= 1 + 2 * (query.shape[0] + 6) * UNIT
    return jnp.where(jnp.all(others) & positive, distance, jnp.inf)
