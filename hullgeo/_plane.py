"""A plane through three feature vectors, and the exact class cells on it, in NumPy and float64.

On a plane `origin + s u + t v` the logits of a linear head are affine in (s, t), so the cell of a
class is the intersection of half-planes `z_c - z_j >= 0` with the part of the plane that is shown:
a convex polygon, found by clipping (Sutherland and Hodgman 1974), no grid.
"""

import itertools

import numpy as np


def anchors(
    points: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    label: np.ndarray,
    rival: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Three images: the most typical of the three classes that border each other most often."""
    pairs = np.zeros((num_classes, num_classes))
    np.add.at(pairs, (label, rival), 1)
    present = np.isin(np.arange(num_classes), predicted[predicted == labels])
    pairs = (pairs + pairs.T) * present[:, None] * present[None, :]
    first, second = np.unravel_index(int(np.argmax(pairs)), pairs.shape)
    third_score = np.where(present, pairs[first] + pairs[second] + 0.5, 0.0)
    third_score[[first, second]] = 0.0
    chosen = [first, second, int(np.argmax(third_score))] if third_score.any() else [first, second]
    found = []
    for choice in chosen:
        members = np.flatnonzero((predicted == choice) & (labels == choice))
        members = members if len(members) else np.arange(len(points))
        distance = np.linalg.norm(points[members] - points[members].mean(axis=0), axis=1)
        found.append(members[np.argmin(distance)])
    found = list(dict.fromkeys(found))
    while len(found) < 3:  # fewer classes: the image farthest from those chosen
        spread = [np.linalg.norm(points - points[row], axis=1) for row in found]
        found.append(np.argmax(np.min(spread, axis=0)))
    return np.array(found, np.int64)


def axes_through(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origin and two orthonormal axes of the plane through three points, or on their line."""
    origin = corners[0]
    first, second = corners[1] - origin, corners[2] - origin
    rows = []
    units = (np.eye(1, len(origin), index)[0] for index in range(len(origin)))
    for vector in itertools.chain((first, second), units):
        for row in (*rows, *rows):  # twice: orthogonal to rounding
            vector = vector - (vector @ row) * row
        length = np.linalg.norm(vector)
        if length > 1e-9 * max(np.linalg.norm(first), np.linalg.norm(second), 1e-300):
            rows.append(vector / length)
        if len(rows) == 2:
            break
    return origin, np.array(rows)


def cell_polygons(
    logits: np.ndarray, slopes: np.ndarray, view: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The class cells of affine logits on a rectangle: half-planes clipped one by one, no grid.

    Args:
      logits: `(K,)` logits at the origin of the plane.
      slopes: `(2, K)` their derivatives along the two axes.
      view: `(2, 2)` lower and upper corner of the rectangle.

    Returns:
      the polygons' vertices, all in one `(m, 2)` array, the index at which each polygon starts
      (and, last, the number of vertices), and the class of each.
    """
    (left, bottom), (right, top) = view
    rectangle = np.array([[left, bottom], [right, bottom], [right, top], [left, top]])
    order = np.argsort(-(logits + view.mean(axis=0) @ slopes), kind="stable")
    vertices, starts, classes = [], [0], []
    for label in range(len(logits)):
        polygon = rectangle
        for rival in order:
            if rival == label or len(polygon) == 0:
                continue
            offset = logits[label] - logits[rival]
            slope = slopes[:, label] - slopes[:, rival]
            hidden = label > rival and offset == 0 and not slope.any()
            polygon = polygon[:0] if hidden else _clip(polygon, polygon @ slope + offset)
        if len(polygon) >= 3:
            vertices.append(polygon)
            starts.append(starts[-1] + len(polygon))
            classes.append(label)
    joined = np.concatenate(vertices) if vertices else np.zeros((0, 2))
    return joined, np.array(starts, np.int32), np.array(classes, np.int32)


def _clip(polygon: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The part of a convex polygon where an affine function, given at its vertices, is >= 0."""
    if (height >= 0).all():
        return polygon
    kept = []
    for index in range(len(polygon)):
        here, there = height[index - 1], height[index]
        if (here >= 0) != (there >= 0):
            ratio = here / (here - there)
            kept.append(polygon[index - 1] + ratio * (polygon[index] - polygon[index - 1]))
        if there >= 0:
            kept.append(polygon[index])
    return np.array(kept).reshape(-1, 2)


def cells_at(
    where: np.ndarray, vertices: np.ndarray, starts: np.ndarray, classes: np.ndarray
) -> np.ndarray:
    """The class of the polygon under each point `(n, 2)`, -1 where there is none."""
    found = np.full(len(where), -1)
    for polygon, label in zip(np.split(vertices, starts[1:-1]), classes, strict=True):
        edges = np.roll(polygon, -1, axis=0) - polygon
        offsets = where[:, None] - polygon[None]
        left = edges[:, 0] * offsets[..., 1] - edges[:, 1] * offsets[..., 0] >= 0
        found[left.all(axis=1)] = label
    return found


def open_spot(
    polygon: np.ndarray, taken: np.ndarray, half: np.ndarray, grid: int = 40
) -> np.ndarray | None:
    """Where a label fits best into a convex polygon, away from the points taken.

    Args:
      polygon: `(corners, 2)`, counter-clockwise.
      taken: `(n, 2)` points to stay away from.
      half: half the width and height of the label.
      grid: places tried along each axis.

    Returns:
      the centre of the label, None where it does not fit.
    """
    edges = np.roll(polygon, -1, axis=0) - polygon
    length = np.maximum(np.linalg.norm(edges, axis=1), 1e-300)
    ticks = (np.arange(grid) + 0.5) / grid
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    across, up = np.meshgrid(*(low[i] + ticks * (high[i] - low[i]) for i in range(2)))
    spots = np.stack([across.ravel(), up.ravel()], axis=1)
    offsets = spots[:, None] - polygon[None]
    depth = (edges[:, 0] * offsets[..., 1] - edges[:, 1] * offsets[..., 0]) / length
    # How far the label's own corner reaches towards each edge.
    reach = (np.abs(edges[:, 1]) * half[0] + np.abs(edges[:, 0]) * half[1]) / length
    beyond = np.maximum(np.abs(spots[:, None] - taken[None]) - half, 0.0)
    room = np.linalg.norm(beyond, axis=-1).min(axis=1, initial=np.inf)
    score = np.minimum((depth - reach).min(axis=1), room)
    best = int(np.argmax(score))
    return spots[best] if score[best] > 0 else None
