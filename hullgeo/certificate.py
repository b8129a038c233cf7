"""Two-sided certificates of the distance from a query to a convex hull.

For a query q, vertices v_i, weights w on a support and any direction g,

    min_i <v_i - q, g> / |g|  <=  distance(q, conv V)  <=  |sum_j w_j (v_j - q)| / sum_j w_j .

The right side holds because the point is in the hull, the left side because every x in the hull has
<x - q, g> <= |x - q| |g|. With g the residual r on the right and x its point, the left side is
|r| - gap / |r|, where gap = max_i <r, x - v_i> is the Frank-Wolfe gap. Any g is allowed, so its own
rounding does not matter; only the products with it do.

Rounding. Everything is computed in float64, unit roundoff u = 2^-53. A sum of k products in any
order, with or without fused multiply-add, has an error of at most k u / (1 - k u) times the sum of
the absolute products (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section
3.1). `_gamma(k) = 2 k u` is twice that to first order, which covers the higher orders and the few
operations on the bounds themselves. Where an input holds numbers that the device may flush to zero
(subnormal ones, or below 2^-900 of the largest), `flushed` bounds what is lost.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hullgeo._numerics import HIGHEST, narrow, norm, product

_U = 2.0**-53


class CenteredHull(NamedTuple):
    """Vertices prepared for products in float64: scaled by a power of two, then centred.

    Attributes:
      vertices: the caller's rows, `(vertices, dim)`, in their own type.
      rows: `vertices / scale - center` in float64, of order one.
      center: the first scaled vertex. It has to be the same numbers wherever it is used, and a
        compiler may contract a computed mean with the subtraction that follows it.
      scale: a power of two.
      radius: at least the norm of every exact row.
      flushed: at least the norm of what was flushed to zero in any row, scaled; mostly exactly 0.
    """

    vertices: Float[Array, "vertices dim"]
    rows: Float[Array, "vertices dim"]
    center: Float[Array, " dim"]
    scale: Float[Array, ""]
    radius: Float[Array, ""]
    flushed: Float[Array, ""]


class Certificate(NamedTuple):
    """What is proved about one query, in the units of the vertices.

    Attributes:
      point: the point of the returned weights.
      weights: the weights, normalised and rounded to the type asked for.
      distance: at least the distance of the point of the float64 weights, hence of the hull.
      lower: at most the distance of the hull; 0 where nothing is proved.
      gap: at least the Frank-Wolfe gap of the returned weights.
    """

    point: Float[Array, " dim"]
    weights: Float[Array, " slots"]
    distance: Float[Array, ""]
    lower: Float[Array, ""]
    gap: Float[Array, ""]


def center_vertices(vertices: Float[Array, "vertices dim"]) -> CenteredHull:
    """Scale by a power of two (exact), then centre; runs inside a float64 island."""
    largest = jnp.max(jnp.abs(vertices)).astype(jnp.float64)
    scale = _power_of_two(largest)
    scaled = vertices.astype(jnp.float64) / scale
    center = scaled[0]
    rows = scaled - center[None]
    dim = vertices.shape[1]
    radius = jnp.max(norm(rows)) * (1 + _gamma(dim + 8))
    return CenteredHull(vertices, rows, center, scale, radius, _flushed(vertices, scale))


def residual_rows(
    hull: CenteredHull, query: Float[Array, " dim"], support: Int[Array, " slots"]
) -> Float[Array, "slots dim"]:
    """Scaled `v - q` of the support, each entry right to u: from the caller's numbers."""
    rows = hull.vertices[support].astype(jnp.float64) / hull.scale
    return rows - (query.astype(jnp.float64) / hull.scale)[None]


def upper_bound(
    rows: Float[Array, "slots dim"], weights: Float[Array, " slots"], flushed: Float[Array, ""]
) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]]:
    """Residual of the normalised weights, a bound of its error, a bound of its exact norm.

    Entries of `rows` are right to u, the normalised weights to (slots + 1) u, and the products are
    summed over the slots: (2 slots + 3) u in all.
    """
    slots, dim = rows.shape
    weights = weights / jnp.sum(weights)
    residual = product(weights, rows)
    spread = jnp.vdot(weights, norm(rows), precision=HIGHEST) * (1 + _gamma(dim + slots + 16))
    error = _gamma(2 * slots + 8) * spread + flushed * (1 + _gamma(slots + 8))
    return residual, error, norm(residual) * (1 + _gamma(dim + 8)) + error


def lower_score(
    hull: CenteredHull, query: Float[Array, " dim"], direction: Float[Array, " dim"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A proved lower bound of `min_i <v_i - q, direction>`, scaled, and a bound of |direction|.

    The direction should be of order one (`_unit`), so that products do not underflow.
    """
    dim = direction.shape[0]
    shifted = _shifted(hull, query)
    flushed = hull.flushed + _flushed(query, hull.scale)
    length = norm(direction) * (1 + _gamma(dim + 8))
    score = jnp.min(product(hull.rows, direction)) - jnp.vdot(shifted, direction, precision=HIGHEST)
    error = _gamma(2 * dim + 16) * _reach(hull, query) + flushed * (1 + _gamma(8))
    return score - error * length, length


def certify(
    hull: CenteredHull,
    query: Float[Array, " dim"],
    support: Int[Array, " slots"],
    weights: Float[Array, " slots"],
    dtype: Any = jnp.float64,
) -> Certificate:
    """Certificate of float64 weights, for an answer whose weights are rounded to `dtype`.

    The bracket belongs to the float64 weights (rounding them moves the point by little and the
    bracket by the square of that), the gap and the point to the rounded ones, which takes a second
    pass over the vertices unless `dtype` is float64.

    Args:
      hull: from `center_vertices`.
      query: in its own type.
      support: indices of vertices.
      weights: nonnegative with a positive sum, float64.
      dtype: type of the answer.

    Returns:
      a certificate in float64 (the weights in `dtype`), NaN where an input is not finite.
    """
    weights = weights / jnp.sum(weights)
    rounded = narrow(weights, dtype)
    rows = residual_rows(hull, query, support)
    flushed = hull.flushed + _flushed(query, hull.scale)
    residual, error, distance = upper_bound(rows, weights, flushed)
    size, direction = _unit(residual)
    score, length = lower_score(hull, query, direction)
    lower = jnp.where(score > 0, score, 0 * score) / jnp.where(length > 0, length, 1) * (1 - 8 * _U)

    length_of_point = distance
    if dtype != jnp.float64:
        residual, error, length_of_point = upper_bound(rows, rounded.astype(jnp.float64), flushed)
        size, direction = _unit(residual)
        score, _ = lower_score(hull, query, direction)
    gap = length_of_point * length_of_point - size * score + 2 * _reach(hull, query) * error
    return Certificate(
        point=query.astype(jnp.float64) + residual * hull.scale,
        weights=rounded,
        distance=distance * hull.scale,
        lower=lower * hull.scale,
        gap=jnp.maximum(gap, 0 * gap) * hull.scale * hull.scale,
    )


def _gamma(terms: int) -> float:
    return 2 * terms * _U


def _flushed(array: Array, scale: Array) -> Array:
    """At least the norm of what dividing by `scale` in float64 flushes to zero in any row."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[array.dtype.itemsize]
    bits = lax.shift_left(lax.bitcast_convert_type(array, unsigned), jnp.asarray(1, unsigned))
    small = (bits > 0) & (jnp.abs(array.astype(jnp.float64) / scale) < 2.0**-900)
    tiny = float(jnp.finfo(array.dtype).smallest_normal)
    bound = array.shape[-1] ** 0.5 * (tiny / scale + 2.0**-900)
    return jnp.where(jnp.any(small), bound, 0 * bound)


def _shifted(hull: CenteredHull, query: Array) -> Array:
    return query.astype(jnp.float64) / hull.scale - hull.center


def _reach(hull: CenteredHull, query: Array) -> Array:
    """At least the distance from the query to any vertex, scaled."""
    return hull.radius + norm(_shifted(hull, query)) * (1 + _gamma(query.shape[0] + 8))


def _unit(direction: Array) -> tuple[Array, Array]:
    """A power of two of the size of the largest entry, and the direction divided by it (exact)."""
    size = _power_of_two(jnp.max(jnp.abs(direction)))
    return size, direction / size


def _power_of_two(size: Array) -> Array:
    """A power of two of that size (1 for zero) that can be divided by exactly."""
    power = lax.reduce_precision(0.5 * size, exponent_bits=11, mantissa_bits=0)
    return jnp.where(power > 0, jnp.clip(power, 2.0**-1000, 2.0**1000), 1.0)
