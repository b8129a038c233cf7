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
    np.testing.assert_allclose(apart.offset, 2.0, rtol=1e-9)
    points = hull_to_hull(np.ones((1, 3)), np.zeros((1, 3)))
    np.testing.assert_allclose(points.distance, np.sqrt(3), rtol=1e-14)
    assert int(points.status) == Status.CONVERGED
    same = hull_to_hull(np.ones((2, 3)), np.ones((4, 3)))
    assert float(same.distance) < 1e-14
    touching = hull_to_hull(square, square + np.array([1.0, 0.0]))
    assert float(touching.distance_lower_bound) <= 0 <= float(touching.distance) < 1e-12
    assert float(touching.overlap) == 0
    inside = hull_to_hull(square, 0.25 * square + 0.25)
    assert float(inside.distance) == 0
    assert 0 < float(inside.overlap) <= 0.5 + 1e-9


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_scales_float32_and_transforms(scale):
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(20, 4)), rng.normal(size=(15, 4)) + np.eye(4)[0] * 4
    expected = hull_to_hull(first, second)
    narrow = hull_to_hull((first * scale).astype(np.float32), (second * scale).astype(np.float32))
    assert narrow.distance.dtype == np.float32
    np.testing.assert_allclose(float(narrow.distance) / scale, expected.distance, rtol=1e-5)
    traces = []

    def solve(first, second, rtol):
        traces.append(1)
        return hull_to_hull(first, second, rtol=rtol)

    compiled = jax.jit(jax.vmap(solve, (None, 0, None)))
    for rtol in (1e-6, 1e-3):
        mapped = compiled(first, np.stack([second, second + 1.0]), rtol)
    assert len(traces) == 1
    mapped = compiled(first, np.stack([second, second + 1.0]), 1e-6)
    np.testing.assert_allclose(mapped.distance[0], expected.distance, rtol=1e-9)
    with jax.enable_x64(False):
        kept = jax.jit(hull_to_hull)(first.astype(np.float32), second.astype(np.float32))
    np.testing.assert_allclose(kept.distance, expected.distance, rtol=1e-5)
    broken = second.astype(np.float32)
    broken[3] = np.nan
    result = compiled(first.astype(np.float32), np.stack([second.astype(np.float32), broken]), 1e-6)
    np.testing.assert_array_equal(result.status, [Status.CONVERGED, Status.NONFINITE])


def test_admits_failure():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(200, 8)), rng.normal(size=(200, 8)) + 1.2
    short = hull_to_hull(first, second, max_steps=2)
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
    assert result.diameter_lower_bound <= exact <= result.diameter
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


def test_extreme_points_agree_with_qhull():
    rng = np.random.default_rng(3)
    points = rng.normal(size=(120, 3))
    points = np.vstack([points, points[:3], points[:40].mean(0, keepdims=True)])
    result = extreme_points(points)
    np.testing.assert_array_equal(result.status, Status.CONVERGED)
    expected = np.zeros(len(points), bool)
    expected[scipy.spatial.ConvexHull(points[:120]).vertices] = True
    expected[120:123] = expected[:3]
    np.testing.assert_array_equal(result.extreme, expected)
    for row in np.flatnonzero(expected):
        score = points @ np.asarray(result.direction[row])
        others = np.delete(score, np.flatnonzero((points == points[row]).all(1)))
        margin = float(result.margin[row])
        assert 0 < margin <= score[row] - others.max() + 1e-12
    inside = ~expected
    assert (np.asarray(result.margin)[inside] < 0).all()
    assert np.isnan(np.asarray(result.direction)[inside]).all()


def test_points_on_faces_are_left_undecided():
    square = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.0], [0.5, 0.5]])
    result = extreme_points(square)
    np.testing.assert_array_equal(result.extreme, [True] * 4 + [False] * 2)
    np.testing.assert_array_equal(np.asarray(result.status)[:4], Status.CONVERGED)
    assert int(result.status[4]) == Status.PRECISION_LIMIT
    lone = extreme_points(np.ones((3, 2)))
    np.testing.assert_array_equal(lone.extreme, True)
    np.testing.assert_array_equal(lone.status, Status.CONVERGED)


def test_bad_input_is_named():
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
