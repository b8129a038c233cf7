"""One convex hull for each class: distances to all of them, and the class of the nearest.

    label(q) = argmin_c distance(q, conv {v_i : label_i = c}),

certain where the upper bound of one distance is below the lower bounds of all others. Nearest-hull
classifiers are an old idea (Nalbantov, Groenen and Bioch, "Nearest convex hull classification",
2006); arXiv:2202.04052 looks at the hulls of classes in feature space.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hullgeo import _check, _numerics
from hullgeo.hull import project_to_hull
from hullgeo.prepare import prepare_hull
from hullgeo.result import HullProjection, NearestHull, Status


def project_to_class_hulls(
    queries: Float[Array | np.ndarray, "*batch dim"],
    vertices: Float[Array | np.ndarray, "vertices dim"],
    labels: Int[np.ndarray, " vertices"] | Int[Array, " vertices"],
    num_classes: int,
    **options: Any,
) -> HullProjection:
    """The nearest point of each class' hull to each query, with two-sided certificates.

    A pass prices every vertex once for every query, as for one hull of all vertices; all classes
    share one compiled program, since smaller ones are filled up with copies of a vertex.

    Guarantee: that of `project_to_hull`, for each class.

    Args:
      queries: `(*batch, dim)`, any leading batch.
      vertices: `(vertices, dim)`, one vertex a row, in the same units.
      labels: class of each vertex, `(vertices,)`, in `[0, num_classes)`; known values, not traced,
        since they decide shapes.
      num_classes: number of classes, some of which may have no vertices.
      **options: those of `project_to_hull`, but for `start`.

    Returns:
      a `HullProjection` with a last batch axis of length `num_classes`; `support` indexes
      `vertices`. A class without vertices has status `INFEASIBLE`, infinite distances, and NaN for
      the point and the weights.

    Raises:
      ValueError: as `project_to_hull`; labels that are traced, not integers, out of range or not
        one a vertex; no vertices at all.

    Source: `project_to_hull`; nearest-hull classification by Nalbantov, Groenen and Bioch, 2006.
    """
    _check.at_least("num_classes", num_classes, 1)
    if not _check.is_concrete(labels):
        _check.fail("labels", "a tracer", "to be known values", "Pass them from outside jit.")
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        _check.fail("labels.dtype", str(labels.dtype), "to be an integer type")
    _check.shape("vertices", vertices, (None, None), "(vertices, dim) with at least one vertex")
    _check.shape("labels", labels, (vertices.shape[0],), "(vertices,), one a vertex")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        _check.fail("labels", low if low < 0 else high, f"to lie in [0, {num_classes - 1}]")
    if "start" in options:
        _check.fail("start", "an answer", "not to be given: its supports mix the classes")
    _check.floating("vertices", vertices)
    _check.all_finite("vertices", vertices, "Drop the row or repair it.")
    members = [np.flatnonzero(labels == label).astype(np.int32) for label in range(num_classes)]
    size = max(map(len, members))
    with _numerics.float64():
        queries, vertices = jnp.asarray(queries), jnp.asarray(vertices)
        found = [
            _project_to_class(queries, vertices, jnp.asarray(rows), size, options)
            for rows in members
            if len(rows)
        ]
        missing = _missing(found[0])
        width = max(one.support.shape[-1] for one in found)
        answers = iter(found)
        each = [next(answers) if len(rows) else missing for rows in members]
        return jax.tree.map(
            lambda *leaves: jnp.stack(leaves, axis=queries.ndim - 1),
            *(_widened(one, width) for one in each),
        )


def nearest_hull(projection: HullProjection) -> NearestHull:
    """The class whose hull is nearest to each query, as far as the brackets prove it.

    Guarantee: where `margin > 0`, no other class' hull is as near as that of `label`.

    Args:
      projection: from `project_to_class_hulls`, classes on the last batch axis.

    Returns:
      a `NearestHull`: status `CONVERGED` where the label is proved, `PRECISION_LIMIT` where
      brackets overlap (a query in several hulls, a tie, a tolerance too wide), `NONFINITE`.

    Raises:
      ValueError: a projection without an axis of classes.

    Source: Nalbantov, Groenen and Bioch, "Nearest convex hull classification", 2006.
    """
    if projection.distance.ndim == 0 or projection.distance.shape[-1] == 0:
        shape = projection.distance.shape
        _check.fail("projection.distance.shape", shape, "to be (*batch, classes)")
    with _numerics.float64():
        upper = jnp.asarray(projection.distance).astype(jnp.float64)
        lower = jnp.asarray(projection.distance_lower_bound)
        dtype, lower = lower.dtype, lower.astype(jnp.float64)
        known = ~jnp.any(jnp.isnan(upper) | jnp.isnan(lower), axis=-1)
        label = _numerics.argmin(upper)
        classes = lax.broadcasted_iota(jnp.int32, upper.shape, upper.ndim - 1)
        others = jnp.where(classes == label[..., None], jnp.inf, lower)
        rival = _numerics.argmin(others)
        best = jnp.min(upper, axis=-1)
        margin = jnp.min(others, axis=-1) - best
        status = jnp.where(
            margin > 0, jnp.int32(Status.CONVERGED), jnp.int32(Status.PRECISION_LIMIT)
        )
        nan = jnp.where(known, 0.0, jnp.nan)
        return NearestHull(
            label=label,
            rival=rival,
            distance=_numerics.round_up(best + nan, dtype),
            margin=_numerics.round_down(margin + nan, dtype),
            status=jnp.where(known, status, jnp.int32(Status.NONFINITE)),
        )


def _project_to_class(
    queries: Array, vertices: Array, rows: Array, size: int, options: dict[str, Any]
) -> HullProjection:
    """The rows of one class, filled up with the one nearest to their mean: it is seldom needed."""
    mine = vertices[rows]
    wide = mine.astype(jnp.float64)
    away = _numerics.norm(wide - jnp.mean(wide, axis=0, keepdims=True))
    deepest = rows[_numerics.argmin(away)]
    index = jnp.concatenate([rows, jnp.broadcast_to(deepest, (size - rows.shape[0],))])
    variant = options.get("variant", "fully_corrective")
    hull = vertices[index]
    found = project_to_hull(
        queries, prepare_hull(hull) if variant == "fully_corrective" else hull, **options
    )
    return found._replace(support=index[found.support])


def _missing(like: HullProjection) -> HullProjection:
    """What there is to say about a class without vertices."""
    nothing = jax.tree.map(lambda leaf: leaf * 0, like)
    infinite = jnp.full_like(like.distance, jnp.inf)
    return nothing._replace(
        point=jnp.full_like(like.point, jnp.nan),
        distance=infinite,
        distance_lower_bound=infinite,
        interior_radius=jnp.zeros_like(like.distance),
        weights=jnp.full_like(like.weights, jnp.nan),
        gap=infinite,
        status=jnp.full_like(like.status, Status.INFEASIBLE),
        query=like.query,
    )


def _widened(answer: HullProjection, width: int) -> HullProjection:
    extra = [(0, 0)] * (answer.support.ndim - 1) + [(0, width - answer.support.shape[-1])]
    return answer._replace(
        support=jnp.pad(answer.support, extra, mode="edge"),
        weights=jnp.pad(answer.weights, extra),
    )
