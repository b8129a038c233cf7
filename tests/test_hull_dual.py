"""Nearest boundary points and ties within a hull, against DAQP on the weights of the vertices."""

import daqp
import jax
import numpy as np
import pytest

from hullgeo import (
    Domain,
    LinearHead,
    Status,
    nearest_boundary_point,
    prepare_hull,
    project_to_hull,
    tie_map,
    tie_point,
)

pytestmark = pytest.mark.slow  # minutes of compiling

DIM, CLASSES, VERTICES = 4, 3, 24


def problem(seed):
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(DIM, CLASSES)), 0.3 * rng.normal(size=CLASSES))
    return head, rng.normal(size=(VERTICES, DIM)), 1.5 * rng.normal(size=(8, DIM))


def daqp_distance(query, vertices, rows, equal):
    """min |V'w - q| with `rows @ w = 0` where equal, `<= 0` elsewhere; infinite if impossible."""
    count = len(vertices)
    shifted = vertices - query
    weights, _, flag, _ = daqp.solve(
        shifted @ shifted.T + 1e-12 * np.eye(count),
        np.zeros(count),
        np.vstack([np.ones(count), *rows]),
        np.concatenate([np.full(count, 1e30), [1.0], np.zeros(len(rows))]),
        np.concatenate([np.zeros(count), [1.0], np.where(equal, 0.0, -1e30)]),
        np.concatenate([np.zeros(count), [5], np.where(equal, 5, 0)]).astype(np.int32),
        primal_tol=1e-11,
    )
    return np.linalg.norm(weights @ vertices - query) if flag > 0 else np.inf


def in_hull(point, vertices):
    return np.asarray(project_to_hull(point, vertices, atol=1e-20).distance) <= 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_nearest_boundary_point_in_a_hull(seed):
    head, vertices, queries = problem(seed)
    result = nearest_boundary_point(queries, head, hull=prepare_hull(vertices))
    np.testing.assert_array_equal(result.domain, Domain.HULL)
    logits = vertices @ head.kernel + head.bias
    for row, query in enumerate(queries):
        label = int((query @ head.kernel + head.bias).argmax())
        distances = [
            np.inf
            if rival == label
            else daqp_distance(query, vertices, [logits[:, label] - logits[:, rival]], [False])
            for rival in range(CLASSES)
        ]
        assert int(result.status[row]) == Status.CONVERGED
        assert result.distance_lower_bound[row] - 1e-7 <= min(distances)
        assert min(distances) <= result.distance[row] + 1e-7
        point = np.asarray(result.point[row]) @ head.kernel + head.bias
        assert point[int(result.rival[row])] >= point[label] - 1e-9
    assert in_hull(np.asarray(result.point), vertices).all()


@pytest.mark.parametrize("seed", [0, 2])
def test_ties_in_a_hull(seed):
    head, vertices, queries = problem(seed)
    logits = vertices @ head.kernel + head.bias
    sets = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    result = tie_point(queries[:2, None], head, sets, hull=vertices)
    assert result.distance.shape == (2, 4)
    for row in range(2):
        for column, chosen in enumerate(sets):
            reference = int(np.flatnonzero(chosen)[0])
            others = [j for j in range(CLASSES) if j != reference]
            rows = [logits[:, j] - logits[:, reference] for j in others]
            distance = daqp_distance(queries[row], vertices, rows, chosen[others])
            assert int(result.status[row, column]) == Status.CONVERGED
            assert result.distance_lower_bound[row, column] - 1e-7 <= distance
            assert distance <= result.distance[row, column] + 1e-7
            tied = np.asarray(result.point[row, column]) @ head.kernel + head.bias
            np.testing.assert_allclose(tied[chosen], tied.max(), atol=1e-9)
            assert in_hull(np.asarray(result.point[row, column]), vertices)


def test_absence_is_proved():
    head, vertices, queries = problem(3)
    moved = LinearHead(head.kernel, head.bias + np.array([30.0, 0.0, 0.0]))  # 0 leads everywhere
    assert ((vertices @ moved.kernel + moved.bias).argmax(1) == 0).all()
    inside = 0.01 * queries
    result = nearest_boundary_point(inside, moved, hull=vertices)
    np.testing.assert_array_equal(result.status, Status.INFEASIBLE)
    assert np.isposinf(result.distance_lower_bound).all()
    assert np.isnan(result.point).all()
    np.testing.assert_array_equal(tie_map(moved, hull=vertices).status, Status.INFEASIBLE)


@pytest.mark.slow
def test_traced_equals_host_and_nan_rows_stay_alone():
    head, vertices, queries = problem(4)
    broken = queries.copy()
    broken[5, 0] = np.nan
    host = nearest_boundary_point(broken, head, hull=vertices)
    traced = jax.jit(lambda q: nearest_boundary_point(q, head, hull=vertices))(broken)
    np.testing.assert_array_equal(host.status, traced.status)
    assert int(host.status[5]) == Status.NONFINITE
    rest = np.arange(8) != 5
    for name in ("distance", "distance_lower_bound", "point"):
        left, right = (np.asarray(getattr(result, name))[rest] for result in (host, traced))
        np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-8)
    chosen = nearest_boundary_point(broken, head, rival=host.rival, hull=vertices)
    np.testing.assert_allclose(
        np.asarray(chosen.distance)[rest], np.asarray(host.distance)[rest], rtol=1e-9
    )
