"""Least-norm steps inside a box: min |d|^2 / 2 with A d = r (or >= r) and lower <= d <= upper.

The dual of that problem has one variable per row of A, d(l) = clip(A' l, lower, upper), and
gradient r - A d(l): concave, piecewise quadratic, and solved in a few semismooth Newton steps with
the matrix A_F A_F' of the columns that are not at a bound (Li, Sun and Toh 2018, arXiv:1607.05428,
use the same second-order dual). Everything is batched over a leading axis.

Bounds of pixels are handled here too, so that no step can leave them by a bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _check, _numerics
from hullgeo.features import Classifier

_STEP_LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.005)


def least_norm(
    matrix: Float[Array, "n k pixels"],
    right: Float[Array, "n k"],
    lower: Float[Array, "n pixels"],
    upper: Float[Array, "n pixels"],
    *,
    ridge: float | Float[Array, ""],
    inequality: bool,
    num_steps: int,
) -> Float[Array, "n pixels"]:
    """The shortest `d` in the box with `matrix @ d + ridge * l = right`, `>=` with `inequality`.

    `ridge` is relative to the largest squared row norm; it makes dependent rows harmless, and lets
    a system without a solution in the box end at a nearly closest point. Rows are scaled first:
    each on its own for inequalities, all alike for equations, whose ridge depends on their sizes.
    """
    norms = _numerics.norm(matrix)
    scale = norms if inequality else jnp.max(norms, axis=-1, keepdims=True)
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    matrix, right = matrix / scale[..., None], right / scale
    one = jnp.ones_like(right[:, :1])
    lengths = jnp.asarray(_STEP_LENGTHS, right.dtype)

    def displacement(multipliers):
        pulled = jnp.einsum("nk,nkp->np", multipliers, matrix, precision=_numerics.HIGHEST)
        return pulled, jnp.clip(pulled, lower, upper)

    def objective(multipliers):
        pulled, step = displacement(multipliers)
        penalty = ridge * (multipliers**2).sum(-1) / 2
        return (multipliers * right).sum(-1) - penalty - (step * (pulled - step / 2)).sum(-1)

    def body(_, multipliers):
        pulled, step = displacement(multipliers)
        reached = jnp.einsum("nkp,np->nk", matrix, step, precision=_numerics.HIGHEST)
        slope = right - ridge * multipliers - reached
        free = ((pulled > lower) & (pulled < upper)).astype(right.dtype)
        moving = jnp.broadcast_to(one > 0, right.shape)
        if inequality:
            moving = (multipliers > 0) | (slope > 0)
        moves = moving.astype(right.dtype)
        columns = matrix * free[:, None, :] * moves[..., None]
        gram = _numerics.product(columns, columns.mT)
        diagonal = jnp.where(moving, ridge, 1)
        gram = gram + diagonal[..., None] * jnp.eye(right.shape[-1], dtype=right.dtype)[None]
        newton = _solve(gram, moves * slope)
        candidates = multipliers[None] + lengths[:, None, None] * newton[None]
        if inequality:
            candidates = jnp.maximum(candidates, 0)
        candidates = jnp.concatenate([multipliers[None], candidates])
        best = jnp.argmax(jax.vmap(objective)(candidates), axis=0)
        return jnp.take_along_axis(candidates, best[None, :, None], axis=0)[0]

    multipliers = lax.fori_loop(0, num_steps, body, jnp.zeros_like(right))
    return displacement(multipliers)[1]


def _solve(gram: Array, right: Array) -> Array:
    """Solve symmetric positive definite systems; zero where rounding made them indefinite."""
    solution = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram), True), right[..., None])
    return jnp.where(jnp.isfinite(solution), solution, 0)[..., 0]


def as_pytree(function: Callable[[Any], Any]) -> Any:
    """A callable that passes through jit as an argument."""
    if isinstance(function, tuple | jax.tree_util.Partial):
        return function
    return jax.tree_util.Partial(function)


def checked_bounds(bounds: Any, image_shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """The bounds of every pixel, flattened."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        _check.fail("bounds", bounds, "to be a pair (lower, upper)")
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(bound, dtype), image_shape).reshape(-1) for bound in bounds
    )
    if _check.is_concrete(lower) and _check.is_concrete(upper) and not bool((lower < upper).all()):
        _check.fail("bounds", bounds, "to have lower < upper everywhere")
    return lower, upper


def checked_images(classifier: Any, images: Any) -> tuple[Array, tuple[int, ...], int]:
    """Images, their leading batch, and the number of classes."""
    images = images if hasattr(images, "dtype") else jnp.asarray(images)
    _check.floating("images", images)
    if isinstance(classifier, Classifier):
        _check.rank_at_least("images", images, 1, "(*batch, *image)")
        logits = jax.eval_shape(classifier, images)
        batch = logits.shape[:-1]
    else:
        _check.rank_at_least("images", images, 3, "(*batch, height, width, channels)")
        batch = images.shape[:-3]
        flat = jax.ShapeDtypeStruct((1, *images.shape[-3:]), images.dtype)
        logits = jax.eval_shape(classifier, flat)
    if 0 in images.shape:
        _check.fail("images.shape", images.shape, "to hold at least one image")
    return jnp.asarray(images), batch, logits.shape[-1]
