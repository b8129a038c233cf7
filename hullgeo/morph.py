"""Between two images: what the network sees on the way, and images that follow its feature space.

A pixel blend (1 - s) a + s b leaves the segment between the features of a and b; the *feature* path
inverts that segment, frame by frame: the image nearest to the blend at s whose features are
(1 - s) phi(a) + s phi(b) (arXiv:2202.04052, section 5, asks what lies between two images for the
network). The *boundary* path goes through the nearest points of the boundary between the two
classes instead: phi(a), its projection onto that boundary, that of phi(b), phi(b).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from hullgeo import _box, _check, _gauss_newton, _numerics
from hullgeo.crossing import find_crossing
from hullgeo.features import Classifier, LinearHead
from hullgeo.result import Morph, Status

_PATHS = ("features", "pixels", "boundary")


def morph(
    classifier: Classifier,
    image_a: Any,
    image_b: Any,
    *,
    num_frames: int = 9,
    path: str = "features",
    bounds: Any = (0.0, 1.0),
    rtol: Any = 1e-2,
    max_steps: Any = 20,
    xtol: Any = 1e-4,
) -> Morph:
    """Images from one to another, with their features, classes and the places where these change.

    Args:
      classifier: features and a linear head.
      image_a: where it starts, `(*batch, *image)`, floating point within the bounds.
      image_b: where it ends, likewise.
      num_frames: images, both ends included, at least 2.
      path: "features" (the segment between the features, inverted), "pixels" (the blend), or
        "boundary" (over the nearest points of the boundary between the two classes, inverted; the
        segment where both images have one class).
      bounds: smallest and largest value of a pixel, numbers or arrays that broadcast to an image.
      rtol: residual at which a frame's features count as reached, relative to the target's norm.
      max_steps: Gauss-Newton steps per frame at most, each one Jacobian of `dim` products.
      xtol: width of the brackets around changes of class, relative to the step between frames.

    Returns:
      a `Morph` of `num_frames` images. Guarantee: no pixel leaves the bounds by a bit, and all
      numbers are those of the returned frames. NaN or infinity in a row gives that row
      `NONFINITE`. The first and the last are the given ones, clipped into the
      bounds. Each
      frame is the one near the blend, its search started from the frame before it. To
      see where they leave the training data, pass `morph.features` to `project_to_hull`.

    Raises:
      ValueError: for shapes, types or options that do not fit.
    """
    if not isinstance(classifier, Classifier):
        _check.fail(
            "classifier", type(classifier).__name__, "to be a Classifier",
            "Make one with from_linen, from_nnx or from_callables.",
        )  # fmt: skip
    image_a, image_b = (a if hasattr(a, "dtype") else jnp.asarray(a) for a in (image_a, image_b))
    for name, image in (("image_a", image_a), ("image_b", image_b)):
        _check.floating(name, image)
    if image_a.shape != image_b.shape:
        _check.fail("image_b.shape", image_b.shape, f"to be that of image_a, {image_a.shape}")
    _check.at_least("num_frames", num_frames, 2)
    _check.one_of("path", path, _PATHS)
    _check.nonnegative("rtol", rtol)
    _check.at_least("max_steps", max_steps, 1)
    image_a, image_b = jnp.asarray(image_a), jnp.asarray(image_b, image_a.dtype)
    batch = jax.eval_shape(classifier.features, image_a).shape[:-1]
    shape, size = image_a.shape[len(batch) :], math.prod(batch)
    lower, upper = _box.checked_bounds(bounds, shape, image_a.dtype)
    frames, targets, features, logits, residual, spent, status = _morph(
        classifier,
        image_a.reshape(size, *shape),
        image_b.reshape(size, *shape),
        lower,
        upper,
        jnp.asarray(rtol, image_a.dtype),
        jnp.asarray(max_steps, jnp.int32),
        num_frames=num_frames,
        path=path,
    )
    on_device = jax.tree.map(jnp.asarray, classifier)
    crossings = find_crossing(on_device, frames[:, :-1], frames[:, 1:], xtol=xtol)
    top = lax.top_k(logits, 2)[0]
    result = Morph(
        images=frames,
        features=features,
        targets=targets,
        residual=residual,
        labels=lax.argmax(logits, logits.ndim - 1, jnp.int32),
        margin=top[..., 0] - top[..., 1],
        crossings=crossings,
        num_gradients=spent,
        status=status,
    )
    return jax.tree.map(lambda out: out.reshape(*batch, *out.shape[1:]), result)


@partial(jax.jit, static_argnames=("num_frames", "path"))
def _morph(classifier, image_a, image_b, lower, upper, rtol, max_steps, *, num_frames, path):
    size, shape = image_a.shape[0], image_a.shape[1:]
    ends = jnp.stack([image_a, image_b]).reshape(2, size, -1)
    finite = jnp.isfinite(ends).all((0, 2))
    box = (lower[None, None], upper[None, None])
    ends = jnp.clip(jnp.where(finite[None, :, None], ends, box[0]), *box)
    position = jnp.linspace(0, 1, num_frames, dtype=ends.dtype)
    weight = position[:, None, None]
    blends = jnp.clip((1 - weight) * ends[:1] + weight * ends[1:], *box)

    def evaluate(points):
        return classifier.features(points.reshape(-1, *shape)).astype(ends.dtype)

    feature_ends = evaluate(ends.reshape(2 * size, -1)).reshape(2, size, -1)
    targets = _path(feature_ends, position, classifier.head, path)
    norm = _numerics.norm(targets)
    scale = jnp.where(norm > 0, norm, 1)
    if path == "pixels":
        points, jacobians = blends, jnp.zeros((num_frames, size), jnp.int32)
    else:
        points, jacobians = _follow(evaluate, blends, targets, scale, lower, upper, rtol, max_steps)
    features = lax.map(evaluate, points)
    residual = _numerics.norm((features - targets) / scale[..., None])
    dim = features.shape[-1]
    status = jnp.where(residual <= rtol, int(Status.CONVERGED), int(Status.STEP_LIMIT))
    status = jnp.where(path == "pixels", int(Status.CONVERGED), status)
    finite &= jnp.isfinite(features).all((0, 2))
    status = jnp.where(finite[None], status, int(Status.NONFINITE)).astype(jnp.int32)
    given = jnp.where(finite[None, :, None], points, jnp.nan)
    images = given.reshape(num_frames, size, *shape)
    logits = classifier.head(features).astype(ends.dtype)
    outputs = (images, targets, features, logits, residual, jacobians * dim, status)
    return tuple(jnp.moveaxis(out, 0, 1) for out in outputs)


def _path(ends: Array, position: Array, head: LinearHead, path: str) -> Array:
    """Features to reach at each position, `(frames, n, dim)`."""
    if path != "boundary":
        weight = position[:, None, None]
        return (1 - weight) * ends[:1] + weight * ends[1:]
    logits = head(ends).astype(ends.dtype)
    label_a, label_b = lax.argmax(logits, 2, jnp.int32)
    columns = jnp.asarray(head.kernel, ends.dtype).T
    normal = columns[label_b] - columns[label_a]
    gap = _pick(logits, label_b) - _pick(logits, label_a)
    square = (normal**2).sum(-1)
    length = -gap / jnp.where(square > 0, square, 1)[None]
    met = ends + length[..., None] * normal[None]
    nonnegative = (ends >= 0).all((0, 2))
    met = jnp.where(nonnegative[None, :, None], jnp.maximum(met, 0), met)
    corners = jnp.stack([ends[0], met[0], met[1], ends[1]])
    straight = (label_a == label_b)[None, :, None]
    third = jnp.asarray([1 / 3, 2 / 3], ends.dtype)[:, None, None]
    inner = jnp.where(straight, (1 - third) * ends[:1] + third * ends[1:], corners[1:3])
    corners = jnp.concatenate([ends[:1], inner, ends[1:]])
    along = 3 * position
    piece = jnp.clip(jnp.floor(along).astype(jnp.int32), 0, 2)
    weight = (along - piece.astype(along.dtype))[:, None, None]
    return (1 - weight) * corners[piece] + weight * corners[piece + 1]


def _pick(logits: Array, label: Array) -> Array:
    """The logits `(2, n)` of one class per row."""
    index = jnp.broadcast_to(label[None, :, None], (*logits.shape[:2], 1))
    return jnp.take_along_axis(logits, index, axis=2)[..., 0]


def _follow(evaluate, blends, targets, scale, lower, upper, rtol, max_steps):
    """Invert the targets one after the other, each started from the offset of the one before."""
    key = jax.random.key(0)

    def body(offset, frame):
        blend, target, scale = frame
        box = (
            jnp.broadcast_to(lower[None], blend.shape),
            jnp.broadcast_to(upper[None], blend.shape),
        )
        start = jnp.clip(blend + offset, lower[None], upper[None])
        answer = _gauss_newton.solve(
            evaluate, target, scale, start, blend, *box, rtol, max_steps, max_steps // 2, key
        )
        return answer.point - blend, (answer.point, answer.num_jacobians)

    inner = jax.tree.map(lambda a: a[1:-1], (blends, targets, scale))
    _, (points, jacobians) = lax.scan(body, jnp.zeros_like(blends[0]), inner)
    points = jnp.concatenate([blends[:1], points, blends[-1:]])
    return points, jnp.pad(jacobians, ((1, 1), (0, 0)))
