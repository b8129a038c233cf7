"""What a cloud of feature vectors looks like, in NumPy and float64: spectrum, dimension, diameter.

The intrinsic dimension is TwoNN's (Facco et al. 2017, arXiv:1803.06992): for points that are
locally uniform in `m` dimensions, the ratio mu of the distances to the second and the first
neighbour has the density `m mu^(-m-1)`, so that

    m = (n - 1) / sum_i log mu_i        (unbiased; its standard error is m / sqrt(n - 2)).
"""

from typing import Any, NamedTuple

import numpy as np

_BLOCK_SIZE = 2**24  # distances at a time: 128 MiB


class Dimension(NamedTuple):
    """An estimate of the intrinsic dimension; NaN where too few distinct points say anything."""

    estimate: float
    standard_error: float
    num_points: int


def squared_distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`(n, m)` squared distances by one product, for points centred near the origin."""
    squares = np.einsum("id,id->i", rows, rows)[:, None] + np.einsum("jd,jd->j", others, others)
    return np.maximum(squares - 2.0 * rows @ others.T, 0.0)


def nearest(rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and distance of the nearest of `others` to each row."""
    center = np.asarray(others, np.float64).mean(axis=0)
    wide, far = rows - center, others - center
    index = np.argmin(squared_distances(wide, far), axis=1)
    return index, np.linalg.norm(wide - far[index], axis=1)


def spectrum(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and the variances along the principal axes, descending, summing to the total."""
    points = np.asarray(points, np.float64)
    mean = points.mean(axis=0)
    small = points.shape[0] < points.shape[1]
    centred = points - mean
    matrix = centred @ centred.T if small else centred.T @ centred
    return mean, np.maximum(np.linalg.eigvalsh(matrix)[::-1], 0.0) / points.shape[0]


def two_nn(points: np.ndarray, *, max_points: int = 5000, seed: int = 0) -> Dimension:
    """Intrinsic dimension from the two nearest neighbours of at most `max_points` points.

    Neighbours are sought among all points; exact duplicates count once.
    """
    points = np.unique(np.asarray(points, np.float64), axis=0)
    points = points - points.mean(axis=0)
    size = points.shape[0]
    if size < 4:
        return Dimension(np.nan, np.nan, size)
    chosen = np.sort(np.random.default_rng(seed).permutation(size)[:max_points])
    logs = []
    for start in range(0, len(chosen), block := _block(size)):
        rows = chosen[start : start + block]
        squares = squared_distances(points[rows], points)
        squares[np.arange(len(rows)), rows] = np.inf
        nearest = np.argpartition(squares, 1, axis=1)[:, :2]
        distances = np.linalg.norm(points[rows, None] - points[nearest], axis=-1)
        logs.append(np.log(distances.max(axis=1) / distances.min(axis=1)))
    total = float(np.sum(np.concatenate(logs)))
    count = len(chosen)
    estimate = (count - 1) / total if total > 0 else np.nan
    return Dimension(estimate, estimate / np.sqrt(count - 2), count)


def diameter(points: Any, *, max_pairs: int = 4_000_000_000) -> tuple[float, float]:
    """A bracket [lower, upper] of the largest distance between two points.

    `lower` is the distance of an actual pair, less its rounding. A pair can only be farther apart
    if the distances of its two points from the centre sum to more; where these candidates are few
    enough, all of them are compared and the bracket is as narrow as rounding, otherwise `upper` is
    the sum of the two largest distances from the centre.
    """
    points = np.asarray(points, np.float64)
    centred = points - points.mean(axis=0)
    slack = 8 * (points.shape[1] + 8) * np.finfo(np.float64).eps
    radius = np.linalg.norm(centred, axis=1)
    far = int(np.argmax(radius))
    lower = 0.0
    for _ in range(4):
        distances = np.linalg.norm(centred - centred[far], axis=1)
        far = int(np.argmax(distances))
        lower = max(lower, float(distances[far]))
    largest = np.sort(radius)[-2:]
    upper = float(np.sum(largest)) if len(radius) > 1 else 0.0
    candidates = centred[radius + radius.max() >= lower]
    if len(candidates) ** 2 / 2 <= max_pairs:
        square = 0.0
        for start in range(0, len(candidates), block := _block(len(candidates))):
            rows, others = candidates[start : start + block], candidates[start:]
            squares = squared_distances(rows, others)
            first, second = np.unravel_index(int(np.argmax(squares)), squares.shape)
            square = max(square, float(squares[first, second]))
            lower = max(lower, float(np.linalg.norm(rows[first] - others[second])))
        # The products round relative to the squared radii, which the diameter bounds.
        upper = max(lower, float(np.sqrt(square + slack * float(radius.max()) ** 2)))
    return lower * (1 - slack), upper * (1 + slack)


def _block(columns: int) -> int:
    """Rows of a table of distances with so many columns that fit the memory allowed."""
    return max(1, _BLOCK_SIZE // columns)
