"""Points at which several classes tie while no other exceeds them, inside a domain of features.

For a query q and a set S of classes, with r any member of S,

    minimise |x - q|  over x in the domain with
        z_j(x) = z_r(x)  for j in S  and  z_j(x) <= z_r(x)  for all other j ;

with one class in S this is the nearest point of its cell. The problem is solved through its dual
(`dual_newton.py`); the multipliers of the answer bound the distance from below. That an exact tie
exists near the point found, or none at all (Farkas' lemma, 1902), is proved by `box_proofs.py` and
`hull_dual.py`.
What neither proves is left undecided, as it has to be where a tie exists in exact arithmetic only,
such as three lines through one point.
"""

from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _check, _numerics, box_proofs, domain, dual_newton, planes
from hullgeo.domain import Box, Found, Options
from hullgeo.dual_newton import Conditions, Evaluation
from hullgeo.features import LinearHead
from hullgeo.hull_dual import nearest_in_hull
from hullgeo.oracle import Hull
from hullgeo.planes import UNIT
from hullgeo.result import BoundaryPoint, TieMap

_MAX_STEPS = 200
_MOST_MAPPED = 16


def tie_point(
    features: Float[Array | np.ndarray, "*batch dim"],
    head: LinearHead,
    classes: Any,
    *,
    lower: Any = None,
    upper: Any = None,
    hull: Float[Array | np.ndarray, "vertices dim"] | Hull | None = None,
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
) -> BoundaryPoint:
    """The nearest point of a domain at which given classes tie and no other class exceeds them.

    Guarantee: the distance from each feature to the points of the domain where all classes of the
    set have the largest logit lies in [`distance_lower_bound`, `distance`], rounding included.
    `INFEASIBLE` is proved. Where a tie holds in exact arithmetic only (more conditions than free
    coordinates), neither is proved: `point` is the best one found, `distance` is infinite and the
    status `PRECISION_LIMIT`.

    Args:
      features: inputs of the head, any leading batch.
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.
      classes: the indices of one set, or a boolean mask `(*sets, num_classes)` whose leading axes
        broadcast with the batch. A set of one class asks for the nearest point of its cell.
      lower: lower bounds of the features, a number or `(dim,)`; 0 after a ReLU.
      upper: upper bounds, likewise. `lower` and `upper` make the domain a box.
      hull: points `(vertices, dim)` whose convex hull is the domain, or a `Hull` from
        `prepare_hull`; not together with a box.
      rtol: the status is `CONVERGED` where (distance^2 - distance_lower_bound^2) / 2
        <= atol + rtol distance^2 / 2.
      atol: see `rtol`, squared units.

    Returns:
      a `BoundaryPoint`, its batch that of features and sets together. Of equal kernel columns only
      those of the highest bias can tie, and their common multiplier stands at the first.

    Raises:
      ValueError: shapes, types or options that do not fit, `lower > upper`, an empty set, a class
        that does not exist, a head or hull that is not finite.
    """
    planes.check_head(head)
    planes.check_features("features", features, head)
    dim, num_classes = head.kernel.shape
    domain.check(lower, upper, hull, dim)
    _check.nonnegative("rtol", rtol)
    _check.nonnegative("atol", atol)
    chosen = _class_mask(classes, num_classes)
    batch = np.broadcast_shapes(features.shape[:-1], chosen.shape[:-1])
    with _numerics.float64():
        features = jnp.broadcast_to(jnp.asarray(features), (*batch, dim))
        chosen = jnp.broadcast_to(jnp.asarray(chosen), (*batch, num_classes))
        options = domain.options(lower, upper, hull, dim, rtol, atol)
        if hull is None:
            return _tie_in_box(features, chosen, head.kernel, head.bias, options)
        queries, lead, posed = _pose_all(features, chosen, head.kernel, head.bias)
        found = nearest_in_hull(queries, posed.conditions, posed.contradiction, hull)
        return _answer_in_hull(features, chosen, lead, posed, found, options)


def tie_map(
    head: LinearHead,
    *,
    query: Float[Array | np.ndarray, " dim"] | None = None,
    lower: Any = None,
    upper: Any = None,
    hull: Float[Array | np.ndarray, "vertices dim"] | Hull | None = None,
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
) -> TieMap:
    """All sets of two and more classes: where each ties, or that it does not.

    Guarantee: that of `tie_point`, for `2^num_classes - num_classes - 1` sets in one call (1,013
    for ten classes).

    Args:
      head: the linear head, with at most 16 classes.
      query: distances are measured from here; by default from the origin.
      lower: lower bounds of the features, as in `tie_point`.
      upper: upper bounds, likewise.
      hull: points whose convex hull is the domain, likewise.
      rtol: as in `tie_point`.
      atol: as in `tie_point`.

    Returns:
      a `TieMap`.

    Raises:
      ValueError: as `tie_point`, and for more than 16 classes.
    """
    planes.check_head(head)
    dim, num_classes = head.kernel.shape
    if num_classes > _MOST_MAPPED:
        _check.fail(
            "head", f"a head with {num_classes} classes", f"to have at most {_MOST_MAPPED}",
            "Choose sets yourself and call tie_point.",
        )  # fmt: skip
    sizes = range(2, num_classes + 1)
    sets = [chosen for size in sizes for chosen in combinations(range(num_classes), size)]
    classes = np.zeros((len(sets), num_classes), bool)
    for row, chosen in enumerate(sets):
        classes[row, list(chosen)] = True
    start = np.zeros(dim, head.kernel.dtype) if query is None else query
    tie = tie_point(start, head, classes, lower=lower, upper=upper, hull=hull, rtol=rtol, atol=atol)
    size = jnp.asarray(classes.sum(axis=1, dtype=np.int32))
    return TieMap(jnp.asarray(classes), size, tie, tie.status)


def _class_mask(classes: Any, num_classes: int) -> Any:
    """A boolean mask `(*sets, num_classes)` from a mask or from the indices of one set."""
    if getattr(classes, "dtype", None) == np.dtype(bool):
        if classes.ndim < 1 or classes.shape[-1] != num_classes:
            _check.fail("classes.shape", classes.shape, f"to end in num_classes={num_classes}")
        if _check.is_concrete(classes) and not np.all(np.any(np.asarray(classes), axis=-1)):
            _check.fail("classes", "a set without a class", "to name at least one class a set")
        return classes
    indices = np.asarray(classes)
    integral = indices.size and np.issubdtype(indices.dtype, np.integer) and indices.ndim == 1
    if not integral or indices.min() < 0 or indices.max() >= num_classes:
        _check.fail(
            "classes", classes, f"to be indices in [0, {num_classes - 1}] of one set",
            "For several sets pass a boolean mask (*sets, num_classes).",
        )  # fmt: skip
    mask = np.zeros(num_classes, bool)
    mask[indices] = True
    return mask


class _Posed(NamedTuple):
    """One problem without redundant classes: of equal columns only the highest bias is kept."""

    conditions: Conditions
    lengths: Float[Array, " classes"]
    reference: Int[Array, ""]
    contradiction: Bool[Array, ""]


def _pose(chosen, kernel, bias, equal, hidden) -> _Posed:
    """Conditions against the first class of the set, scaled to columns of length one."""
    classes = jnp.arange(bias.shape[0], dtype=jnp.int32)
    keeper = planes.first(equal & ~hidden[None, :])  # of each class, the one that stands for it
    contradiction = jnp.any(chosen & (bias[keeper] > bias))
    tied = jnp.any((keeper[:, None] == classes[None, :]) & chosen[:, None], axis=0)
    reference = planes.first(tied)
    normals = kernel - kernel[:, reference][:, None]
    lengths = _numerics.norm(normals.T)
    used = ~hidden & (classes != reference)
    divisor = jnp.where(used & (lengths > 0), lengths, 1.0)
    columns = jnp.where(used[None, :], normals / divisor[None, :], 0.0)
    offsets = jnp.where(used, (bias - bias[reference]) / divisor, 0.0)
    return _Posed(Conditions(columns, offsets, tied, used), divisor, reference, contradiction)


def _evaluate(query, conditions: Conditions, box: Box, dual) -> Evaluation:
    """The Lagrangian's minimiser over the box, and what follows from it."""
    columns, offsets = conditions.columns, conditions.offsets
    num_rows = columns.shape[0]
    rounding = 2 * (num_rows + 6) * UNIT
    pull = _numerics.product(columns, dual)
    free = query + pull
    point = jnp.clip(free, box.lower, box.upper)
    values = _numerics.product(point, columns) + offsets
    slack = rounding * (_numerics.product(jnp.abs(point), jnp.abs(columns)) + jnp.abs(offsets))
    inside = (free > box.lower) & (free < box.upper)
    hessian = _numerics.product(columns.T, jnp.where(inside[:, None], columns, 0.0))
    step = point - query
    objective = jnp.sum(dual * values) - 0.5 * jnp.sum(step * step)
    unsure = rounding * _numerics.product(jnp.abs(columns), jnp.abs(dual))
    return Evaluation(
        point=point,
        values=jnp.where(conditions.used, values, 0.0),
        slack=jnp.where(conditions.used, slack, 0.0),
        hessian=hessian,
        objective=objective,
        impossible=box_proofs.most(pull, unsure, offsets, dual, 0.0, box) < 0,
    )


@jax.jit
def _pose_all(features, chosen, kernel, bias) -> tuple[Array, planes.Lead, _Posed]:
    """Every lane's problem at once, for the hull."""
    wide, kernel, bias = (jnp.asarray(x, jnp.float64) for x in (features, kernel, bias))
    wide, chosen = wide.reshape(-1, kernel.shape[0]), chosen.reshape(-1, kernel.shape[1])
    lead = planes.lead(wide, kernel, bias)
    equal, hidden = planes.equal_columns(kernel), planes.hidden(kernel, bias)
    posed = jax.vmap(lambda chosen: _pose(chosen, kernel, bias, equal, hidden))(chosen)
    return jnp.where(lead.finite[:, None], wide, 0.0), lead, posed


@jax.jit
def _answer_in_hull(features, chosen, lead, posed, found, options) -> BoundaryPoint:
    found = jax.vmap(_by_class)(posed, found)
    return _answer(found, chosen, lead, options, features)


@jax.jit
def _tie_in_box(features, chosen, kernel, bias, options) -> BoundaryPoint:
    wide, kernel, bias = (jnp.asarray(x, jnp.float64) for x in (features, kernel, bias))
    dim, num_classes = kernel.shape
    wide, sets = wide.reshape(-1, dim), chosen.reshape(-1, num_classes)
    lead = planes.lead(wide, kernel, bias)
    equal, hidden = planes.equal_columns(kernel), planes.hidden(kernel, bias)

    def solve(row):
        query, chosen = row
        posed = _pose(chosen, kernel, bias, equal, hidden)
        return _by_class(posed, _solve(query, posed, options.box))

    usable = jnp.where(lead.finite[:, None], wide, 0.0)
    chunk = max(1, min(256, 2**22 // (num_classes * (num_classes + dim))))
    found = planes.in_chunks(solve, (usable, sets), chunk)
    return _answer(found, chosen, lead, options, features)


def _solve(query, posed: _Posed, box: Box) -> Found:
    conditions = posed.conditions

    def evaluate(dual):
        return _evaluate(query, conditions, box, dual)

    def keep_going(search):
        return ~search.done & (search.num_steps < _MAX_STEPS)

    def step(search):
        return dual_newton.advance(conditions, search, evaluate(search.trial))

    first = evaluate(0.0 * conditions.offsets)
    first = first._replace(impossible=first.impossible | posed.contradiction)
    search = lax.while_loop(keep_going, step, dual_newton.start(conditions, first))
    dual, last = search.accepted, search.evaluation
    impossible = last.impossible | box_proofs.absence(conditions, box, dual)
    distance = box_proofs.existence(query, conditions, box, dual, last)
    lower_bound = _lower_bound(query, dual, last)
    residual = jnp.max(dual_newton.violation(conditions, dual, last))
    return Found(
        point=jnp.where(impossible, jnp.nan, last.point),
        multipliers=dual,
        distance=jnp.where(impossible, jnp.inf, distance),
        lower_bound=jnp.where(impossible, jnp.inf, jnp.minimum(lower_bound, distance)),
        residual=jnp.where(impossible, jnp.inf, residual),
    )


def _by_class(posed: _Posed, found: Found) -> Found:
    """Multipliers of the conditions as multipliers of the classes, which sum to zero."""
    scaled = found.multipliers / posed.lengths
    classes = jnp.arange(scaled.shape[0], dtype=jnp.int32)
    by_class = jnp.where(classes == posed.reference, -jnp.sum(scaled), scaled)
    return found._replace(multipliers=by_class)


def _lower_bound(query, dual, evaluation: Evaluation) -> Array:
    """Weak duality at `dual`, less every rounding error."""
    num_rows, num_terms = query.shape[0], dual.shape[0]
    step = evaluation.point - query
    half_square = 0.5 * jnp.sum(step * step)
    size = jnp.sum(jnp.abs(dual))
    error = jnp.sum(jnp.abs(dual) * 2 * evaluation.slack)
    error += half_square * (2 * (num_rows + 4) * UNIT)
    shift = 2 * (num_terms + 4) * UNIT * (_numerics.norm(query) + size)
    square = 2 * (-evaluation.objective - error) - shift * shift
    bound = jnp.sqrt(jnp.maximum(square, 0.0)) * (1 - 4 * UNIT)
    return jnp.where(jnp.isnan(bound), 0.0, bound)


def _answer(found: Found, chosen, lead, options: Options, features) -> BoundaryPoint:
    chosen = chosen.reshape(-1, chosen.shape[-1])
    classes = jnp.arange(chosen.shape[1], dtype=jnp.int32)[None, :]
    others = chosen & (classes != lead.label[:, None])
    rival = jnp.where(jnp.any(others, axis=1), planes.first(others), lead.label)
    return domain.boundary_point(found, rival, lead, options, features.dtype, features.shape[:-1])
