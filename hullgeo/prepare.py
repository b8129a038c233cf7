"""Vertices prepared for the oracle, once for a hull that is asked again and again.

What is kept besides the rows pays for itself in time: a sample and a sketch in few components, for
passes that only name candidates; a copy in bfloat16 where products of these are faster; the Gram
matrix where there are no more vertices than dimensions.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _check, _numerics
from hullgeo.oracle import (
    SHARE,
    Hull,
    exponent_of,
    flushed,
    in_chunks,
    num_classes,
    power_of_two,
)

_SMALLEST_SAMPLED = 2**13  # vertices
_NORMS = 2**12  # rows whose norms are computed at once
_LARGEST_COVARIANCE = 1024  # dimensions
_SHRINKAGE = 0.1  # of the covariance towards its mean variance
_SMALLEST_COARSE = 2**12  # vertices from which pricing decides about the time
_SMALLEST_SKETCHED = 512  # dimensions, of that many vertices
_COMPONENTS = (8, 512)  # of the sketch: an eighth of the dimensions, so many at most
_SAMPLED_ROWS, _ROWS_EACH = 2**11, 8  # that they are from: in all and per component, at least
_LOST = 2.0**-5  # of the squared variances, at most, outside the components


def prepare_hull(
    vertices: Float[Array | np.ndarray, "vertices dim"],
    *,
    naming_dtype: Any = None,
    num_components: int | None = None,
) -> Hull:
    """Centre, scale and round vertices once, for a hull that is asked again and again.

    The result may be passed to `project_to_hull` in place of the vertices, through `jit` and `pmap`
    too. It holds the vertices, a float32 copy, with bfloat16 products a copy of that type, often an
    eighth again for a sample or a sketch, and up to 1,024 dimensions a matrix of that order.

    Args:
      vertices: `(vertices, dim)`, one vertex a row, float32, bfloat16, float16 or float64. A NumPy
        float64 array keeps its type whatever `jax_enable_x64` says, but a float64 hull can enter
        the caller's own `jit` only where that flag is set.
      naming_dtype: type of the products that only name candidates, `jnp.bfloat16` or `jnp.float32`;
        proofs are in float32 and float64 whatever it is. By default float32, and for 2^12 vertices
        or more the faster of both, from one short measurement a process.
      num_components: principal components in which the first passes run, 0 for none; they name
        candidates only. By default an eighth of the dimensions, from 512 dimensions and 2^12
        vertices on, where that holds nearly all of the variance; none under a trace.

    Guarantee: brackets from a `Hull` are of the vertices as passed; the rounding of the copy is
    part of the bound.

    Returns:
      a `Hull`, its `vertices` in the caller's units and type.

    Raises:
      ValueError: a wrong rank or type, no vertices, a vertex that is not finite (unless traced),
        another `naming_dtype`, or `num_components` that is negative or exceeds a dimension.

    Source: docs/hull.md, "The certificate".
    """
    _check.floating("vertices", vertices)
    _check.shape("vertices", vertices, (None, None), "(vertices, dim) with at least one vertex")
    if num_components is not None and not 0 <= num_components <= min(vertices.shape):
        _check.fail("num_components", num_components, f"to be from 0 to {min(vertices.shape)}")
    if naming_dtype is None:
        large = _check.is_concrete(vertices) and vertices.shape[0] >= _SMALLEST_COARSE
        coarse = large and _numerics.bfloat16_pays()
    else:
        allowed = "bfloat16", "float32"
        _check.one_of("naming_dtype", jnp.dtype(naming_dtype).name, allowed)
        coarse = jnp.dtype(naming_dtype) == jnp.bfloat16
    with _numerics.float64():
        hull = _prepare(jnp.asarray(vertices), coarse=coarse)
        if _check.is_concrete(hull.radius) and not bool(jnp.isfinite(hull.radius)):
            _check.all_finite("vertices", vertices, "Drop the row or repair it.")
            _check.fail("vertices", "entries near the largest number", "to have a finite radius",
                        "Divide them by a power of two.")  # fmt: skip
        return _with_sketch(hull, num_components)


def _with_sketch(hull: Hull, wanted: int | None) -> Hull:
    """The hull with a sketch, of which the sample is then one, too, if wanted or if it pays."""
    number, dim = hull.vertices.shape
    count = wanted or 0
    if wanted is None and _check.is_concrete(hull.rows):
        pays = dim >= _SMALLEST_SKETCHED and number >= _SMALLEST_COARSE and number > dim
        share, most = _COMPONENTS
        count = min(dim // share, most) if pays else 0
    if not count:
        return hull
    components, lost = _principal_components(hull.rows, count)
    if wanted is None and not float(lost) <= _LOST:
        return hull
    named = hull.coarse.dtype
    sketch, sample = (_project(rows, components, named) for rows in (hull.rows, hull.sample))
    hull = hull._replace(sample=sample, components=components, sketch=sketch)
    return hull if dim > _LARGEST_COVARIANCE else hull._replace(**_for_components(hull))


@partial(jax.jit, static_argnames=("count",))
def _principal_components(rows: Array, count: int) -> tuple[Array, Array]:
    """Directions of the largest variance, and the share of squared variances that they leave out.

    From a sample of the rows: two rounds of subspace iteration (Halko, Martinsson and Tropp,
    "Finding structure with randomness", 2011), which begin with some of them. What is left out, sum
    of s_j^2 over the other components by that over all, is judged on other rows: |T T'|^2 without
    its diagonal estimates it without bias.
    """
    rows = rows.reshape(-1, rows.shape[-1])
    stride = max(2, len(rows) // max(_SAMPLED_ROWS, _ROWS_EACH * count))
    sampled, others = rows[::stride], rows[stride // 2 :: stride][::SHARE]
    start = jnp.pad(sampled[:: max(1, len(sampled) // count)], ((0, count), (0, 0)))[:count]
    basis = jnp.linalg.qr(start.T)[0]
    for _ in range(2):
        image = _numerics.product(sampled, basis)
        basis = jnp.linalg.qr(_numerics.product(sampled.T, image))[0]
    outside = others - _numerics.product(_numerics.product(others, basis), basis.T)

    def squares(rows: Array) -> Array:
        products = _numerics.product(rows, rows.T)
        return jnp.sum(products**2) - jnp.sum(jnp.diagonal(products) ** 2)

    return basis, squares(outside) / squares(others)


@jax.jit
def _for_components(hull: Hull) -> dict[str, Array]:
    """What a search for supports in components alone needs besides."""
    kept = jnp.sum(hull.sketch.astype(jnp.float32) ** 2, axis=2)
    across, components = hull.inverse_covariance, hull.components
    if across.shape[0]:
        across = _numerics.product(components.T, _numerics.product(across, components))
    return {
        "left_out": jnp.maximum(jnp.sum(hull.rows**2, axis=2) - kept, 0),
        "inverse_in_components": across,
    }


@partial(jax.jit, static_argnames=("dtype",))
def _project(rows: Array, components: Array, dtype: Any) -> Array:
    return _numerics.product(rows.astype(components.dtype), components).astype(dtype)


@partial(jax.jit, static_argnames=("coarse",))
def _prepare(vertices: Array, *, coarse: bool) -> Hull:
    with _numerics.float64():
        num, dim = vertices.shape
        wide = vertices.astype(jnp.float64)
        outer = exponent_of(jnp.max(jnp.abs(wide)))
        scaled = wide * power_of_two(-outer)
        mean = jnp.mean(scaled, axis=0) * power_of_two(outer)
        constant = jnp.all(vertices == vertices[:1], axis=0)
        center = jnp.where(constant, vertices[0], _numerics.narrow(mean, vertices.dtype))
        shifted = scaled - (center.astype(jnp.float64) * power_of_two(-outer))[None]
        square = jnp.sum(shifted**2, axis=1)
        largest = jnp.sqrt(jnp.max(square)) * (1 + (dim + 8) * 2.0**-52)
        inner = exponent_of(largest)
        rows = (shifted * power_of_two(-inner)).astype(jnp.float32)
        radius = _numerics.round_up(largest * power_of_two(-inner), jnp.float32)
        exponent = outer + inner
        classes = num_classes(num)
        few = num < _SMALLEST_SAMPLED
        named = jnp.bfloat16 if coarse else jnp.float32
        nothing = jnp.zeros((0, 0, dim), named)
        small = num <= dim
        gram = _numerics.product(rows, rows.T) if small else jnp.zeros((0, 0), jnp.float32)
        inverse_covariance = jnp.zeros((0, 0), jnp.float32)
        if not small and dim <= _LARGEST_COVARIANCE:
            inverse_covariance = _shrunk_inverse(rows[:: max(1, num // (4 * dim))])
        sampled = jnp.zeros((0,), jnp.int32) if few else _outlying(rows, inverse_covariance)
        in_sample = jnp.full((0 if few else num,), len(sampled), jnp.int32)
        in_sample = in_sample.at[sampled].set(jnp.arange(len(sampled), dtype=jnp.int32))
        rows, sample = in_chunks(rows, classes), rows[sampled].astype(named)
        return Hull(
            vertices=vertices,
            center=center,
            exponent=exponent,
            rows=rows,
            coarse=rows.astype(named) if coarse else nothing,
            sample=nothing if few else in_chunks(sample, classes),
            sampled=sampled,
            in_sample=in_sample,
            components=jnp.zeros((dim, 0), jnp.float32),
            sketch=jnp.zeros((0, 0, 0), named),
            left_out=jnp.zeros((0, 0), jnp.float32),
            gram=gram,
            inverse_covariance=inverse_covariance,
            inverse_in_components=jnp.zeros((0, 0), jnp.float32),
            radius=radius,
            flushed=_numerics.round_up(flushed(vertices, exponent), jnp.float32),
            constant=constant,
        )


def _outlying(rows: Array, inverse_covariance: Array) -> Array:
    """The sample: rows of largest Mahalanobis norm, far more often in a support than others.

    Where the covariance is not known, one row of every `SHARE`.
    """
    if not inverse_covariance.shape[0]:
        return jnp.arange(0, len(rows), SHARE, dtype=jnp.int32)

    def square(row: Array) -> Array:
        return jnp.sum(row * _numerics.product(row[None], inverse_covariance)[0])

    norms = lax.map(square, rows, batch_size=_NORMS)
    return lax.top_k(norms, -(-len(rows) // SHARE))[1]


def _shrunk_inverse(rows: Array) -> Array:
    """level (S + level I)^-1 for the covariance S of centred rows: eigenvalues within (0, 1]."""
    num, dim = rows.shape
    identity = jnp.eye(dim, dtype=jnp.float32)
    level = _SHRINKAGE * jnp.mean(rows * rows)
    scaled = _numerics.product(rows.T, rows) / (num * jnp.where(level > 0, level, 1))
    factor = lax.linalg.cholesky(scaled + identity)
    inverse = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    inverse = _numerics.product(inverse.T, inverse)
    return jnp.where(jnp.all(jnp.isfinite(inverse)), inverse, identity)
