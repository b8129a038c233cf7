"""Regions of certain class: margins by sampling hulls, joined balls against a cone program."""

import jax
import numpy as np
import pytest
import scipy.optimize

from hullgeo import (
    LinearHead,
    Membership,
    Status,
    boundary_distance,
    hull_guarantee,
    region_membership,
)


def problem(seed, dim=3, num_classes=4, count=60):
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(dim, num_classes)), 0.3 * rng.normal(size=num_classes))
    return head, rng.normal(size=(count, dim)), rng


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_margins_bound_every_mixture(dtype):
    head, features, rng = problem(0)
    head = LinearHead(*(part.astype(dtype) for part in head))
    features = features.astype(dtype)
    labels = np.asarray(boundary_distance(features, head).label)
    result = hull_guarantee(features, labels, head)
    assert result.margin.dtype == dtype
    np.testing.assert_array_equal(result.num_vertices, np.bincount(labels, minlength=4))
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    for one in range(4):
        mine = features[labels == one].astype(np.float64)
        logits = rng.dirichlet(np.ones(len(mine)), size=500) @ mine @ kernel + bias
        for two in range(4):
            if one == two:
                assert np.isposinf(result.margin[one, two])
                continue
            margin = float(result.margin[one, two])
            assert margin <= (logits[:, one] - logits[:, two]).min() + 1e-12
            at = int(result.vertex[one, two])
            assert labels[at] == one
            z = features[at].astype(np.float64) @ kernel + bias
            np.testing.assert_allclose(z[one] - z[two], margin, rtol=1e-5, atol=1e-6)
            length = np.linalg.norm(kernel[:, one] - kernel[:, two])
            np.testing.assert_allclose(result.distance[one, two], margin / length, rtol=1e-5)
    np.testing.assert_array_equal(result.certain, True)


def test_wrong_labels_missing_classes_and_equal_columns():
    head = LinearHead(np.array([[1.0, -1.0, 1.0, 0.0]]), np.array([0.0, 0.0, -1.0, -9.0]))
    features = np.array([[1.0], [2.0], [-1.0], [0.5]])
    result = hull_guarantee(features, np.array([0, 0, 1, 1]), head)
    np.testing.assert_array_equal(result.certain, [True, False, False, False])
    np.testing.assert_array_equal(result.status, [0, 0, Status.INFEASIBLE, Status.INFEASIBLE])
    np.testing.assert_allclose(np.asarray(result.margin)[0, 1], 2.0)
    assert float(result.distance[1, 0]) == 0.0  # 0.5 belongs to class 0
    assert float(result.margin[0, 2]) == 1.0
    assert np.isposinf(result.distance[0, 2])  # equal columns never change places
    broken = features.copy()
    broken[2] = np.nan
    partly = hull_guarantee(broken, np.array([0, 0, 1, 1]), head)
    assert int(partly.status[1]) == Status.NONFINITE
    np.testing.assert_array_equal(partly.margin[0], result.margin[0])
    jitted = jax.jit(hull_guarantee)(features, np.array([0, 0, 1, 1]), head)
    np.testing.assert_array_equal(jitted.margin, result.margin)


def joined_distance(query, centers, radii):
    """Distance to the hull of balls: max over |g| <= 1 of min_i <v_i - q, g> - r_i, by SLSQP."""
    dim = len(query)
    best = 0.0
    for start in [*np.eye(dim), *-np.eye(dim), centers.mean(0) - query]:
        first = start / max(np.linalg.norm(start), 1e-9) * 0.9
        level = ((centers - query) @ first - radii).min()
        found = scipy.optimize.minimize(
            lambda x: -x[-1], np.append(first, level), jac=lambda x: np.append(np.zeros(dim), -1.0),
            constraints=[
                {"type": "ineq", "fun": lambda x: (centers - query) @ x[:-1] - radii - x[-1],
                 "jac": lambda x: np.column_stack([centers - query, -np.ones(len(centers))])},
                {"type": "ineq", "fun": lambda x: 1 - x[:-1] @ x[:-1],
                 "jac": lambda x: np.append(-2 * x[:-1], 0.0)},
            ], method="SLSQP", options={"maxiter": 300, "ftol": 1e-12},
        )  # fmt: skip
        direction = found.x[:-1] / max(np.linalg.norm(found.x[:-1]), 1.0)
        best = max(best, float(((centers - query) @ direction - radii).min()))
    return best


def test_regions_agree_with_references_and_are_certain():
    head, features, rng = problem(5, count=80)
    queries = 1.5 * rng.normal(size=(60, 3))
    result = region_membership(queries, features, head, rtol=1e-4)
    np.testing.assert_array_equal(result.status, Status.CONVERGED)
    held = boundary_distance(features, head)
    owner, radius = np.asarray(held.label), np.asarray(held.distance)
    label = (queries @ head.kernel + head.bias).argmax(-1)
    np.testing.assert_array_equal(result.label, label)
    for row, query in enumerate(queries):
        mine = owner == label[row]
        away = np.linalg.norm(features[mine] - query, axis=1) - radius[mine]
        assert (int(result.ball[row]) == Membership.INSIDE) == (away.min() < 0)
        reference = joined_distance(query, features[mine], radius[mine])
        assert result.distance_lower_bound[row] <= reference + 1e-6
        assert reference <= result.distance[row] + 1e-6
        if int(result.joined[row]) == Membership.OUTSIDE:
            assert reference > 0
        assert result.distance[row] ** 2 - result.distance_lower_bound[row] ** 2 <= (
            1e-4 * result.distance[row] ** 2 + 1e-12
        )
    ball, hull, joined = (np.asarray(x) for x in (result.ball, result.hull, result.joined))
    assert (
        joined[(ball == Membership.INSIDE) | (hull == Membership.INSIDE)] == Membership.INSIDE
    ).all()
    assert set(joined.tolist()) == {Membership.INSIDE, Membership.OUTSIDE}
    shares = result.coverage
    assert max(shares["ball"], shares["hull"]) <= shares["joined"] < 1
    assert shares["joined"] == np.mean(joined == Membership.INSIDE)


def test_classes_without_features_and_bad_rows():
    head, features, _ = problem(5, count=80)
    owner = np.asarray(boundary_distance(features, head).label)
    gone = int(np.bincount(owner, minlength=4).argmin())
    queries = np.array([features[owner == gone][0], features[owner != gone][0], [np.nan, 0, 0]])
    features = features[owner != gone]
    result = region_membership(queries.reshape(3, 1, 3), features, head)
    assert result.joined.shape == (3, 1)
    assert int(result.status[0, 0]) == Status.INFEASIBLE
    assert int(result.joined[0, 0]) == Membership.OUTSIDE
    assert np.isposinf(result.distance_lower_bound[0, 0])
    assert int(result.status[2, 0]) == Status.NONFINITE
    assert np.isnan(result.distance[2, 0])
    np.testing.assert_array_equal(
        region_membership(queries[1:2], features, head).joined, result.joined[1]
    )


def test_bad_input_is_named(plain_types):
    head, features, _ = problem(7)
    with pytest.raises(ValueError, match=r"labels to lie in \[0, 3\], got labels=4"):
        hull_guarantee(features, np.full(60, 4), head)
    broken = features.copy()
    broken[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"features\[2, 1\] to be finite"):
        region_membership(features, broken, head)
    with pytest.raises(ValueError, match=r"queries\.shape to end in dim=3"):
        region_membership(features[:, :2], features, head)
