"""Exact geometry of a linear head: the distance to its boundaries, its classes along segments.

With logits `z = phi K + b` (kernel columns `k_j`), class c holds on the polyhedron
`P_c = {phi : z_c >= z_j for all j}`, and the plane between c and j lies at

    distance(phi, c | j) = (z_c - z_j) / |k_c - k_j| ,

so that the ball of radius `min_j` of it around a feature has one class: the formula for the margin
of a linear classifier (Elsayed et al., arXiv:1803.05598; exact here, since the head is linear).
Along a segment every logit is affine in the position t, and the class is the upper envelope of K
lines, which has at most K - 1 corners.

Both are computed in float64 whatever the input's type. Kernel columns are compared exactly: two
classes with the same column never change places, so only the bias decides between them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _check, _numerics, planes
from hullgeo.features import LinearHead
from hullgeo.result import BoundaryDistance, SegmentClasses, Status


def boundary_distance(
    features: Float[Array | np.ndarray, "*batch dim"], head: LinearHead
) -> BoundaryDistance:
    """Distance of features to the nearest decision boundary of a linear head, in closed form.

    Guarantee: the open ball of radius `distance` around a feature has one class. The closed form
    is evaluated in float64 and its worst rounding error is subtracted, so that `distance` is never
    above the true one, and below it by about 1e-15 `|feature| |k_c|/|k_c - k_j|` at most (plus
    half a unit in the last place of a narrower input type).

    Differentiable in features and head, as far as label and rival do not change.

    Args:
      features: inputs of the head, any leading batch.
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.

    Returns:
      a `BoundaryDistance`; its status is `NONFINITE` (and its distance NaN) for features with NaN
      or infinity.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a head that is not finite.
    """
    planes.check_head(head)
    planes.check_features("features", features, head)
    with _numerics.float64():
        return _boundary_distance(features, head.kernel, head.bias)


def segment_classes(
    start: Float[Array | np.ndarray, "*batch dim"],
    end: Float[Array | np.ndarray, "*batch dim"],
    head: LinearHead,
) -> SegmentClasses:
    """The classes along segments in feature space: exact corners of the upper envelope.

    Guarantee: computed in float64 from the logits at both ends; a class can be missed or added only
    where it stays within rounding of the largest logit. Crossings lie inside (0, 1);
    where logits tie at the start, the first class is the one that leads just after it, and of
    classes that tie all along the segment the smallest index is named.

    Args:
      start: where the segments begin (position 0).
      end: where they end (position 1); equal ends give one class and no crossing.
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.

    Returns:
      a `SegmentClasses`; its positions are 1 where there is no crossing at all, and its status is
      `NONFINITE` for segments with NaN or infinity.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a head that is not finite.
    """
    planes.check_head(head)
    planes.check_features("start", start, head)
    planes.check_features("end", end, head)
    if start.shape != end.shape:
        _check.fail("end.shape", end.shape, f"to be start.shape={start.shape}")
    with _numerics.float64():
        return _segment_classes(start, end, head.kernel, head.bias)


@jax.custom_jvp
@jax.jit
def _boundary_distance(features, kernel, bias) -> BoundaryDistance:
    dtype = features.dtype
    wide, kernel, bias = (jnp.asarray(x, jnp.float64) for x in (features, kernel, bias))
    lead = planes.lead(wide, kernel, bias)
    nearest = planes.first(lead.plane == jnp.min(lead.plane, axis=-1, keepdims=True))
    rival = jnp.where(jnp.isinf(planes.take(lead.plane, nearest)), lead.label, nearest)
    distance = jnp.where(lead.finite, jnp.min(lead.proved, axis=-1), jnp.nan)
    status = jnp.where(lead.finite, Status.CONVERGED, Status.NONFINITE).astype(jnp.int32)
    distance = _numerics.round_down(distance, dtype)
    return BoundaryDistance(distance, lead.label, rival, status)


@_boundary_distance.defjvp
def _boundary_distance_jvp(primals, tangents):
    """The derivative of the closed form with label and rival held, in the features' own type."""
    result = _boundary_distance(*primals)

    def closed_form(features, kernel, bias):
        columns = kernel.T.astype(features.dtype)
        biases = bias.astype(features.dtype)
        normal = columns[result.label] - columns[result.rival]
        gap = jnp.sum(features * normal, axis=-1) + (biases[result.label] - biases[result.rival])
        length = _numerics.norm(normal)
        return jnp.where(length > 0, gap / jnp.where(length > 0, length, 1), 0)

    tangent = jax.jvp(closed_form, primals, tangents)[1]
    no_tangent = np.zeros(result.label.shape, jax.dtypes.float0)
    return result, BoundaryDistance(tangent, no_tangent, no_tangent, no_tangent)  # type: ignore


@jax.jit
def _segment_classes(start, end, kernel, bias) -> SegmentClasses:
    dtype = jnp.result_type(start.dtype, end.dtype)
    first, last, kernel, bias = (jnp.asarray(x, jnp.float64) for x in (start, end, kernel, bias))
    batch = first.shape[:-1]
    num_classes = kernel.shape[1]
    first, last = (x.reshape(-1, kernel.shape[0]) for x in (first, last))
    intercept = _numerics.product(first, kernel) + bias[None, :]
    slope = _numerics.product(last - first, kernel)
    finite = jnp.all(jnp.isfinite(intercept) & jnp.isfinite(slope), axis=-1)
    usable = finite[:, None]
    intercept = jnp.where(planes.hidden(kernel, bias)[None, :], -jnp.inf, intercept)
    intercept, slope = jnp.where(usable, intercept, 0.0), jnp.where(usable, slope, 0.0)

    def steepest(among):
        allowed = jnp.where(among, slope, -jnp.inf)
        return planes.first(allowed == jnp.max(allowed, axis=1, keepdims=True))

    label = steepest(intercept == jnp.max(intercept, axis=1, keepdims=True))
    zero = jnp.sum(slope * 0.0, axis=1)  # a carry derived from the inputs
    rows = jnp.arange(label.shape[0], dtype=jnp.int32)
    none = rows * 0
    state = (
        jnp.zeros((num_classes - 1, 1), jnp.float64) + zero[None, :] + 1.0,
        jnp.zeros((num_classes, 1), jnp.int32) + label[None, :],
        none, label, zero, none == 0, jnp.int32(0),
    )  # fmt: skip

    def keep_going(state):
        *_, active, step = state
        return jnp.any(active) & (step < num_classes - 1)

    def next_corner(state):
        position, classes, count, label, reached, active, step = state
        rise = slope - planes.take(slope, label)[:, None]
        gap = planes.take(intercept, label)[:, None] - intercept
        meet = jnp.where(rise > 0, gap / jnp.where(rise > 0, rise, 1.0), jnp.inf)
        nearest = jnp.min(meet, axis=1)
        active = active & (nearest < 1)
        reached = jnp.where(active, jnp.maximum(reached, nearest), reached)
        label = jnp.where(active, steepest(meet == nearest[:, None]), label)
        # Lanes that have ended repeat their last crossing in every later slot.
        later = jnp.arange(num_classes - 1, dtype=jnp.int32)[:, None] >= step
        fill = jnp.where((count > 0) | active, reached, 1.0)
        position = jnp.where(later, fill[None, :], position)
        after = jnp.arange(num_classes, dtype=jnp.int32)[:, None] > step
        classes = jnp.where(after, label[None, :], classes)
        count = count + active.astype(jnp.int32)
        return position, classes, count, label, reached, active, step + jnp.int32(1)

    position, classes, count, *_ = lax.while_loop(keep_going, next_corner, state)
    position = jnp.where(finite[None, :], position, jnp.nan).T.reshape(*batch, num_classes - 1)
    status = jnp.where(finite, Status.CONVERGED, Status.NONFINITE).astype(jnp.int32)
    return SegmentClasses(
        position.astype(dtype),
        classes.T.reshape(*batch, num_classes),
        count.reshape(batch),
        status.reshape(batch),
    )
