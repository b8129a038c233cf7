"""Regions of feature space whose class is certain, from given features and a linear head.

The cell of a class is convex, so three kinds of sets are certain to lie in it:

- the *ball* around a feature up to its nearest boundary (`boundary_distance`),
- the *hull* of features of the class: its margin to class j is the least one of its vertices,
- the *joined* region, the hull of all these balls, `{sum_i w_i v_i + x : |x| <= sum_i w_i r_i}`.

A query is inside the joined region if weights satisfy `|q - sum_i w_i v_i| <= sum_i w_i r_i`, and
outside if some direction g of length one has `<v_i - q, g> > r_i` for every ball; both are checked
with rounding included. The regions of guaranteed class are those of arXiv:2202.04052.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hullgeo import _check, _numerics, active_set, enclosure, min_norm, planes
from hullgeo.features import LinearHead
from hullgeo.head import boundary_distance
from hullgeo.min_norm import Named, Nearest
from hullgeo.planes import UNIT
from hullgeo.result import HullGuarantee, Membership, RegionMembership, Status

_BALLS = 6  # balls named in a pass
_LANES = 64  # queries searched together


def hull_guarantee(
    vertices: Float[Array | np.ndarray, "vertices dim"],
    labels: Int[Array | np.ndarray, " vertices"],
    head: LinearHead,
) -> HullGuarantee:
    """Margin and distance from the hull of each class' features to each boundary.

    A logit difference is affine, so that its minimum over a hull is attained at a vertex: exact but
    for rounding, which is subtracted.

    Args:
      vertices: features, one a row.
      labels: the class of each; for hulls that are certain, the class that the head gives it.
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.

    Returns:
      a `HullGuarantee`. A class without vertices has status `INFEASIBLE`, one with a vertex that is
      not finite `NONFINITE`.

    Raises:
      ValueError: shapes or types that do not fit, labels that are no class, a head that is not
        finite.
    """
    planes.check_head(head)
    planes.check_features("vertices", vertices, head)
    _check.shape("vertices", vertices, (None, head.kernel.shape[0]), "(vertices, dim)")
    num_classes = head.kernel.shape[1]
    _check_labels(labels, vertices.shape[0], num_classes)
    with _numerics.float64():
        labels = jnp.asarray(labels).astype(jnp.int32)
        return _hull_guarantee(jnp.asarray(vertices), labels, head.kernel, head.bias)


def _check_labels(labels: Any, count: int, num_classes: int) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        _check.fail("labels.dtype", str(labels.dtype), "to be an integer type")
    _check.shape("labels", labels, (count,), f"({count},), one a vertex")
    if _check.is_concrete(labels):
        low, high = int(np.min(labels)), int(np.max(labels))
        if low < 0 or high >= num_classes:
            _check.fail("labels", low if low < 0 else high, f"to lie in [0, {num_classes - 1}]")


@jax.jit
def _hull_guarantee(vertices, labels, kernel, bias) -> HullGuarantee:
    dtype = vertices.dtype
    wide, kernel, bias = (jnp.asarray(x, jnp.float64) for x in (vertices, kernel, bias))
    dim, num_classes = kernel.shape
    logits = _numerics.product(wide, kernel) + bias[None, :]
    size = _numerics.product(jnp.abs(wide), jnp.abs(kernel)) + jnp.abs(bias)[None, :]
    error = 4 * (dim + 2) * UNIT * size
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    own_error = jnp.take_along_axis(error, labels[:, None], axis=1)
    # Between equal columns the biases alone decide, exactly.
    lengths = planes.normal_lengths(kernel)
    equal = lengths == 0
    apart = bias[:, None] - bias[None, :]
    proved = jnp.where(equal[labels], apart[labels], own - logits - own_error - error)
    same = jnp.arange(num_classes, dtype=jnp.int32)[None, :] == labels[:, None]
    finite = jnp.all(jnp.isfinite(proved), axis=1)
    proved = jnp.where(same, jnp.inf, jnp.where(finite[:, None], proved, -jnp.inf))
    margin = jnp.full((num_classes, num_classes), jnp.inf).at[labels].min(proved)
    row = jnp.arange(labels.shape[0], dtype=jnp.int32)[:, None]
    last = jnp.full((num_classes, num_classes), labels.shape[0] - 1, jnp.int32)
    vertex = last.at[labels].min(jnp.where(proved == margin[labels], row, last[0, 0]))
    count = jnp.zeros(num_classes, jnp.int32).at[labels].add(1)
    broken = jnp.zeros(num_classes, jnp.int32).at[labels].max((~finite).astype(jnp.int32)) > 0
    reach = jnp.where(margin > 0, margin / jnp.where(equal, 1.0, lengths), 0.0)
    reach = jnp.where(equal & (margin > 0), jnp.inf, reach * (1 - 2 * (dim + 4) * UNIT))
    margin = jnp.where(broken[:, None], jnp.nan, margin)
    reach = jnp.where(broken[:, None], jnp.nan, reach)
    status = jnp.where(count == 0, jnp.int32(Status.INFEASIBLE), jnp.int32(Status.CONVERGED))
    return HullGuarantee(
        margin=_numerics.round_down(margin, dtype),
        distance=_numerics.round_down(reach, dtype),
        vertex=vertex,
        certain=jnp.all(margin > 0, axis=1) & (count > 0),
        num_vertices=count,
        status=jnp.where(broken, jnp.int32(Status.NONFINITE), status),
    )


def region_membership(
    queries: Float[Array | np.ndarray, "*batch dim"],
    features: Float[Array | np.ndarray, "features dim"],
    head: LinearHead,
    *,
    rtol: float = 1e-2,
    max_steps: int = 200,
) -> RegionMembership:
    """Whether queries lie in the regions of certain class that given features span.

    Guarantee: `INSIDE` and `OUTSIDE` are proved, rounding included; a query `INSIDE` a region is
    certain to be classified as its `label`. Host side: class by class.

    Args:
      queries: inputs of the head, any leading batch.
      features: the features (of training images, say) that span the regions; each counts for the
        class that the head gives it.
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.
      rtol: the distance to the joined region is bracketed until (distance^2 -
        distance_lower_bound^2) <= rtol distance^2; inside and outside are decided long before.
      max_steps: limit of passes over the features of a class for each query.

    Returns:
      a `RegionMembership`; its `coverage` is the share of the queries inside each kind of region.

    Raises:
      ValueError: shapes, types or options that do not fit, features or a head that are not finite.
    """
    planes.check_head(head)
    planes.check_features("queries", queries, head)
    planes.check_features("features", features, head)
    _check.shape("features", features, (None, head.kernel.shape[0]), "(features, dim)")
    _check.all_finite("features", features)
    _check.nonnegative("rtol", rtol)
    _check.at_least("max_steps", max_steps, 1)
    batch, dtype = queries.shape[:-1], np.dtype(queries.dtype)
    flat = np.asarray(queries).reshape(-1, queries.shape[-1])
    lead, held = boundary_distance(flat, head), boundary_distance(features, head)
    label, owner = np.asarray(lead.label), np.asarray(held.label)
    finite = np.asarray(lead.status) == Status.CONVERGED
    radius = np.asarray(held.distance)
    # Features that tie up to rounding are certain of no class: they span nothing.
    members = [np.flatnonzero((owner == one) & (radius > 0)) for one in range(head.kernel.shape[1])]
    size = max(map(len, members))
    ball, hull, joined = np.full((3, len(flat)), Membership.UNDECIDED, np.int32)
    status = np.full(len(flat), Status.CONVERGED, np.int32)
    verdicts = _Verdicts(
        ball, hull, joined, np.full(len(flat), np.inf), np.zeros(len(flat)), status
    )
    for one in np.unique(label[finite]):
        rows, mine = np.flatnonzero(finite & (label == one)), members[one]
        if len(mine):
            # Copies bring all classes to one size, which is compiled once.
            mine = mine[np.arange(size) * len(mine) // size]
            spanning = np.asarray(features)[mine], radius[mine]
            _settle(verdicts, rows, flat[rows], *spanning, rtol, max_steps)
        else:
            verdicts.nothing(rows)
    verdicts.distance[~finite] = verdicts.lower[~finite] = np.nan
    verdicts.status[~finite] = Status.NONFINITE
    with _numerics.float64():
        answer = RegionMembership(
            label=jnp.asarray(label),
            ball=jnp.asarray(verdicts.ball),
            hull=jnp.asarray(verdicts.hull),
            joined=jnp.asarray(verdicts.joined),
            distance=_numerics.round_up(jnp.asarray(verdicts.distance), dtype),
            distance_lower_bound=_numerics.round_down(jnp.asarray(verdicts.lower), dtype),
            status=jnp.asarray(verdicts.status),
        )
        return jax.tree.map(lambda array: array.reshape(batch), answer)


class _Balls(NamedTuple):
    """Balls of one class."""

    origin: Float[Array, " dim"]  # near their centres
    center: Float[Array, "balls dim"]
    radius: Float[Array, " balls"]


class _Verdicts(NamedTuple):
    """Arrays that are filled in place, one entry a query."""

    ball: np.ndarray
    hull: np.ndarray
    joined: np.ndarray
    distance: np.ndarray
    lower: np.ndarray
    status: np.ndarray

    def nothing(self, rows: np.ndarray) -> None:
        """There is no region of the class."""
        for verdict in (self.ball, self.hull, self.joined):
            verdict[rows] = Membership.OUTSIDE
        self.lower[rows] = np.inf
        self.status[rows] = Status.INFEASIBLE


def _settle(
    verdicts: _Verdicts, rows: Any, queries: Any, features: Any, radius: Any,
    rtol: float, max_steps: int,
) -> None:  # fmt: skip
    """All queries of one class against the features of that class."""
    with _numerics.float64():
        origin = jnp.asarray(features.astype(np.float64).mean(axis=0))
        centers = jnp.asarray(features.astype(np.float64))
        # A class without a rival has balls of any size; these reach far beyond all features.
        most = 2.0**20 * (1 + 2 * jnp.max(jnp.abs(centers)))
        finite = jnp.minimum(jnp.asarray(radius.astype(np.float64)), most)
        steps = jnp.asarray(max_steps, jnp.int32)
        for first in range(0, len(rows), _LANES):
            block = np.resize(np.arange(first, min(first + _LANES, len(rows))), _LANES)
            wide, at = jnp.asarray(queries[block].astype(np.float64)), rows[block]
            # The hull of the features is that of balls without size; its verdict is all we ask.
            points = _Balls(origin, centers, 0.0 * finite)
            loose, tolerance = (jnp.asarray(value, jnp.float64) for value in (jnp.inf, rtol))
            _, hull, *_, failure = _in_balls(wide, wide[:, 0] < -jnp.inf, points, loose, steps)
            known = hull == Membership.INSIDE
            ball, joined, upper, lower, status = _in_balls(
                wide, known, _Balls(origin, centers, finite), tolerance, steps
            )
            status = jnp.where(
                (hull == Membership.UNDECIDED) & (status == Status.CONVERGED), failure, status
            )
            for kept, new in zip(verdicts, (ball, hull, joined, upper, lower, status), strict=True):
                kept[at] = np.asarray(new)


@jax.jit
def _in_balls(queries, known, balls: _Balls, rtol, max_steps):
    """Verdicts on the balls and on their hull, for queries of one class.

    Lanes that are `known` to lie inside are not searched.
    """
    around, radius = balls.center - balls.origin[None, :], balls.radius
    dim = around.shape[1]
    shifted = queries - balls.origin[None, :]
    size = jnp.max(_numerics.norm(around)) + _numerics.norm(shifted)
    reach = size + jnp.max(radius)
    rounding = 8 * (dim + 8) * UNIT * reach

    # Distances to all centres by one product, the best one once more by itself.
    square = jnp.sum(shifted**2, axis=1)[:, None] + jnp.sum(around**2, axis=1)[None, :]
    square = square - 2 * _numerics.product(shifted, around.T)
    wrong = 8 * (dim + 8) * UNIT * size * size
    excess = jnp.sqrt(jnp.maximum(square, 0.0)) - radius[None, :]
    nearest = planes.first(excess == jnp.min(excess, axis=1, keepdims=True))
    exact = _numerics.norm(shifted - around[nearest]) + rounding - radius[nearest]
    least = jnp.sqrt(jnp.maximum(square - wrong[:, None], 0.0)) - radius[None, :]
    outside = jnp.min(least, axis=1) > rounding
    ball = jnp.where(outside, jnp.int32(Membership.OUTSIDE), jnp.int32(Membership.UNDECIDED))
    ball = jnp.where(exact < 0, jnp.int32(Membership.INSIDE), ball)

    def depth(nearest: Nearest) -> Array:
        """How deep inside the joined region the weights put the query; positive proves it."""
        centers = around[nearest.tags[:, :, 0]] - shifted[:, None, :]
        off = _numerics.norm(active_set.combine(nearest.weights, centers))
        spent = jnp.sum(nearest.weights * radius[nearest.tags[:, :, 0]], axis=1)
        return spent - off - rounding - 4 * nearest.weights.shape[1] * UNIT * reach

    def upper(nearest: Nearest) -> Array:
        length = _numerics.norm(active_set.combine(nearest.weights, nearest.points))
        return length + rounding + 4 * nearest.weights.shape[1] * UNIT * reach

    def oracle(direction) -> Named:
        along = _numerics.product(direction, around.T) - radius[None, :]
        chunk = -(-along.shape[1] // _BALLS)
        padded = jnp.pad(
            along, ((0, 0), (0, chunk * _BALLS - along.shape[1])), constant_values=jnp.inf
        ).reshape(along.shape[0], _BALLS, chunk)
        low = jnp.min(padded, axis=2)
        index = planes.first(padded == low[:, :, None])
        index += chunk * jnp.arange(_BALLS, dtype=jnp.int32)[None, :]
        index = jnp.minimum(index, along.shape[1] - 1)
        best = planes.first(low == jnp.min(low, axis=1, keepdims=True))[:, None]
        index = jnp.concatenate([jnp.take_along_axis(index, best, axis=1), index], axis=1)
        value = jnp.min(low, axis=1) - jnp.sum(direction * shifted, axis=1) - rounding
        ends = around[index] - shifted[:, None, :]
        ends -= radius[index][:, :, None] * direction[:, None, :]
        least = value * jnp.where(value > 0, 1 - 4 * (dim + 4) * UNIT, 1.0)
        return Named(ends, index[:, :, None], least)

    settled = known | (exact < 0)

    def stop(nearest: Nearest) -> Array:
        top, low = upper(nearest), nearest.lower
        narrow = (top - low) * (top + low) <= rtol * top * top
        return settled | (depth(nearest) > 0) | (narrow & (low > 0))

    away = shifted - around[nearest]
    length = _numerics.norm(away)
    start = oracle(-away / jnp.where(length > 0, length, 1.0)[:, None])
    found = min_norm.search(
        oracle, start, stop, slots=dim + 2 + start.points.shape[1], size=reach, max_steps=max_steps
    )
    inside = settled | (depth(found) > 0) | _enclosed(queries, balls.center, found)
    apart = (found.lower > 0) & ~inside
    joined = jnp.where(apart, jnp.int32(Membership.OUTSIDE), jnp.int32(Membership.UNDECIDED))
    joined = jnp.where(inside, jnp.int32(Membership.INSIDE), joined)
    limit = jnp.where(
        found.num_steps >= max_steps,
        jnp.int32(Status.STEP_LIMIT),
        jnp.int32(Status.PRECISION_LIMIT),
    )
    decided = (ball != Membership.UNDECIDED) & (joined != Membership.UNDECIDED)
    status = jnp.where(decided, jnp.int32(Status.CONVERGED), limit)
    lower = jnp.where(inside, 0.0, found.lower)
    return ball, joined, jnp.where(inside, 0.0, upper(found)), lower, status


def _enclosed(queries: Array, centers: Array, found: Nearest) -> Array:
    """Whether the simplex of the centres in use is proved to hold a ball around each query."""
    rows = centers[found.tags[:, :, 0]] - queries[:, None, :]
    weights = found.weights
    length = _numerics.norm(active_set.combine(weights, rows))
    error = 2 * (rows.shape[1] + rows.shape[2] + 8) * UNIT
    error = error * jnp.sum(weights * _numerics.norm(rows), axis=1)
    level = jnp.all(centers == centers[:1], axis=0)[None, :] & (queries == centers[:1])
    return jax.vmap(enclosure.interior_radius)(rows, weights, level, length, error) > 0
