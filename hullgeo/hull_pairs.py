"""Convex hulls among themselves: distance of two, diameter of one, the points that span it.

    distance(A, B) = min |a - b|  over a in conv A, b in conv B

is the norm of the shortest element of the Minkowski difference conv A - conv B, whose extreme
points in direction g are differences of extreme points: one product with each set names them
(Wolfe, Math. Program. 11, 1976; Gilbert, Johnson and Keerthi, 1988, in three dimensions). The
diameter of a hull is that of its vertices. A point is extreme if it is the only farthest one in
some direction, and not extreme if it lies inside the hull of others (Clarkson, FOCS 1994).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _check, _numerics, active_set, enclosure, min_norm, planes
from hullgeo.hull import project_to_hull
from hullgeo.min_norm import Named, Nearest
from hullgeo.oracle import exponent_of, power_of_two
from hullgeo.planes import UNIT
from hullgeo.result import ExtremePoints, HullDiameter, HullPair, Status

_BLOCKS = 6  # vertices of each hull named in a pass, besides the best
_ROWS = 1024  # vertices looked at together
_TURNS = 24  # of the directions in which points may be extreme


def hull_to_hull(
    vertices_a: Float[Array | np.ndarray, "vertices_a dim"],
    vertices_b: Float[Array | np.ndarray, "vertices_b dim"],
    *,
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
    max_steps: int | Array = 500,
) -> HullPair:
    """The distance between the convex hulls of two sets of points, with a separating hyperplane.

    Guarantee: the true distance lies in [`distance_lower_bound`, `distance`], rounding included,
    whatever the status.

    Args:
      vertices_a: `(vertices, dim)`, one vertex a row.
      vertices_b: likewise, in the same units.
      rtol: the status is `CONVERGED` where (distance^2 - distance_lower_bound^2) / 2
        <= atol + rtol distance^2 / 2, as in `project_to_hull`.
      atol: see `rtol`, squared units.
      max_steps: limit of passes over all vertices.

    Returns:
      a `HullPair` in the wider of the two types. Hulls that meet are proved to where a ball fits in
      their difference; where they touch up to rounding the status is `PRECISION_LIMIT`.

    Raises:
      ValueError: shapes, types or options that do not fit; a vertex that is not finite (unless
        traced; then the status is `NONFINITE`).
    """
    for name, vertices in (("vertices_a", vertices_a), ("vertices_b", vertices_b)):
        _check_vertices(name, vertices)
    if vertices_a.shape[1] != vertices_b.shape[1]:
        _check.fail("vertices_b.shape", vertices_b.shape, f"to end in dim={vertices_a.shape[1]}")
    _check.nonnegative("rtol", rtol)
    _check.nonnegative("atol", atol)
    _check.at_least("max_steps", max_steps, 1)
    with _numerics.float64():
        tolerances = tuple(jnp.asarray(value).astype(jnp.float64) for value in (rtol, atol))
        steps = jnp.asarray(max_steps).astype(jnp.int32)
        return _hull_to_hull(jnp.asarray(vertices_a), jnp.asarray(vertices_b), tolerances, steps)


def _check_vertices(name: str, vertices: Any) -> None:
    _check.floating(name, vertices)
    _check.shape(name, vertices, (None, None), "(vertices, dim) with at least one vertex")
    _check.all_finite(name, vertices, "Drop the row or repair it.")


@jax.jit
def _hull_to_hull(vertices_a, vertices_b, tolerances, max_steps) -> HullPair:
    dtype = jnp.result_type(vertices_a.dtype, vertices_b.dtype)
    raw = [vertices.astype(jnp.float64) for vertices in (vertices_a, vertices_b)]
    finite = jnp.all(jnp.isfinite(raw[0])) & jnp.all(jnp.isfinite(raw[1]))
    raw = [jnp.where(finite, vertices, 0.0) for vertices in raw]
    # A power of two brings all to order one, exactly.
    spread = jnp.maximum(jnp.max(jnp.abs(raw[0])), jnp.max(jnp.abs(raw[1])))
    exponent = exponent_of(spread)
    first, second = (vertices * power_of_two(-exponent) for vertices in raw)
    center = 0.5 * (jnp.mean(first, axis=0) + jnp.mean(second, axis=0))
    around = [points - center[None, :] for points in (first, second)]
    reach_a, reach_b = (jnp.max(_numerics.norm(points)) for points in around)
    radius = reach_a + reach_b
    dim = first.shape[1]
    rounding = 4 * (dim + 8) * UNIT * radius

    def differences(tags):
        return first[tags[:, :, 0]] - second[tags[:, :, 1]]

    def oracle(direction) -> Named:
        g = direction[0]
        near, at_a = _blocks(_numerics.product(around[0], g))
        far, at_b = _blocks(-_numerics.product(around[1], g))
        best_a, best_b = at_a[_numerics.argmin(near)], at_b[_numerics.argmin(far)]
        same = jnp.zeros_like(at_a)
        tags = jnp.concatenate([
            jnp.stack([best_a, best_b])[None],
            jnp.stack([at_a, same + best_b], axis=1),
            jnp.stack([same + best_a, at_b], axis=1),
        ])[None]  # fmt: skip
        least = (jnp.min(near) + jnp.min(far) - rounding) * (1 - 4 * (dim + 4) * UNIT)
        return Named(differences(tags), tags, least[None])

    start = oracle((jnp.mean(first, axis=0) - jnp.mean(second, axis=0))[None])
    down = power_of_two(-exponent)
    rtol, atol = tolerances[0], tolerances[1] * down * down

    def stop(nearest: Nearest) -> Array:
        upper = _numerics.norm(active_set.combine(nearest.weights, nearest.points))
        return _is_narrow(upper, nearest.lower, rtol, atol)

    found = min_norm.search(
        oracle, start, stop,
        slots=dim + 2 + start.points.shape[1], size=radius[None], max_steps=max_steps,
    )  # fmt: skip
    nearest = jax.tree.map(lambda array: array[0], found)
    weights, rows = nearest.weights, nearest.points
    step = _numerics.product(weights, rows)
    error = 2 * (rows.shape[0] + 8) * UNIT * jnp.sum(weights * _numerics.norm(rows))
    length = _numerics.norm(step) * (1 + 2 * (dim + 4) * UNIT)
    level = jnp.all(first == first[:1], axis=0) & jnp.all(second == first[:1], axis=0)
    overlap = lax.cond(
        (nearest.lower == 0) & (length < 2.0**-20 * radius),
        lambda: enclosure.interior_radius(rows, weights, level, length, error),
        lambda: 0 * length,
    )
    upper = jnp.where(overlap > 0, 0.0, length + error)
    lower = jnp.where(overlap > 0, 0.0, nearest.lower)
    converged = _is_narrow(upper, lower, rtol, atol)
    limit = nearest.num_steps >= max_steps
    failure = jnp.where(limit, jnp.int32(Status.STEP_LIMIT), jnp.int32(Status.PRECISION_LIMIT))
    status = jnp.where(converged, jnp.int32(Status.CONVERGED), failure)
    up, nan = power_of_two(exponent), jnp.where(finite, 0.0, jnp.nan)
    normal = nearest.direction
    offset = 0.5 * (
        jnp.min(_numerics.product(first, normal)) + jnp.max(_numerics.product(second, normal))
    )
    points = [
        (_numerics.product(weights, vertices[nearest.tags[:, side]]) * up + nan).astype(dtype)
        for side, vertices in enumerate((first, second))
    ]
    return HullPair(
        point_a=points[0],
        point_b=points[1],
        distance=_numerics.round_up(upper * up + nan, dtype),
        distance_lower_bound=_numerics.round_down(lower * up + nan, dtype),
        overlap=_numerics.round_down(overlap * up + nan, dtype),
        normal=(normal + nan).astype(dtype),
        offset=(offset * up + nan).astype(dtype),
        gap=(nearest.gap * up * up + nan).astype(dtype),
        num_steps=nearest.num_steps,
        status=jnp.where(finite, status, jnp.int32(Status.NONFINITE)),
    )


def _is_narrow(upper: Any, lower: Any, rtol: Any, atol: Any) -> Array:
    return 0.5 * (upper - lower) * (upper + lower) <= atol + 0.5 * rtol * upper * upper


def _blocks(values: Float[Array, " n"]) -> tuple[Array, Array]:
    """The least value of each of a few blocks of consecutive entries, and where it is."""
    size = -(-values.shape[0] // _BLOCKS)
    padded = jnp.pad(values, (0, size * _BLOCKS - values.shape[0]), constant_values=jnp.inf)
    blocks = padded.reshape(_BLOCKS, size)
    index = planes.first(blocks == jnp.min(blocks, axis=1, keepdims=True))
    flat = index + size * jnp.arange(_BLOCKS, dtype=jnp.int32)
    flat = jnp.minimum(flat, values.shape[0] - 1)
    return values[flat], flat


def hull_diameter(vertices: Float[Array | np.ndarray, "vertices dim"]) -> HullDiameter:
    """The diameter of a convex hull: the largest distance between two of its vertices.

    Exact but for rounding, which both bounds include. Pairs that the distances to the centre
    exclude are never looked at; the others cost one product of the remaining vertices with
    themselves (seconds for 50,000 vertices of 64 dimensions). Host side.

    Args:
      vertices: `(vertices, dim)`, one vertex a row.

    Returns:
      a `HullDiameter`.

    Raises:
      ValueError: a wrong rank or type, no vertices, or a vertex that is not finite.
    """
    _check_vertices("vertices", vertices)
    points = np.asarray(vertices, np.float64)
    dtype = np.dtype(vertices.dtype)
    around = points - points.mean(axis=0)
    radius = np.sqrt(np.sum(around * around, axis=1))
    order = np.argsort(-radius)
    around, radius = around[order], radius[order]
    pair, best = _double_sweep(around)
    # |u|^2 + |v|^2 - 2 <u, v> is right to this much.
    error = 8 * (points.shape[1] + 8) * UNIT * (radius[0] ** 2 if len(radius) else 0.0)
    most = best
    for first in range(0, len(points), _ROWS):
        least = np.sqrt(best) * (1 - 1e-12)
        count = int(np.searchsorted(-radius, radius[first] - least, side="right"))
        if count <= first:
            break
        rows, others = around[first : first + _ROWS], around[first:count]
        square = (radius[first : first + _ROWS, None] ** 2 + radius[None, first:count] ** 2) - 2 * (
            rows @ others.T
        )
        at = np.unravel_index(int(square.argmax()), square.shape)
        most = max(most, float(square[at]))
        if square[at] > best:
            pair, best = (first + int(at[0]), first + int(at[1])), float(square[at])
    one, two = order[pair[0]], order[pair[1]]
    difference = points[one] - points[two]
    size = np.sqrt(np.sum(difference * difference))
    slack = 2 * (points.shape[1] + 8) * UNIT
    with _numerics.float64():
        upper = jnp.asarray(max(np.sqrt(most + error), size) * (1 + slack))
        return HullDiameter(
            diameter=_numerics.round_up(upper, dtype),
            diameter_lower_bound=_numerics.round_down(jnp.asarray(size * (1 - slack)), dtype),
            pair=jnp.asarray([one, two], jnp.int32),
            status=jnp.asarray(int(Status.CONVERGED), jnp.int32),
        )


def _double_sweep(points: np.ndarray) -> tuple[tuple[int, int], float]:
    """A pair far apart: from a point to the farthest, from there to the farthest, and so on."""
    here, best, pair = 0, -1.0, (0, 0)
    for _ in range(8):
        square = np.sum((points - points[here]) ** 2, axis=1)
        there = int(square.argmax())
        if square[there] <= best:
            break
        best, pair, here = float(square[there]), (here, there), there
    return pair, best


def extreme_points(vertices: Float[Array | np.ndarray, "vertices dim"]) -> ExtremePoints:
    """Which points are extreme points of their convex hull, each verdict with its certificate.

    A point is proved extreme by a direction in which it is strictly farthest, and proved not to be
    by a ball around it inside the hull of points already proved extreme. Most extreme points are
    found by their directions from the centre, turned by a perceptron a few times; the others by
    projections onto the hull of those found, which end inside or name a new one. Host side.

    Args:
      vertices: `(vertices, dim)`, one point a row; copies of a point share its verdict.

    Returns:
      an `ExtremePoints`.

    Raises:
      ValueError: a wrong rank or type, no vertices, or a vertex that is not finite.
    """
    _check_vertices("vertices", vertices)
    dtype = np.dtype(vertices.dtype)
    points, back = np.unique(np.asarray(vertices, np.float64), axis=0, return_inverse=True)
    found = _Verdicts(points)
    size = np.linalg.norm(found.around, axis=1, keepdims=True)
    directions = found.around / np.where(size > 0, size, 1.0)
    for _ in range(_TURNS):
        left = np.flatnonzero(found.open)
        directions[left] = found.turn(directions[left], left)
    while len(left := np.flatnonzero(found.open)) and found.num_extreme:
        if not found.project(left[:_ROWS]):
            break
    if len(points) == 1:
        found.margin[:], found.open[:] = np.inf, False
    status = np.where(found.open, Status.PRECISION_LIMIT, Status.CONVERGED).astype(np.int32)
    with _numerics.float64():
        margin = _numerics.round_down(jnp.asarray(np.where(found.open, 0.0, found.margin)), dtype)
        extreme = jnp.asarray(found.margin > 0)
        return ExtremePoints(
            extreme=extreme[back.reshape(-1)],
            direction=jnp.asarray(found.direction.astype(dtype))[back.reshape(-1)],
            margin=margin[back.reshape(-1)],
            status=jnp.asarray(status)[back.reshape(-1)],
        )


class _Verdicts:
    """What is known of distinct points, filled in as directions are looked at."""

    def __init__(self, points: np.ndarray):
        self.points = points
        self.around = points - points.mean(axis=0)
        radius = np.linalg.norm(self.around, axis=1).max(initial=0.0)
        self.rounding = 8 * (points.shape[1] + 8) * UNIT * radius
        self.direction = np.full(points.shape, np.nan)
        self.margin = np.zeros(len(points))
        self.open = np.ones(len(points), bool)

    @property
    def num_extreme(self) -> int:
        return int(np.sum(self.margin > 0))

    def look(self, directions: np.ndarray) -> np.ndarray:
        """Points strictly farthest in some of the directions; the farthest point of each."""
        farthest = np.zeros(len(directions), int)
        for first in range(0, len(directions), _ROWS):
            some = directions[first : first + _ROWS]
            score = self.around @ some.T
            column = np.arange(len(some))
            top = score.argmax(axis=0)
            farthest[first : first + _ROWS] = top
            best = score[top, column]
            score[top, column] = -np.inf
            second = score.max(axis=0, initial=-np.inf)
            margin = best - second - self.rounding
            for one in np.flatnonzero(margin > self.margin[top]):
                self.margin[top[one]] = margin[one]
                self.direction[top[one]] = some[one]
                self.open[top[one]] = False
        return farthest

    def turn(self, directions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Look, and turn each direction so that its point gains on the one that beats it."""
        farthest = self.look(directions)
        gain = self.around[rows] - self.around[farthest]
        size = np.linalg.norm(gain, axis=1, keepdims=True)
        turned = directions + gain / np.where(size > 0, size, 1.0)
        size = np.linalg.norm(turned, axis=1, keepdims=True)
        return np.where(size > 0, turned / np.where(size > 0, size, 1.0), directions)

    def project(self, rows: np.ndarray) -> bool:
        """Project open points onto the hull of the extreme ones; whether anything was learnt."""
        known = np.flatnonzero(self.margin > 0)
        # Of one size each time, compiled once.
        asked = np.resize(rows, min(len(self.points), _ROWS))
        vertices = np.resize(known, len(self.points))
        result = project_to_hull(self.points[asked], self.points[vertices])
        result = jax.tree.map(lambda array: np.asarray(array)[: len(rows)], result)
        inside = np.asarray(result.interior_radius)
        before = int(self.open.sum())
        hit = inside > 0
        self.margin[rows[hit]] = -inside[hit]
        self.open[rows[hit]] = False
        away = (np.asarray(result.distance_lower_bound) > 0) & ~hit
        step = self.points[rows[away]] - np.asarray(result.point)[away]
        size = np.linalg.norm(step, axis=1, keepdims=True)
        self.look(step / np.where(size > 0, size, 1.0))
        return int(self.open.sum()) < before
