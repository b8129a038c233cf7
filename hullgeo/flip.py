"""The nearest image of another class: min |x - x0| over the box such that z_j(x) >= z_c(x).

Four phases. *Scouting*: for the nearest rivals j, ranked by the distance at which the linearised
logits tie within the box, the decoupled direction and norm method (Rony et al. 2019,
arXiv:1811.09600), targeted, its radius started at that distance. *Settling*: from the image again,
to the rival found nearest, an augmented Lagrangian descent (Rony et al. 2021, arXiv:2011.11857),
which shakes off local minima. *Polish*: sequential quadratic programming; x0 is projected onto the
last linearisations of z_j - z_c within the box, each point pulled to the boundary along its ray.
*Bracket*: bisection along the ray through the best point, whose two ends are then moved apart until
the logits differ by more than the rounding of the network, so that both hold when evaluated again,
alone or in any batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from hullgeo import _box, _check, _flip_search, _numerics
from hullgeo.result import Flip, Status

_MAX_CANDIDATES = 10  # classes whose linearised distance is computed
_MAX_SCOUT = 30  # steps to tell which rival is nearest
_MIN_SETTLE = 30  # fewer steps of that descent find nothing nearer
_MAX_POLISH = 24


def nearest_flip(
    classifier: Callable[[Any], Any],
    images: Any,
    *,
    target: Any = None,
    labels: Any = None,
    bounds: Any = (0.0, 1.0),
    mask: Any = None,
    subspace: Any = None,
    start: Any = None,
    budget: Any = 100,
    num_rivals: int = 3,
    num_starts: int = 1,
    key: Any = None,
) -> Flip:
    """The closest image found, in the Euclidean norm and within bounds, of another class.

    Args:
      classifier: a `Classifier`, or any traceable function of images `(n, height, width, channels)`
        to logits `(n, num_classes)`, each row on its own. A pytree is passed to the compiled
        program as an argument; another function is part of the program, so pass the same object
        every time.
      images: `(*batch, *image)`, floating point. What lies outside the bounds is clipped into them
        before the search; distances are to the images as given.
      target: class to reach, an integer or `(*batch,)`; any other class if None. An image that has
        it already is returned with distance 0.
      labels: class to leave, `(*batch,)`; the class of the image if None. With labels, an image of
        another class already is returned with distance 0: the distance to *its label's* boundary.
      bounds: smallest and largest value of a pixel, numbers or arrays that broadcast to an image.
      mask: true where a pixel may change, broadcast to an image.
      subspace: directions `(k, *image)` in whose span the displacement lies, up to rounding and to
        the bounds, which come first.
      start: images `(*batch, *image)` to continue from, `flip.image` of a former call, say. Where
        one is a flip, the answer is at least as near.
      budget: gradients per image at most.
      num_rivals: classes descended to, nearest first.
      num_starts: descents per rival; the first starts at the image, the others at random nearby.
      key: random key for these; a fixed one if None.

    Returns:
      a `Flip`, an upper bound of the distance to the boundary with both sides of it. NaN or
      infinity in a row gives that row `NONFINITE`; a constant classifier, a saturated one, or a
      mask that leaves nothing free, `NO_GRADIENT`.

    Raises:
      ValueError: for shapes, types, classes or options that do not fit.
    """
    images, batch, num_classes = _box.checked_images(classifier, images)
    shape = images.shape[len(batch) :]
    size = math.prod(batch)
    lower, upper = _box.checked_bounds(bounds, shape, images.dtype)
    for name, value, minimum in (("num_rivals", num_rivals, 1), ("num_starts", num_starts, 1)):
        _check.at_least(name, value, minimum)
    targeted = target is not None
    candidates = 1 if targeted else min(num_classes - 1, _MAX_CANDIDATES)
    lanes = min(num_rivals, candidates) * num_starts
    _check.at_least("budget", budget, candidates + 2 * lanes + 3)
    spare = jnp.asarray(budget, jnp.int32) - candidates - 1
    polish = jnp.clip(spare // 8, 1, _MAX_POLISH)
    scout = jnp.minimum(spare // (2 * lanes), _MAX_SCOUT)
    settle = spare - polish - lanes * scout
    scout = jnp.where(settle < _MIN_SETTLE, (spare - polish) // lanes, scout)
    settle = jnp.where(settle < _MIN_SETTLE, 0, settle)
    steps = _Steps(scout, settle, polish)
    result = _nearest_flip(
        _box.as_pytree(classifier),
        images.reshape(size, *shape),
        _checked_classes("target", target, batch, num_classes),
        _checked_classes("labels", labels, batch, num_classes),
        lower,
        upper,
        None if mask is None else _checked_mask(mask, shape),
        None if subspace is None else _checked_subspace(subspace, shape, images.dtype),
        None if start is None else _checked_start(start, images).reshape(size, *shape),
        jax.random.key(0) if key is None else key,
        steps,
        candidates=candidates,
        num_rivals=min(num_rivals, candidates),
        num_starts=num_starts,
    )
    return jax.tree.map(lambda out: out.reshape(*batch, *out.shape[1:]), result)


class _Steps(NamedTuple):
    """How the budget is spent; traced, so that another budget compiles nothing."""

    scout: Int[Array, ""]  # per lane
    settle: Int[Array, ""]
    polish: Int[Array, ""]


@partial(jax.jit, static_argnames=("candidates", "num_rivals", "num_starts"))
def _nearest_flip(
    classifier, images, target, labels, lower, upper, mask, subspace, start, key, steps,
    *, candidates, num_rivals, num_starts,
) -> Flip:  # fmt: skip
    shape, dtype = images.shape[1:], images.dtype
    given = images.reshape(images.shape[0], -1)
    finite = jnp.isfinite(given).all(-1)
    origin = jnp.where(finite[:, None], given, lower[None])
    inside = jnp.clip(origin, lower[None], upper[None])
    free = jnp.ones_like(lower, bool) if mask is None else mask

    def evaluate(points):
        return classifier(points.reshape(-1, *shape)).astype(dtype)

    logits = evaluate(inside)
    finite &= jnp.isfinite(logits).all(-1)
    predicted = lax.argmax(logits, 1, jnp.int32)
    problem = _flip_search.Problem(
        origin=origin,
        lower=jnp.where(free[None], lower[None], inside),
        upper=jnp.where(free[None], upper[None], inside),
        leave=predicted if labels is None else labels,
        enter=jnp.full_like(predicted, -1) if target is None else target,
        basis=None if subspace is None else _flip_search.orthonormal(subspace),
    )
    already = problem.margin(logits) > 0
    nearest = _flip_search.nearest_rivals(evaluate, problem, logits, candidates, num_rivals)
    begin = None if start is None else start.reshape(given.shape) - origin
    scout = _scout(evaluate, problem, nearest, begin, key, steps.scout, num_starts)
    found = _flip_search.settle(evaluate, problem, logits, scout, steps.settle)
    found = _flip_search.polish(evaluate, problem, found, steps.polish)
    flip = _flip_search.bracket(evaluate, problem, found.point)
    residual = _flip_search.kkt_residual(evaluate, problem, flip.point, flip.rival)
    status = jnp.select(
        [~finite, already, ~(flip.reached | found.sloped), ~flip.reached, ~flip.confirmed],
        [
            jnp.full_like(predicted, int(member))
            for member in (
                Status.NONFINITE,
                Status.CONVERGED,
                Status.NO_GRADIENT,
                Status.STALLED,
                Status.PRECISION_LIMIT,
            )
        ],
        jnp.full_like(predicted, int(Status.CONVERGED)),
    )
    there = flip.reached & ~already & finite

    def choose(flipped, otherwise):
        return jnp.where(there[(...,) + (None,) * (flipped.ndim - 1)], flipped, otherwise)

    offset = jnp.where(already, _numerics.norm(inside - origin), jnp.inf)
    offset = jnp.where(finite, offset, jnp.nan)
    stay = jnp.where(finite[:, None], inside, given)
    return Flip(
        image=choose(flip.point, stay).reshape(images.shape),
        distance=choose(flip.distance, offset),
        image_before=choose(flip.before, stay).reshape(images.shape),
        distance_before=choose(flip.distance_before, offset),
        label=problem.leave,
        rival=choose(flip.rival, jnp.where(already, predicted, problem.leave)),
        tie_gap=choose(flip.margin, jnp.where(finite, problem.margin(logits), jnp.nan)),
        kkt_residual=choose(residual, jnp.where(already & finite, 0, jnp.nan).astype(dtype)),
        num_gradients=jnp.full_like(predicted, candidates + 1)
        + steps.scout * num_rivals * num_starts
        + steps.settle
        + steps.polish,
        num_evaluations=jnp.full_like(predicted, _flip_search.FORWARD + 1),
        status=status,
    )


def _scout(evaluate, problem, nearest, begin, key, num_steps, num_starts):
    """The nearest flip of each row over the descents from every start to every rival."""
    rival, reach = nearest
    size, num_rivals = rival.shape
    lanes = size * num_rivals * num_starts

    def spread(array):  # (n, rivals, ...) to lanes, the starts innermost
        wide = jnp.repeat(array[:, :, None], num_starts, axis=2)
        return wide.reshape(lanes, *array.shape[2:])

    row = jnp.repeat(jnp.arange(size, dtype=jnp.int32), num_rivals * num_starts)
    first = jnp.arange(lanes, dtype=jnp.int32) % num_starts == 0
    span = problem.upper - problem.lower
    floor = 1e-5 * _numerics.norm(jnp.where(jnp.isfinite(span), span, 1))
    radius = 1.5 * reach.min(1)
    radius = jnp.where(jnp.isfinite(radius), jnp.maximum(radius, floor), 1e3 * floor)
    radius = radius[row]
    key, noise_key = jax.random.split(key)
    own = jax.random.normal(noise_key, (lanes // size, span.shape[-1]), radius.dtype)
    noise = jnp.tile(own, (size, 1))  # a row's answer does not depend on the others
    noise = problem.rows(row).project(noise * (radius / math.sqrt(span.shape[-1]))[:, None])
    begin = jnp.zeros_like(problem.origin) if begin is None else problem.project(begin)
    displacement = jnp.where(first[:, None], begin[row], noise)
    length = _numerics.norm(displacement)
    radius = jnp.where(first & (length > 0), length, radius)
    found = _flip_search.descend(
        evaluate, problem.rows(row), spread(rival), radius, displacement, num_steps, key,
        lanes // size,
    )  # fmt: skip
    per_row = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), found)
    best = lax.argmin(per_row.distance, 1, jnp.int32)

    def pick(array):
        index = best.reshape(size, 1, *(1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, index, axis=1)[:, 0]

    return jax.tree.map(pick, per_row)._replace(sloped=per_row.sloped.any(1))


def _checked_classes(name: str, classes: Any, batch: tuple[int, ...], num_classes: int) -> Any:
    """Classes of the flattened batch, or None."""
    if classes is None:
        return None
    classes = classes if hasattr(classes, "dtype") else np.asarray(classes)
    if not jnp.issubdtype(classes.dtype, np.integer):
        _check.fail(f"{name}.dtype", str(classes.dtype), "to be an integer type")
    if classes.shape not in ((), batch):
        _check.fail(f"{name}.shape", classes.shape, f"to be () or the batch {batch}")
    if _check.is_concrete(classes):
        wrong = np.asarray((classes < 0) | (classes >= num_classes))
        if wrong.any():
            value = int(np.asarray(classes)[wrong][0])
            _check.fail(name, value, f"to be a class from 0 to {num_classes - 1}")
    return jnp.broadcast_to(jnp.asarray(classes, jnp.int32), batch).reshape(-1)


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
    if mask.dtype != bool:
        _check.fail("mask.dtype", str(mask.dtype), "to be bool, true where a pixel may change")
    return jnp.broadcast_to(jnp.asarray(mask), shape).reshape(-1)


def _checked_subspace(subspace: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    subspace = subspace if hasattr(subspace, "dtype") else np.asarray(subspace)
    _check.shape("subspace", subspace, (None, *shape), f"(k, *image) with image {shape}")
    flat = jnp.asarray(subspace, dtype).reshape(subspace.shape[0], -1)
    if flat.shape[0] > flat.shape[1]:
        _check.fail("subspace.shape", subspace.shape, f"to have at most {flat.shape[1]} directions")
    return flat


def _checked_start(start: Any, images: Array) -> Array:
    start = start if hasattr(start, "dtype") else np.asarray(start)
    if start.shape != images.shape:
        _check.fail("start.shape", start.shape, f"to be that of images, {images.shape}")
    return jnp.asarray(start, images.dtype)
