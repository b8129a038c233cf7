"""Nearest boundary points in boxes against DAQP and scipy, with every bracket checked."""

import daqp
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hullgeo
from hullgeo import Domain, LinearHead, Status, nearest_boundary_point
from hullgeo import nearest as nearest_module


def random_problem(seed, dim, num_classes, num_queries, dtype=np.float64):
    rng = np.random.default_rng(seed)
    head = LinearHead(
        rng.normal(size=(dim, num_classes)).astype(dtype),
        rng.normal(size=num_classes).astype(dtype),
    )
    features = np.abs(rng.normal(size=(num_queries, dim))).astype(dtype)
    return head, features, (0.9 * features.max(axis=0)).astype(dtype)


def logits_of(features, head):
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    return np.asarray(features, np.float64) @ kernel + bias


def daqp_distance(query, head, label, rival, lower, upper):
    """Distance from DAQP, infinite where it finds the problem infeasible."""
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    normal, offset = kernel[:, rival] - kernel[:, label], bias[label] - bias[rival]
    length = np.linalg.norm(normal)
    point, _, flag, _ = daqp.solve(
        np.eye(len(query)),
        -query.astype(np.float64),
        (normal / length)[None].copy(),
        np.append(np.broadcast_to(upper, query.shape), 1e30).astype(np.float64),
        np.append(np.broadcast_to(lower, query.shape), offset / length).astype(np.float64),
        primal_tol=1e-11,
    )
    return np.linalg.norm(point - query) if flag > 0 else np.inf


def nearest_by_daqp(query, head, lower, upper):
    logits = logits_of(query, head)
    label = int(logits.argmax())
    found = [
        np.inf if rival == label else daqp_distance(query, head, label, rival, lower, upper)
        for rival in range(len(logits))
    ]
    return min(found), int(np.argmin(found))


def check_optimality(result, features, head, lower, upper, atol=1e-9):
    """Point in the box, tie, and stationarity in the form that the multipliers promise."""
    kernel = np.asarray(head.kernel, np.float64)
    ok = np.asarray(result.status) == Status.CONVERGED
    assert ok.any()
    point = np.asarray(result.point)[ok]
    assert (point >= lower).all()
    assert (point <= upper).all()
    moved = np.asarray(features)[ok] + np.asarray(result.multipliers)[ok] @ kernel.T
    np.testing.assert_allclose(np.clip(moved, lower, upper), point, atol=atol)
    logits = logits_of(point, head)
    pair = np.stack([result.label, result.rival], -1)[ok]
    tied = np.take_along_axis(logits, pair, -1)
    assert (tied[:, 1] >= tied[:, 0] - 10 * atol).all()
    np.testing.assert_allclose(np.sum(np.asarray(result.multipliers), -1), 0, atol=atol)


@pytest.mark.parametrize("outside", [False, True])
def test_agrees_with_daqp_on_a_thousand_problems(outside):
    head, features, upper = random_problem(0, 6, 6, 200)
    if outside:
        features = 2 * np.random.default_rng(1).normal(size=features.shape)
    result = nearest_boundary_point(features, head, lower=0.0, upper=upper)
    np.testing.assert_array_equal(result.status, Status.CONVERGED)
    np.testing.assert_array_equal(result.domain, Domain.BOX)
    for row, query in enumerate(features):  # five rivals each
        distance, rival = nearest_by_daqp(query, head, 0.0, upper)
        slack = 1e-9 * (1 + distance)
        assert result.distance_lower_bound[row] - slack <= distance
        assert distance <= result.distance[row] + slack
        if not outside:  # outside the box several rivals may lead at the same nearest point
            assert rival == result.rival[row]
    width = np.asarray(result.distance - result.distance_lower_bound)
    assert (width <= 1e-6 * np.asarray(result.distance)).all()
    check_optimality(result, features, head, 0.0, upper)


@hypothesis.given(seed=st.integers(0, 10**6))
def test_every_rival_and_every_box(seed):
    head, features, upper = random_problem(seed, 6, 4, 20)
    rng = np.random.default_rng(seed + 1)
    features -= rng.uniform(0, 1, 6) * (seed % 2)
    lower = np.where(rng.uniform(size=6) < 0.3, -np.inf, rng.uniform(-1, 0, 6))
    upper = np.where(rng.uniform(size=6) < 0.3, np.inf, np.maximum(upper * 0.4, lower))
    fixed = rng.uniform(size=6) < 0.2
    upper = np.where(fixed & np.isfinite(lower), lower, upper)
    rivals = rng.integers(0, 4, size=20)
    result = nearest_boundary_point(features, head, rival=rivals, lower=lower, upper=upper)
    np.testing.assert_array_equal(result.label, logits_of(features, head).argmax(-1))
    infeasible = np.asarray(result.status) == Status.INFEASIBLE
    np.testing.assert_array_equal(result.rival, np.where(infeasible, result.label, rivals))
    for row, query in enumerate(features):
        label, status = int(result.label[row]), int(result.status[row])
        upper_bound, lower_bound = result.distance[row], result.distance_lower_bound[row]
        if label == rivals[row]:
            inside = np.clip(query, lower, upper)
            np.testing.assert_allclose(upper_bound, np.linalg.norm(query - inside), atol=1e-12)
            continue
        distance = daqp_distance(
            query, head, label, rivals[row], np.maximum(lower, -1e20), np.minimum(upper, 1e20)
        )
        assert (status == Status.INFEASIBLE) == np.isinf(distance)
        if np.isfinite(distance):
            assert status == Status.CONVERGED
            assert lower_bound - 1e-8 <= distance <= upper_bound + 1e-8
            assert upper_bound - lower_bound <= 1e-6 * upper_bound
        else:
            assert np.isinf(lower_bound)
            assert np.isnan(np.asarray(result.point[row])).all()


def test_infeasible_is_proved_by_the_corner_of_the_box():
    head = LinearHead(np.array([[1.0, -1.0], [0.0, 0.0]]), np.array([2.0, 0.0]))
    # Class 1 needs x0 <= -1.
    result = nearest_boundary_point(np.zeros((2, 2)), head, lower=[-0.99, -np.inf])
    np.testing.assert_array_equal(result.status, Status.INFEASIBLE)
    assert np.isposinf(result.distance_lower_bound).all()
    edge = nearest_boundary_point(np.zeros((2, 2)), head, lower=-1.0)
    assert float(edge.distance_lower_bound[0]) <= 1.0  # exactly the corner: never called infeasible
    assert int(edge.status[0]) in (Status.CONVERGED, Status.PRECISION_LIMIT)
    assert np.isfinite(edge.distance[0]) == (int(edge.status[0]) == Status.CONVERGED)
    open_ = nearest_boundary_point(np.zeros((2, 2)), head, lower=-2.0)
    np.testing.assert_allclose(open_.point, [[-1.0, 0.0]] * 2, atol=1e-12)


def test_the_whole_space_is_the_closed_form():
    head, features, _ = random_problem(3, 6, 4, 20)
    result = nearest_boundary_point(features, head)
    closed = hullgeo.boundary_distance(features, head)
    np.testing.assert_array_equal(result.domain, Domain.SPACE)
    np.testing.assert_array_equal(result.rival, closed.rival)
    assert (np.asarray(closed.distance) <= np.asarray(result.distance)).all()
    np.testing.assert_allclose(result.distance_lower_bound, closed.distance, rtol=1e-12)
    orthant = nearest_boundary_point(features, head, lower=0.0)
    np.testing.assert_array_equal(orthant.domain, Domain.ORTHANT)
    assert (np.asarray(orthant.distance) >= np.asarray(closed.distance)).all()


def test_small_dimension_by_brute_force():
    head, features, upper = random_problem(11, 2, 3, 12)
    result = nearest_boundary_point(features, head, lower=0.0, upper=upper)
    axes = [np.linspace(0, side, 801) for side in upper]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    classes = logits_of(grid, head).argmax(-1)
    spacing = max(axis[1] for axis in axes)
    for row, query in enumerate(features):
        other = grid[classes != logits_of(query, head).argmax()]
        if not len(other):
            assert int(result.status[row]) == Status.INFEASIBLE
            continue
        sampled = np.linalg.norm(other - query, axis=1).min()
        assert result.distance_lower_bound[row] <= sampled + 1e-12
        assert sampled <= result.distance[row] + 2 * spacing


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e15])
def test_scales_and_float32(scale):
    head, features, upper = random_problem(4, 6, 4, 20)
    expected = nearest_boundary_point(features, head, lower=0.0, upper=upper)
    scaled = LinearHead(head.kernel, head.bias * scale)
    for dtype, rtol in ((np.float64, 1e-9), (np.float32, 1e-3)):
        result = nearest_boundary_point(
            (features * scale).astype(dtype),
            jax.tree.map(lambda part, dtype=dtype: part.astype(dtype), scaled),
            lower=0.0,
            upper=(upper * scale).astype(dtype),
        )
        assert result.distance.dtype == result.point.dtype == dtype
        np.testing.assert_array_equal(result.status, Status.CONVERGED)
        np.testing.assert_allclose(
            np.asarray(result.distance, np.float64) / scale, expected.distance, rtol=rtol
        )
        assert (np.asarray(result.distance_lower_bound) <= np.asarray(result.distance)).all()
        assert (np.asarray(result.point) <= (upper * scale).astype(dtype)).all()


def test_degenerate_heads():
    features = np.array([[0.5, 2.0], [-1.0, 0.0]])
    one = nearest_boundary_point(features, LinearHead(np.ones((2, 1)), np.zeros(1)))
    np.testing.assert_array_equal(one.status, Status.INFEASIBLE)
    np.testing.assert_array_equal(one.rival, 0)
    equal = LinearHead(np.ones((2, 3)), np.array([0.0, 1.0, -1.0]))
    never = nearest_boundary_point(features, equal, lower=-5.0, upper=5.0)
    np.testing.assert_array_equal(never.status, Status.INFEASIBLE)
    tied = LinearHead(np.ones((2, 3)), np.array([0.0, 0.0, -1.0]))
    everywhere = nearest_boundary_point(features, tied)
    np.testing.assert_array_equal(everywhere.distance, 0)
    np.testing.assert_array_equal(everywhere.status, Status.CONVERGED)
    np.testing.assert_array_equal(everywhere.rival, 1)
    line = LinearHead(np.array([[1.0, -1.0, 0.1]]), np.array([0.0, 0.0, -9.0]))  # 2 never wins
    result = nearest_boundary_point(np.array([[0.25], [-3.0]]), line)
    np.testing.assert_allclose(result.distance, [0.25, 3.0], rtol=1e-12)
    np.testing.assert_array_equal(result.rival, [1, 0])


def test_on_the_boundary_the_bracket_is_tiny_and_true():
    head = LinearHead(np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2))
    result = nearest_boundary_point(np.array([[0.3, 0.3], [1.0, 1.0]]), head, lower=0.0)
    assert float(result.distance_lower_bound[0]) == 0.0
    assert float(result.distance[0]) < 1e-14
    loose = nearest_boundary_point(np.array([[0.3, 0.3], [1.0, 1.0]]), head, lower=0.0, atol=1e-20)
    np.testing.assert_array_equal(loose.status, Status.CONVERGED)


def test_nan_rows_transforms_and_one_compilation():
    head, features, upper = random_problem(5, 6, 4, 20, np.float32)
    broken = features.copy()
    broken[2, 1] = np.nan
    traces = []

    def solve(features, rtol):
        traces.append(1)
        return nearest_boundary_point(features, head, lower=0.0, upper=upper, rtol=rtol)

    plain = solve(features, 1e-6)
    partly = solve(broken, 1e-6)
    np.testing.assert_array_equal(partly.status, [0, 0, Status.NONFINITE] + [0] * 17)
    np.testing.assert_array_equal(np.delete(plain.distance, 2),
                                  np.delete(partly.distance, 2))  # fmt: skip
    assert np.isnan(partly.distance_lower_bound[2])
    traces.clear()
    compiled = jax.jit(jax.vmap(solve, (0, None)))
    for rtol in (1e-6, 1e-3):
        mapped = compiled(features, rtol)
    assert len(traces) == 1
    single = [solve(row, 1e-6) for row in features[:2]]
    for name in ("distance", "point", "label", "rival", "status"):
        whole = np.asarray(getattr(plain, name))
        np.testing.assert_allclose(getattr(mapped, name), whole, rtol=1e-6, atol=1e-7)
        rows = np.stack([np.asarray(getattr(row, name)) for row in single])
        np.testing.assert_allclose(rows, whole[:2], rtol=1e-6, atol=1e-7)
    size = nearest_module._nearest_in_box._cache_size()
    nearest_boundary_point(features, head, rival=1, lower=0.0, upper=upper * 2)
    assert nearest_module._nearest_in_box._cache_size() == size


@pytest.mark.slow
def test_without_float64_enabled():
    head, features, upper = random_problem(5, 6, 4, 20, np.float32)
    plain = nearest_boundary_point(features, head, lower=0.0, upper=upper)
    with jax.enable_x64(False):
        narrow = jax.jit(lambda rows: nearest_boundary_point(rows, head, lower=0.0, upper=upper))(
            jnp.asarray(features)
        )
    assert narrow.distance.dtype == jnp.float32
    np.testing.assert_allclose(narrow.distance, plain.distance, rtol=1e-6)


def test_chunks_and_empty_batches():
    head, features, upper = random_problem(6, 4, 3, 2 * nearest_module._CHUNK + 3)
    whole = nearest_boundary_point(features, head, upper=upper)
    part = nearest_boundary_point(features[-5:].reshape(5, 1, 4), head, upper=upper)
    np.testing.assert_array_equal(whole.distance[-5:], part.distance[:, 0])
    assert nearest_boundary_point(features[:0], head, upper=upper).point.shape == (0, 4)


def test_bad_options_are_named():
    head, features, _ = random_problem(7, 3, 4, 2)
    cases = [
        ({"lower": 1.0, "upper": 0.5}, r"Expected upper to be >= lower=1\.0, got upper=0\.5"),
        ({"lower": np.array([0.0, 2.0, 0.0]), "upper": 1.0}, r"upper\[1\] to be >= lower=2\.0"),
        ({"lower": np.nan}, r"lower to hold no NaN"),
        ({"lower": np.inf}, r"lower to hold no inf"),
        ({"upper": np.zeros(2)}, r"upper\.shape to be \(\) or \(3,\)"),
        ({"rival": 4}, r"rival to lie in \[0, 3\], got rival=4"),
        ({"rtol": -1.0}, r"rtol to be a finite number >= 0"),
        ({"hull": np.zeros((2, 3)), "lower": 0.0}, r"lower and upper to be None"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            nearest_boundary_point(features, head, **options)
