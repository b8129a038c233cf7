"""Classes on a plane through three points: exact in feature space, sampled in pixel space.

On the plane p(s, t) = origin + s u + t v through three feature vectors, (u, v) orthonormal, the
logits of a linear head are affine in (s, t): the cell of each class is a convex polygon, found by
clipping half-planes. Through three images the logits are not affine; a quadtree is refined wherever
the corners and the centre of a square, or any point probed on its border by a neighbour, have
different classes. That is a picture, not a proof: a class smaller than a square may be missed.

Exact regions on slices of piecewise-linear networks without residual connections are computed by
SplineCam (Humayun et al., arXiv:2302.12828).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from hullgeo import _check, _plane
from hullgeo.crossing import check_segments, join_callable, split_callable
from hullgeo.features import LinearHead
from hullgeo.result import PlaneCells, PlaneClasses, Status

# Images evaluated at a time, and squares along a side before refinement.
_BATCH = 256
_COARSEST = 16


def plane_cells(
    head: LinearHead,
    corners: Float[Array | np.ndarray, "3 dim"],
    *,
    margin: float = 0.25,
) -> PlaneCells:
    """The exact class cells of a linear head on the plane through three feature vectors.

    Args:
      head: kernel and bias.
      corners: three feature vectors `(3, dim)`; if they lie on a line, the plane holds that line.
      margin: how far the square shown reaches beyond the corners, in units of their extent.

    Returns:
      `PlaneCells`: polygons in orthonormal coordinates of the plane, lengths as in feature space.

    Raises:
      ValueError: for shapes or numbers that do not fit.

    Guarantee: up to float64 rounding a polygon holds exactly the points of the square at which its
    class has the largest logit, the smallest index among equal ones (Sutherland and Hodgman 1974,
    one clip per rival).
    """
    points, origin, axes, coordinates, view = _layout(corners, margin, 1)
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    if kernel.shape[0] != points.shape[1]:
        _check.fail("corners.shape", points.shape, f"to be (3, dim) = (3, {kernel.shape[0]})")
    vertices, starts, classes = _plane.cell_polygons(origin @ kernel + bias, axes @ kernel, view)
    return PlaneCells(origin, axes, coordinates, view, vertices, starts, classes)


def plane_classes(
    logits_fn: Callable[[Any], Array],
    corners: Shaped[Array | np.ndarray, "..."],
    *,
    resolution: float = 1 / 256,
    margin: float = 0.25,
) -> PlaneClasses:
    """The classes on the plane through three images, refined along the boundaries.

    Works on the host, in batches of forward passes, a small part of what the full grid would take.

    Args:
      logits_fn: images `(*batch, *image)` -> logits `(*batch, num_classes)`, any leading batch; row
        by row, hence in evaluation mode.
      corners: three images `(3, height, width, channels)`, or any other image shape, floating
        point; if they lie on a line, the plane holds that line.
      resolution: side of the smallest squares, in units of the side of the square shown; rounded
        down to a power of two.
      margin: how far the square shown reaches beyond the corners, in units of their extent. Pixels
        may leave [0, 1] there.

    Returns:
      `PlaneClasses` on a grid of points, in orthonormal coordinates of the plane. The status is
      `NONFINITE` where a logit was NaN or infinite, and speaks for the whole picture.

    Raises:
      ValueError: for shapes, dtypes or options that do not fit.

    Guarantee: the classes at points with `evaluated` are those of `logits_fn`; every square that
    was not refined was probed at its corners and its centre, and they agree. No proof for other
    points.
    """
    _check.positive("resolution", resolution)
    if not resolution <= 1:
        _check.fail("resolution", resolution, "to be at most 1")
    images, *_ = check_segments(logits_fn, corners, corners)
    _, origin, axes, coordinates, view = _layout(images, margin, None)
    size = max(_COARSEST, 2 ** math.ceil(math.log2(1 / resolution)))
    ticks = [np.linspace(low, high, size + 1) for low, high in view.T]
    arrays, fixed = split_callable(logits_fn)
    shape = images.shape[1:]
    frame = [jnp.asarray(part.reshape(-1, *shape), images.dtype) for part in (origin, axes)]
    finite = True

    def classes_at(rows, columns):
        nonlocal finite
        spots = np.stack([ticks[0][columns], ticks[1][rows]], 1).astype(images.dtype)
        found = []
        for begin in range(0, len(spots), _BATCH):
            some = spots[begin : begin + _BATCH]
            padded = np.pad(some, [(0, _BATCH - len(some)), (0, 0)], mode="edge")
            label, good = _evaluate(fixed, arrays, *frame, padded)
            found.append(np.asarray(label)[: len(some)])
            finite &= bool(np.all(np.asarray(good)[: len(some)]))
        return np.concatenate(found)

    classes, evaluated = _refine(classes_at, size)
    return PlaneClasses(
        origin.reshape(shape),
        axes.reshape(2, *shape),
        coordinates,
        view,
        classes,
        evaluated,
        np.asarray(evaluated.sum(), np.int32),
        np.asarray(Status.CONVERGED if finite else Status.NONFINITE, np.int32),
    )


def _layout(corners, margin, feature_axes):
    """Points, origin, axes, coordinates and the square shown, in float64."""
    _check.nonnegative("margin", margin)
    points = np.asarray(corners, np.float64)
    if len(points) != 3 or (feature_axes and points.ndim != 2) or not points[0].size:
        _check.fail("corners.shape", points.shape, "to be (3, dim)" if feature_axes else "(3, ...)")
    _check.all_finite("corners", points)
    points = points.reshape(3, -1)
    if points.shape[1] == 1:  # a line is shown as a plane on which the second axis changes nothing
        points = np.concatenate([points, np.zeros((3, 1))], axis=1)
    origin, axes = _plane.axes_through(points)
    coordinates = (points - origin) @ axes.T
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    side = (high - low).max() * (1 + 2 * margin) or 1.0
    middle = (low + high) / 2
    return points, origin, axes, coordinates, np.stack([middle - side / 2, middle + side / 2])


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(fixed, arrays, origin, axes, spots):
    """Class, and whether all logits are finite, at coordinates `(rows, 2)`."""
    columns = spots.reshape(*spots.shape, *[1] * (axes.ndim - 1))
    images = origin + columns[:, 0] * axes[:1] + columns[:, 1] * axes[1:]
    logits = join_callable(arrays, fixed)(images)
    return jnp.argmax(logits, axis=1), jnp.isfinite(logits).all(axis=1)


def _refine(classes_at, size):
    """Classes on a grid of `(size + 1)^2` points, and which were evaluated."""
    known = np.full((size + 1, size + 1), -1, np.int32)
    widths = [size // _COARSEST >> level for level in range((size // _COARSEST).bit_length())]
    leaves = {width: np.zeros((size // width,) * 2, bool) for width in widths}
    leaves[widths[0]][:] = True
    while True:
        wanted = np.zeros(known.shape, bool)
        for width, leaf in leaves.items():
            row, column = np.nonzero(leaf)
            for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
                wanted[(row + down) * width, (column + right) * width] = True
            if width > 1:
                wanted[row * width + width // 2, column * width + width // 2] = True
        row, column = np.nonzero(wanted & (known < 0))
        if len(row):
            known[row, column] = classes_at(row, column)
        refined = False
        for width in widths:
            low = _blocks(np.where(known < 0, np.iinfo(np.int32).max, known), width, np.minimum)
            mixed = leaves[width] & (low != _blocks(known, width, np.maximum))
            if width > 1 and mixed.any():
                refined = True
                leaves[width] &= ~mixed
                leaves[width // 2] |= np.repeat(np.repeat(mixed, 2, 0), 2, 1)
        if not refined:
            break
    evaluated = known >= 0
    for width, leaf in leaves.items():
        for row, column in np.argwhere(leaf) * width:
            block = known[row : row + width + 1, column : column + width + 1]
            block[block < 0] = block[0, 0]
    return known, evaluated


def _blocks(grid, width, reduce):
    """Minimum or maximum over each square of points, its border included."""
    for axis in (0, 1):
        size = grid.shape[axis] - 1
        inner, last = np.split(grid, [size], axis)
        parts = inner.reshape(*inner.shape[:axis], size // width, width, *inner.shape[axis + 1 :])
        closing = np.concatenate([np.take(grid, range(width, size, width), axis), last], axis)
        grid = reduce(reduce.reduce(parts, axis + 1), closing)
    return grid
