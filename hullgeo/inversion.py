"""Images whose features equal a target: minimise |phi(x) - t|^2 over the box of the bounds.

The least-squares form of feature inversion (Mahendran and Vedaldi 2015, arXiv:1412.0035), started
at an image, so that the answer stays recognisable. By default by Gauss-Newton steps of least norm
inside the box with averaged Jacobians (`_gauss_newton.py`), followed by a walk along the null space
of the Jacobian back towards the start; or by any optax optimiser. The residual is reported relative
to the target's norm; that the target's *class* is reached says nothing, every method reaches it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _box, _check, _gauss_newton, _numerics
from hullgeo._convolution import canonical
from hullgeo.result import Inversion, Status

_FLAT = 1e-4  # stationarity below which the features cannot move nearer to the target


def invert_features(
    features_fn: Callable[[Any], Any],
    target: Any,
    images: Any,
    *,
    start: Any = None,
    bounds: Any = (0.0, 1.0),
    optimizer: Any = None,
    regularizer: Any = None,
    rtol: Any = 1e-3,
    max_steps: Any = None,
    polish_steps: Any = 40,
    key: Any = None,
) -> Inversion:
    """Images near the given ones whose features equal a target, within the bounds.

    Args:
      features_fn: traceable, images `(n, *image)` to features `(n, dim)`, each row on its own. A
        pytree (`Classifier.features`, any `jax.tree_util.Partial`) is passed to the compiled
        program as an argument; another function is part of the program, so pass the same object
        every time.
      target: features to reach, `(*batch, dim)`: those of another image, or the `point` of
        `nearest_boundary_point`, `tie_point` or `project_to_hull`, or a point between two of these.
      images: `(*batch, *image)`, floating point: what the answer is to stay near to.
      start: where the search starts, `(*batch, *image)`; the images if None.
      bounds: smallest and largest value of a pixel, numbers or arrays that broadcast to an image.
        Starts are clipped into them; distances are to the images as given.
      optimizer: None for Gauss-Newton, whose memory is a few times dim x pixels per image; else an
        `optax.GradientTransformation` for `|phi(x) - t|^2 / (2 |t|^2)`, applied to each image on
        its own, each step clipped to the bounds. Pass the same object every time.
      regularizer: images `(n, *image)` to penalties `(n,)`, added to the optimiser's objective,
        `total_variation` for one. Needs an optimiser. The answer is then the image of least
        objective, and rows run on after they reach the target.
      rtol: residual at which the target counts as reached, relative to the target's norm.
      max_steps: Gauss-Newton steps (60 if None), each one Jacobian of `dim` vector-Jacobian
        products; or steps of the optimiser (300 if None), each one gradient.
      polish_steps: Gauss-Newton steps, out of `max_steps`, spent at most on coming nearer to the
        images once the target is reached.
      key: random key for the small steps tried where Gauss-Newton is stuck; a fixed one if None.

    Returns:
      an `Inversion`: of the images on a row's path that reach the target the nearest one (by
      Gauss-Newton), or the one of least residual. Guarantee: no pixel leaves the bounds by a bit,
      and `features` and `residual` are those of the returned image. A target of norm 0 has its
      residual taken absolutely. NaN or infinity in a row gives that row `NONFINITE`.

    Raises:
      ValueError: for shapes, types or options that do not fit.
    """
    target, images, batch = _checked(target, images)
    shape = images.shape[len(batch) :]
    lower, upper = _box.checked_bounds(bounds, shape, images.dtype)
    _check.nonnegative("rtol", rtol)
    if max_steps is None:
        max_steps = 60 if optimizer is None else 300
    _check.at_least("max_steps", max_steps, 0)
    _check.at_least("polish_steps", polish_steps, 0)
    if regularizer is not None and optimizer is None:
        _check.fail(
            "optimizer",
            None,
            "with a regularizer to be an optax optimiser",
            "E.g. optax.adam(0.01).",
        )
    if start is not None and start.shape != images.shape:
        _check.fail("start.shape", start.shape, f"to be that of images, {images.shape}")
    size = math.prod(batch)
    result = _invert(
        _box.as_pytree(features_fn),
        target.reshape(size, -1),
        images.reshape(size, *shape),
        None if start is None else jnp.asarray(start, images.dtype).reshape(size, -1),
        lower,
        upper,
        jnp.asarray(rtol, images.dtype),
        jnp.asarray(max_steps, jnp.int32),
        jnp.asarray(polish_steps, jnp.int32),
        jax.random.key(0) if key is None else key,
        None if regularizer is None else _box.as_pytree(regularizer),
        optimizer=optimizer,
    )
    return jax.tree.map(lambda out: out.reshape(*batch, *out.shape[1:]), result)


def total_variation(images: Any) -> Float[Array, "*batch"]:
    """Total variation of images, the sum of the absolute jumps between neighbours.

    The anisotropic form, along rows and columns (Rudin, Osher and Fatemi 1992), each jump smoothed
    by 1e-3 so that there is a gradient everywhere. Scale it to weigh it:
    `lambda images: 1e-4 * total_variation(images)`.

    Args:
      images: `(*batch, height, width, channels)`.

    Returns:
      one number per image, in the units of the pixels.
    """
    across, down = (
        jnp.sqrt(jnp.diff(images, axis=axis) ** 2 + 1e-6).sum((-3, -2, -1)) for axis in (-2, -3)
    )
    return across + down


@partial(jax.jit, static_argnames="optimizer")
def _invert(
    features_fn, target, images, start, lower, upper, rtol, max_steps, polish_steps, key,
    regularizer, *, optimizer,
) -> Inversion:  # fmt: skip
    flat = images.reshape(images.shape[0], -1)
    given = flat if start is None else start
    finite = jnp.isfinite(jnp.concatenate([flat, given, target], axis=-1)).all(-1)
    clean = jnp.where(finite[:, None], flat, lower[None])
    begin = jnp.clip(jnp.where(finite[:, None], given, lower[None]), lower[None], upper[None])
    norm = _numerics.norm(target)
    scale = jnp.where(finite & (norm > 0), norm, 1)
    goal = jnp.where(finite[:, None], target, 0)

    def evaluate(points):
        return features_fn(points.reshape(-1, *images.shape[1:])).astype(flat.dtype)

    if optimizer is None:
        box = (jnp.broadcast_to(lower[None], flat.shape), jnp.broadcast_to(upper[None], flat.shape))
        answer = _gauss_newton.solve(
            evaluate, goal, scale, begin, clean, *box, rtol, max_steps, polish_steps, key
        )
        best, stationarity, stopped = answer.point, answer.stationarity, answer.stopped
        spent = answer.num_jacobians * target.shape[-1]
    else:
        penalty = None
        if regularizer is not None:
            penalty = lambda points: regularizer(points.reshape(images.shape))  # noqa: E731
        best, spent = _descend(
            evaluate, goal, scale, begin, lower, upper, rtol, max_steps, penalty, optimizer
        )
        stationarity, stopped = jnp.full_like(scale, jnp.nan), jnp.zeros_like(finite)
    features = evaluate(best)
    residual = _numerics.norm((features - goal) / scale[:, None])
    finite &= jnp.isfinite(residual)
    reached = residual <= rtol
    stationarity = jnp.where(reached, jnp.nan, stationarity)  # of nothing but rounding
    status = jnp.select(
        [~finite, reached, stationarity < _FLAT, stopped],
        [
            jnp.full_like(spent, int(member))
            for member in (
                Status.NONFINITE,
                Status.CONVERGED,
                Status.NO_GRADIENT,
                Status.STALLED,
            )
        ],
        jnp.full_like(spent, int(Status.STEP_LIMIT)),
    )
    at_bound = (best == lower[None]) | (best == upper[None])
    kept = jnp.where(finite, 1, jnp.nan).astype(flat.dtype)
    return Inversion(
        image=jnp.where(finite[:, None], best, flat).reshape(images.shape),
        features=features,
        residual=residual * kept,
        pixel_distance=_numerics.norm(best - clean) * kept,
        active=at_bound.mean(-1, dtype=flat.dtype),
        stationarity=stationarity * kept,
        num_blocked=((goal == 0) & (features > 0)).sum(-1, dtype=jnp.int32),
        num_dead=((goal > 0) & (features == 0)).sum(-1, dtype=jnp.int32),
        num_gradients=spent,
        status=status,
    )


def _descend(
    evaluate, goal, scale, start, lower, upper, rtol, max_steps, penalty, optimizer
) -> tuple[Array, Array]:
    """The best point on the path of an optax optimiser, and the gradients spent."""

    def measure(points):
        residual = _numerics.norm((evaluate(points) - goal) / scale[:, None])
        if penalty is None:
            return residual, residual
        return residual, residual**2 / 2 + penalty(points)

    def gradient(points):
        features, pull = jax.vjp(evaluate, points)
        (slope,) = pull((features - goal) / scale[:, None] ** 2)
        if penalty is None:
            return slope
        return slope + jax.grad(lambda points: penalty(points).sum())(points)

    def unfinished(residual):
        return ~(residual <= rtol) if penalty is None else residual == residual

    def running(state):
        return (state[0] < max_steps) & unfinished(state[5]).any()

    def body(state):
        step, points, memory, best, merit, residual, spent = state
        slope = canonical(gradient)(points)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            update, memory = jax.vmap(optimizer.update)(slope, memory, points)
        moved = jnp.clip(points + update, lower[None], upper[None])
        active = unfinished(residual)
        points = jnp.where(active[:, None], moved, points)
        new_residual, new_merit = measure(points)
        better = new_merit < merit
        return (
            step + 1,
            points,
            memory,
            jnp.where(better[:, None], points, best),
            jnp.where(better, new_merit, merit),
            jnp.where(better, new_residual, residual),
            spent + active.astype(jnp.int32),
        )

    spent = jnp.zeros_like(scale, jnp.int32)
    step = jnp.zeros_like(max_steps)
    residual, merit = measure(start)
    state = (step, start, jax.vmap(optimizer.init)(start), start, merit, residual, spent)
    final = lax.while_loop(running, body, state)
    return final[3], final[6]


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
