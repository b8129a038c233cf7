"""Pairs of hulls against DAQP, diameters by brute force, extreme points against Qhull."""

import daqp
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import scipy.spatial

from hullgeo import Status, extreme_points, hull_diameter, hull_to_hull


def daqp_distance(first, second):
    """Both sets of weights at once; exact up to the small regularisation DAQP needs."""
    count = [len(first), len(second)]
    rows = np.vstack([first, -second]) - np.vstack(
        [[first.mean(0)] * count[0], [-first.mean(0)] * count[1]]
    )
    total = sum(count)
    sums = np.zeros((2, total))
    sums[0, : count[0]] = sums[1, count[0] :] = 1
    weights, *_ = daqp.solve(
        rows @ rows.T + 1e-12 * np.eye(total), np.zeros(total), sums,
        np.append(np.full(total, 1e30), [1.0, 1.0]), np.append(np.zeros(total), [1.0, 1.0]),
        np.append(np.zeros(total), [5, 5]).astype(np.int32),
    )  # fmt: skip
    return np.linalg.norm(weights @ rows)


@hypothesis.given(seed=st.integers(0, 10**6), shift=st.sampled_from([0.0, 1.0, 2.0, 4.0]))
def test_distance_agrees_with_daqp(seed, shift):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(20, 4)), rng.normal(size=(15, 4))
    second[:, 0] += shift
    result = hull_to_hull(first, second)
    reference = daqp_distance(first, second)
    assert result.distance_lower_bound <= reference + 1e-7
    assert reference <= result.distance + 1e-5
    assert int(result.status) == Status.CONVERGED
    if result.distance_lower_bound > 0:
        assert float(result.overlap) == 0
        normal, offset = np.asarray(result.normal), float(result.offset)
        half = float(result.distance_lower_bound) / 2
        assert (first @ normal >= offset + half * (1 - 1e-6)).all()
        assert (second @ normal <= offset - half * (1 - 1e-6)).all()
        gap = np.linalg.norm(result.point_a - result.point_b)
        np.testing.assert_allclose(gap, result.distance, rtol=1e-9)
    else:
        # They still meet when pulled apart by less than the overlap.
        direction = rng.normal(size=4)
        step = 0.99 * float(result.overlap) * direction / np.linalg.norm(direction)
        assert daqp_distance(first, second + step) < 1e-5


def test_known_pairs_and_degenerate_hulls():
    square = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    apart = hull_to_hull(square, square + np.array([3.0, 0.25]))
    np.testing.assert_allclose(apart.distance, 2.0, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(apart.normal), [-1.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(apart.offset, -2.0, rtol=1e-9)
    points = hull_to_hull(np.ones((4, 2)), np.zeros((4, 2)))
    np.testing.assert_allclose(points.distance, np.sqrt(2), rtol=1e-14)
    assert int(points.status) == Status.CONVERGED
    same = hull_to_hull(np.ones((4, 2)), np.ones((4, 2)))
    assert float(same.distance) < 1e-14
    touching = hull_to_hull(square, square + np.array([1.0, 0.0]))
    assert float(touching.distance_lower_bound) <= 0 <= float(touching.distance) < 1e-12
    assert float(touching.overlap) == 0
    inside = hull_to_hull(square, 0.25 * square + np.array([0.3, 0.4]))
    assert float(inside.distance) == 0
    assert 0 < float(inside.overlap) <= 0.55 + 1e-9


def test_scales_float32_and_transforms():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(20, 4)), rng.normal(size=(15, 4)) + np.eye(4)[0] * 4
    expected = hull_to_hull(first, second)
    for scale in (1e-20, 1e15):
        narrow = hull_to_hull(
            (first * scale).astype(np.float32), (second * scale).astype(np.float32)
        )
        assert narrow.distance.dtype == np.float32
        np.testing.assert_allclose(float(narrow.distance) / scale, expected.distance, rtol=1e-5)
    for scale in (1e-150, 1e150):
        wide = hull_to_hull(first * scale, second * scale)
        np.testing.assert_allclose(float(wide.distance) / scale, expected.distance, rtol=1e-6)
    traces = []

    def solve(first, second, rtol):
        traces.append(1)
        return hull_to_hull(first, second, rtol=rtol)

    compiled = jax.jit(jax.vmap(solve, (None, 0, None)))
    broken = second.copy()
    broken[3] = np.nan
    for rtol in (1e-3, 1e-6):
        mapped = compiled(first, np.stack([second, broken]), rtol)
        np.testing.assert_array_equal(mapped.status, [Status.CONVERGED, Status.NONFINITE])
    assert len(traces) == 1
    np.testing.assert_allclose(mapped.distance[0], expected.distance, rtol=1e-9)


@pytest.mark.slow
def test_without_float64_enabled():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(20, 4)), rng.normal(size=(15, 4)) + np.eye(4)[0] * 4
    with jax.enable_x64(False):
        kept = jax.jit(hull_to_hull)(first.astype(np.float32), second.astype(np.float32))
    assert kept.distance.dtype == np.float32
    np.testing.assert_allclose(kept.distance, hull_to_hull(first, second).distance, rtol=1e-5)


def test_admits_failure():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(20, 4)), rng.normal(size=(15, 4)) + np.eye(4)[0] * 2
    short = hull_to_hull(first, second, max_steps=1)
    full = hull_to_hull(first, second)
    assert int(short.status) == Status.STEP_LIMIT
    assert short.distance_lower_bound <= full.distance
    assert full.distance_lower_bound <= short.distance


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 37, 2500])
def test_diameter_by_brute_force(dtype, count):
    points = (np.random.default_rng(count).normal(size=(count, 5)) + 100).astype(dtype)
    result = hull_diameter(points)
    exact = scipy.spatial.distance.pdist(points.astype(np.float64)).max(initial=0.0)
    assert result.diameter.dtype == dtype
    assert float(result.diameter_lower_bound) <= exact <= float(result.diameter)
    np.testing.assert_allclose(result.diameter, exact, rtol=1e-5 if dtype == np.float32 else 1e-9)
    one, two = np.asarray(result.pair)
    between = np.linalg.norm(points[one].astype(np.float64) - points[two])
    np.testing.assert_allclose(between, exact, rtol=1e-9)


def test_diameter_of_nearly_equal_radii():
    # All points on a sphere: the distances to the centre exclude nothing.
    points = np.random.default_rng(0).normal(size=(1500, 6))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    result = hull_diameter(points)
    exact = scipy.spatial.distance.pdist(points).max()
    assert result.diameter_lower_bound <= exact <= result.diameter


def cube(rng):
    """Corners, midpoints of edges, centres of faces and points inside: 64 rows, all different."""
    grid = np.stack(np.meshgrid(*[[0.0, 0.5, 1.0]] * 3), axis=-1).reshape(-1, 3)
    halves = (grid == 0.5).sum(axis=1)
    inside = rng.uniform(0.2, 0.8, size=(64 - 26, 3))
    return np.vstack([grid[halves == 0], grid[(halves == 1) | (halves == 2)], inside])


def test_points_on_a_sphere_are_all_extreme():
    points = np.random.default_rng(5).normal(size=(100, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points = np.vstack([points, -points])  # around 0, so that all are found from the centre
    result = extreme_points(np.vstack([points, points[:2]]))
    np.testing.assert_array_equal(result.extreme, True)
    np.testing.assert_array_equal(result.status, Status.CONVERGED)
    direction, margin = np.asarray(result.direction)[:200], np.asarray(result.margin)[:200]
    score = direction @ points.T
    own = np.diag(score).copy()
    np.fill_diagonal(score, -np.inf)
    assert (margin > 0).all()
    assert (margin <= own - score.max(axis=1) + 1e-12).all()


@pytest.mark.slow
def test_extreme_points_agree_with_qhull():
    rng = np.random.default_rng(3)
    points = rng.normal(size=(64, 3))
    points = np.vstack([points, points[:3]])
    result = extreme_points(points)
    np.testing.assert_array_equal(result.status, Status.CONVERGED)
    expected = np.zeros(len(points), bool)
    expected[scipy.spatial.ConvexHull(points[:64]).vertices] = True
    expected[64:] = expected[:3]
    np.testing.assert_array_equal(result.extreme, expected)
    for row in np.flatnonzero(expected):
        score = points @ np.asarray(result.direction[row])
        others = np.delete(score, np.flatnonzero((points == points[row]).all(1)))
        margin = float(result.margin[row])
        assert 0 < margin <= score[row] - others.max() + 1e-12
    inside = ~expected
    assert (np.asarray(result.margin)[inside] < 0).all()
    assert np.isnan(np.asarray(result.direction)[inside]).all()
    # Points on faces are neither: no rounded ball around them fits, no direction singles them out.
    result = extreme_points(cube(rng))
    np.testing.assert_array_equal(result.extreme, np.arange(64) < 8)
    status = np.asarray(result.status)
    np.testing.assert_array_equal(np.flatnonzero(status), np.arange(8, 26))
    np.testing.assert_array_equal(status[8:26], Status.PRECISION_LIMIT)
    lone = extreme_points(np.ones((3, 2)))
    np.testing.assert_array_equal(lone.extreme, True)
    np.testing.assert_array_equal(lone.status, Status.CONVERGED)


def test_bad_input_is_named(plain_types):
    good = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"vertices_b\.shape to end in dim=2"):
        hull_to_hull(good, np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"vertices_a\[1, 0\] to be finite"):
        hull_to_hull(np.array([[0.0], [np.inf]]), np.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"vertices\.shape to be \(vertices, dim\)"):
        hull_diameter(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"vertices\[0, 1\] to be finite"):
        extreme_points(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match=r"max_steps to be an integer >= 1"):
        hull_to_hull(good, good, max_steps=0)
