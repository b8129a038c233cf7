"""Images whose features equal a target: minimise |phi(x) - t|^2 over the box of the bounds.

The least-squares form of feature inversion (Mahendran and Vedaldi 2015, arXiv:1412.0035), started
at an image, so that the answer stays recognisable. The features' residual is reported relative to
the target's norm; that the target's *class* is reached says nothing, every method reaches it.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _check, _numerics
from hullgeo.result import Inversion, Status


def invert_features(
    features_fn: Callable[[Any], Any],
    target: Float[Any, "*batch dim"],
    images: Any,
    *,
    bounds: Any = (0.0, 1.0),
    optimizer: Any = None,
    rtol: Any = 1e-3,
    max_steps: Any = 300,
) -> Inversion:
    """Images near the given ones whose features equal a target, within the bounds.

    Args:
      features_fn: traceable, images `(n, *image)` to features `(n, dim)`, each row on its own. A
        pytree (`Classifier.features`, any `jax.tree_util.Partial`) is passed to the compiled
        program as an argument; another function is part of the program, so pass the same object
        every time.
      target: features to reach, `(*batch, dim)`.
      images: where to start, `(*batch, *image)`, floating point; clipped to the bounds.
      bounds: smallest and largest value of a pixel, numbers or arrays that broadcast to an image.
      optimizer: an `optax.GradientTransformation` for `|phi(x) - t|^2 / (2 |t|^2)`, applied to each
        image on its own, each step clipped to the bounds; Adam with rate 0.01 if None. Pass the
        same object every time.
      rtol: residual at which a row stops, relative to the target's norm.
      max_steps: gradient steps at most.

    Returns:
      an `Inversion`: the best image of each row's path. Guarantee: no pixel leaves the bounds, and
      `features` and `residual` are those of the returned image. A target of norm 0 has its
      residual taken absolutely. NaN or infinity in a row gives that row `NONFINITE`.

    Raises:
      ValueError: for shapes, types or options that do not fit.
    """
    target, images, batch = _checked(target, images)
    lower, upper = _checked_bounds(bounds, images.shape[len(batch) :], images.dtype)
    _check.nonnegative("rtol", rtol)
    _check.at_least("max_steps", max_steps, 0)
    size = math.prod(batch)
    result = _descend(
        _as_pytree(features_fn),
        target.reshape(size, -1),
        images.reshape(size, *images.shape[len(batch) :]),
        lower,
        upper,
        jnp.asarray(rtol, images.dtype),
        jnp.asarray(max_steps, jnp.int32),
        optimizer=_adam() if optimizer is None else optimizer,
    )
    return jax.tree.map(lambda out: out.reshape(*batch, *out.shape[1:]), result)


@partial(jax.jit, static_argnames="optimizer")
def _descend(features_fn, target, images, lower, upper, rtol, max_steps, *, optimizer) -> Inversion:
    size, pixels = images.shape[0], math.prod(images.shape[1:])
    flat = images.reshape(size, pixels)
    finite = jnp.isfinite(flat).all(-1) & jnp.isfinite(target).all(-1)
    start = jnp.clip(jnp.where(finite[:, None], flat, lower[None]), lower[None], upper[None])
    norm = _numerics.norm(target)
    scale = jnp.where(finite & (norm > 0), norm, 1)
    goal = jnp.where(finite[:, None], target, 0)

    def evaluate(points):
        return features_fn(points.reshape(images.shape))

    def relative(features):
        error = (features - goal) / scale[:, None]
        return _numerics.norm(error)

    def gradient(points):
        features, pull = jax.vjp(evaluate, points)
        error = (features - goal) / scale[:, None]
        (slope,) = pull((error / scale[:, None]).astype(features.dtype))
        return slope, features

    def running(state):
        step, _, _, _, best_residual, _ = state
        return (step < max_steps) & ~(best_residual <= rtol).all()

    def body(state):
        step, points, memory, best, best_residual, spent = state
        slope, _ = gradient(points)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            update, memory = jax.vmap(optimizer.update)(slope, memory, points)
        moved = jnp.clip(points + update, lower[None], upper[None])
        active = ~(best_residual <= rtol)
        points = jnp.where(active[:, None], moved, points)
        residual = relative(evaluate(points))
        better = residual < best_residual
        best = jnp.where(better[:, None], points, best)
        best_residual = jnp.where(better, residual, best_residual)
        return step + 1, points, memory, best, best_residual, spent + active.astype(jnp.int32)

    spent = jnp.zeros_like(scale, jnp.int32)
    step = jnp.zeros_like(max_steps)
    state = (step, start, jax.vmap(optimizer.init)(start), start, relative(evaluate(start)), spent)
    *_, best, _, spent = lax.while_loop(running, body, state)
    features = evaluate(best)
    residual = relative(features)
    finite &= jnp.isfinite(residual)
    status = jnp.where(residual <= rtol, int(Status.CONVERGED), int(Status.STEP_LIMIT))
    status = jnp.where(finite, status, int(Status.NONFINITE)).astype(jnp.int32)
    at_bound = (best == lower[None]) | (best == upper[None])
    return Inversion(
        image=jnp.where(finite[:, None], best, flat).reshape(images.shape),
        features=features,
        residual=jnp.where(finite, residual, jnp.nan),
        pixel_distance=jnp.where(finite, _numerics.norm(best - flat), jnp.nan),
        active=at_bound.mean(-1, dtype=flat.dtype),
        num_gradients=spent,
        status=status,
    )


@lru_cache(maxsize=1)
def _adam() -> Any:
    import optax

    return optax.adam(0.01)


def _as_pytree(function: Callable[[Any], Any]) -> Any:
    """A callable that passes through jit as an argument."""
    if isinstance(function, tuple | jax.tree_util.Partial):
        return function
    return jax.tree_util.Partial(function)


def _checked(target: Any, images: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """Target and images as arrays of one type, and their batch."""
    target, images = (a if hasattr(a, "dtype") else jnp.asarray(a) for a in (target, images))
    for name, array in (("target", target), ("images", images)):
        _check.floating(name, array)
    _check.rank_at_least("target", target, 1, "(*batch, dim)")
    batch = target.shape[:-1]
    if images.ndim <= len(batch) or images.shape[: len(batch)] != batch:
        _check.fail("images.shape", images.shape, f"to be (*batch, *image) with batch {batch}")
    images = jnp.asarray(images)
    return jnp.asarray(target, images.dtype), images, batch


def _checked_bounds(bounds: Any, image_shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """The bounds of every pixel, flattened."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        _check.fail("bounds", bounds, "to be a pair (lower, upper)")
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(bound, dtype), image_shape).reshape(-1) for bound in bounds
    )
    if _check.is_concrete(lower) and _check.is_concrete(upper) and not bool((lower < upper).all()):
        _check.fail("bounds", bounds, "to have lower < upper everywhere")
    return lower, upper
