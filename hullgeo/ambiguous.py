"""Images at which chosen classes tie: min |x - x0| over the box, z_i(x) = z_j(x) >= z_k(x).

Flip points of several classes at once (arXiv:2202.04052): solved in pixels by the Gauss-Newton
method of `inversion.py` on the differences of the logits, from the image itself and from a second
start, an image whose features were moved to a tie of the linear head, say.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from hullgeo import _box, _check, _gauss_newton, _numerics
from hullgeo.result import AmbiguousImage, Status


def ambiguous_image(
    classifier: Any,
    images: Any,
    classes: Any,
    *,
    start: Any = None,
    bounds: Any = (0.0, 1.0),
    atol: Any = 1e-3,
    max_steps: Any = 60,
    key: Any = None,
) -> AmbiguousImage:
    """Images near the given ones at which chosen classes tie and no other exceeds them.

    Args:
      classifier: a `Classifier`, or any traceable function of images `(n, height, width, channels)`
        to logits `(n, num_classes)`, each row on its own.
      images: `(*batch, *image)`, floating point.
      classes: the 2 to num_classes classes that shall tie, distinct, `(k,)` or `(*batch, k)`.
      start: a second start, `(*batch, *image)`: an image whose features were moved to
        `tie_point(...)` by `invert_features`, say; the nearer of the two answers is returned.
      bounds: smallest and largest value of a pixel, numbers or arrays that broadcast to an image.
      atol: tie gap at which the classes count as tied, in logits.
      max_steps: Gauss-Newton steps per start, each one Jacobian of k products.
      key: random key for the small steps tried where a search is stuck; a fixed one if None.

    Returns:
      an `AmbiguousImage`. Guarantee: no pixel leaves the bounds by a bit, and all numbers are those
      of the returned image; its distance is an upper bound of that of the nearest such image. NaN
      or infinity in a row gives that row `NONFINITE`.

    Raises:
      ValueError: for shapes, types, classes or options that do not fit.
    """
    images, batch, num_classes = _box.checked_images(classifier, images)
    shape, size = images.shape[len(batch) :], math.prod(batch)
    lower, upper = _box.checked_bounds(bounds, shape, images.dtype)
    _check.positive("atol", atol)
    _check.at_least("max_steps", max_steps, 1)
    classes = _checked_tie(classes, batch, num_classes)
    starts = [images.reshape(size, -1)]
    if start is not None:
        if start.shape != images.shape:
            _check.fail("start.shape", start.shape, f"to be that of images, {images.shape}")
        starts.append(jnp.asarray(start, images.dtype).reshape(size, -1))
    result = _ambiguous(
        _box.as_pytree(classifier),
        images.reshape(size, *shape),
        jnp.stack(starts),
        classes.reshape(size, -1),
        lower,
        upper,
        jnp.asarray(atol, images.dtype),
        jnp.asarray(max_steps, jnp.int32),
        jax.random.key(0) if key is None else key,
    )
    return jax.tree.map(lambda out: out.reshape(*batch, *out.shape[1:]), result)


@partial(jax.jit)
def _ambiguous(classifier, images, starts, classes, lower, upper, atol, max_steps, key):
    flat = images.reshape(images.shape[0], -1)
    finite = jnp.isfinite(flat).all(-1) & jnp.isfinite(starts).all((0, 2))
    clean = jnp.where(finite[:, None], flat, lower[None])

    def evaluate(points):
        return classifier(points.reshape(-1, *images.shape[1:])).astype(flat.dtype)

    def gaps(points):
        """Differences of the chosen logits, and the excess of the others over them."""
        logits = evaluate(points)
        chosen = jnp.take_along_axis(logits, classes, axis=1)
        member = (
            classes[..., None] == jnp.arange(logits.shape[1], dtype=jnp.int32)[None, None]
        ).any(1)
        rest = jnp.where(member, -jnp.inf, logits).max(-1)
        excess = jnp.maximum(rest - chosen.mean(-1), 0)
        return jnp.concatenate([chosen[:, 1:] - chosen[:, :1], excess[:, None]], axis=1)

    box = (jnp.broadcast_to(lower[None], flat.shape), jnp.broadcast_to(upper[None], flat.shape))
    one = jnp.ones_like(flat[:, 0])
    goal = jnp.zeros((flat.shape[0], classes.shape[1]), flat.dtype)

    def search(start):
        begin = jnp.clip(jnp.where(finite[:, None], start, lower[None]), lower[None], upper[None])
        return _gauss_newton.solve(
            gaps, goal, one, begin, clean, *box, atol, max_steps, max_steps, key
        )

    answers = lax.map(search, starts)
    tied = answers.residual <= atol
    merit = jnp.where(tied, answers.distance, jnp.inf)
    missed = ~tied.any(0)
    choice = jnp.where(
        missed, lax.argmin(answers.residual, 0, jnp.int32), lax.argmin(merit, 0, jnp.int32)
    )
    point = jnp.take_along_axis(answers.point, choice[None, :, None], axis=0)[0]
    logits = evaluate(point)
    residual = _numerics.norm(gaps(point))
    chosen = jnp.take_along_axis(logits, classes, axis=1)
    finite &= jnp.isfinite(residual)
    status = jnp.select(
        [~finite, residual <= atol, answers.stopped.all(0)],
        [
            jnp.full_like(choice, int(member))
            for member in (Status.NONFINITE, Status.CONVERGED, Status.STALLED)
        ],
        jnp.full_like(choice, int(Status.STEP_LIMIT)),
    )
    known = jnp.where(finite, 1, jnp.nan).astype(flat.dtype)
    return AmbiguousImage(
        image=jnp.where(finite[:, None], point, flat).reshape(images.shape),
        distance=_numerics.norm(point - clean) * known,
        logits=logits,
        tie_gap=(chosen.max(-1) - chosen.min(-1)) * known,
        residual=residual * known,
        num_gradients=answers.num_jacobians.sum(0, dtype=jnp.int32) * classes.shape[1],
        status=status,
    )


def _checked_tie(classes: Any, batch: tuple[int, ...], num_classes: int) -> Array:
    """Classes `(*batch, k)`."""
    classes = classes if hasattr(classes, "dtype") else np.asarray(classes)
    if not jnp.issubdtype(classes.dtype, np.integer):
        _check.fail("classes.dtype", str(classes.dtype), "to be an integer type")
    if classes.ndim == 0 or classes.shape[:-1] not in ((), batch):
        _check.fail("classes.shape", classes.shape, f"to be (k,) or (*batch, k), batch {batch}")
    if not 2 <= classes.shape[-1] <= num_classes:
        _check.fail("classes.shape", classes.shape, f"to name 2 to {num_classes} classes")
    if _check.is_concrete(classes):
        ordered = np.sort(np.asarray(classes), axis=-1)
        distinct = (np.diff(ordered, axis=-1) > 0).all()
        if not distinct or ordered.min() < 0 or ordered.max() >= num_classes:
            _check.fail(
                "classes", np.asarray(classes).tolist(),
                f"to be distinct classes from 0 to {num_classes - 1}",
            )  # fmt: skip
    return jnp.broadcast_to(jnp.asarray(classes, jnp.int32), (*batch, classes.shape[-1]))
