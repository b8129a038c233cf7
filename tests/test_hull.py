"""Distance to a convex hull: brackets against outside references, certificates, hard cases."""

import daqp


import numpy as np
import pytest


from jaxtyping import config as jaxtyping_config
from sklearn.datasets import load_digits

from hullgeo import Membership, Status, membership, project_to_hull
from hullgeo.frank_wolfe import VARIANTS


@pytest.fixture
def plain_types():
    """Without the runtime shape checks, so that the library's own messages are seen."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def daqp_distance(query, vertices):
    """min |w|^2 / 2 with <w, v - q> >= 1: the plane of largest margin lies at distance 1 / |w|."""
    shifted = np.asarray(vertices, np.float64) - np.asarray(query, np.float64)
    dim = shifted.shape[1]
    count = len(shifted)
    solution, _, flag, _ = daqp.solve(
        np.eye(dim), np.zeros(dim), shifted, np.full(count, 1e30), np.ones(count),
        np.zeros(count, np.int32), primal_tol=1e-12, dual_tol=1e-12,
    )  # fmt: skip
    assert flag == 1
    return 1 / np.linalg.norm(solution)


def digits(num_vertices=300, num_queries=12, dtype=np.float64):
    pixels = load_digits(return_X_y=True)[0]
    return pixels[1500 : 1500 + num_queries].astype(dtype), pixels[:num_vertices].astype(dtype)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "vanilla"])
def test_bracket_contains_the_distance_of_daqp(variant):
    queries, vertices = digits()
    answer = project_to_hull(queries, vertices, variant=variant)
    assert (answer.status == Status.CONVERGED).all()
    reference = np.array([daqp_distance(query, vertices) for query in queries])
    assert np.all(answer.distance_lower_bound <= reference * (1 + 1e-9))
    assert np.all(answer.distance >= reference * (1 - 1e-9))
    np.testing.assert_allclose(answer.distance, answer.distance_lower_bound, rtol=1e-6)


def test_nan_query_leaves_the_others_right():
    queries, vertices = digits(num_queries=5)
    clean = project_to_hull(queries, vertices)
    queries[2, 7] = np.nan
    answer = project_to_hull(queries, vertices)
    assert answer.status.tolist() == [0, 0, Status.NONFINITE, 0, 0]
    assert np.isnan(answer.distance[2])
    keep = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(answer.distance[keep], clean.distance[keep], rtol=1e-6)


def test_membership_is_three_valued():
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    queries = np.array([[2.0, 0], [0.3, 0.1], [1, 1]])
    answer = project_to_hull(queries, square)
    verdict = membership(answer)
    assert verdict[0] == Membership.OUTSIDE
    assert verdict[1] != Membership.OUTSIDE
    assert verdict[2] == Membership.INSIDE
    assert membership(answer, atol=1e-9)[1] == Membership.INSIDE


def test_nonfinite_vertex_is_named():
    queries, vertices = digits(num_queries=1)
    vertices[3, 5] = np.nan
    with pytest.raises(ValueError, match=r"vertices\[3, 5\]"):
        project_to_hull(queries, vertices)
