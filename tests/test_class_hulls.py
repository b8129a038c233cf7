"""Hulls of classes: each as if alone, empty classes, and the nearest as far as it is proved."""

from functools import partial

import jax
import numpy as np
import pytest

from hullgeo import (
    Membership,
    Status,
    membership,
    nearest_hull,
    project_to_class_hulls,
    project_to_hull,
)

CLASSES = 4  # the third has no vertices


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    centers = 3 * np.eye(CLASSES)
    labels = rng.permutation(np.repeat([0, 1, 3], [20, 13, 7]))
    vertices = centers[labels] + rng.normal(size=(40, CLASSES))
    return np.concatenate([vertices[:3], 3 * rng.normal(size=(5, CLASSES))]), vertices, labels


def test_each_class_is_projected_to_as_if_alone():
    queries, vertices, labels = inputs()
    answer = project_to_class_hulls(queries, vertices, labels, CLASSES)
    assert answer.distance.shape == (8, CLASSES)
    assert answer.point.shape == (8, CLASSES, CLASSES)
    for label in (0, 1, 3):
        # Copies of vertices leave a hull as it is, and one size is compiled once.
        alone = project_to_hull(queries, np.resize(vertices[labels == label], (20, CLASSES)))
        assert np.all(answer.distance[:, label] >= alone.distance_lower_bound)
        assert np.all(answer.distance_lower_bound[:, label] <= alone.distance)
        np.testing.assert_array_equal(membership(answer)[:, label], membership(alone))
        used = np.asarray(answer.weights[:, label]) > 0
        assert np.all(labels[np.asarray(answer.support[:, label])[used]] == label)
    points = np.einsum("bcs,bcsd->bcd", answer.weights, vertices[np.asarray(answer.support)])
    np.testing.assert_allclose(points[:, [0, 1, 3]], answer.point[:, [0, 1, 3]], atol=1e-12)


def test_a_class_without_vertices_is_infinitely_far():
    queries, vertices, labels = inputs()
    answer = project_to_class_hulls(queries, vertices, labels, CLASSES)
    assert np.all(answer.status[:, 2] == Status.INFEASIBLE)
    assert np.all(np.isinf(answer.distance[:, 2]) & np.isinf(answer.distance_lower_bound[:, 2]))
    assert np.all(membership(answer)[:, 2] == Membership.OUTSIDE)
    assert np.isnan(np.asarray(answer.point)[:, 2]).all()
    nearest = nearest_hull(answer)
    assert 2 not in nearest.label.tolist()


def test_the_nearest_hull_is_proved_or_undecided():
    queries, vertices, labels = inputs()
    answer = project_to_class_hulls(queries, vertices, labels, CLASSES)
    nearest = nearest_hull(answer)
    distances = np.asarray(answer.distance)
    np.testing.assert_array_equal(nearest.label, distances.argmin(axis=1))
    second = np.sort(distances, axis=1)[:, 1]
    np.testing.assert_allclose(nearest.margin, second - distances.min(axis=1), atol=1e-5)
    assert np.all((np.asarray(nearest.margin) > 0) == (np.asarray(nearest.status) == 0))
    assert np.all(np.asarray(nearest.label)[:3] == labels[:3])  # training points lie in their hull
    both = answer._replace(
        distance=answer.distance.at[0, :2].set(0.0),
        distance_lower_bound=answer.distance_lower_bound.at[0, :2].set(0.0),
    )
    assert nearest_hull(both).status[0] == Status.PRECISION_LIMIT
    broken = answer._replace(distance=answer.distance.at[1, 0].set(np.nan))
    assert nearest_hull(broken).status[1] == Status.NONFINITE


def test_inside_jit_with_any_leading_batch_and_float32():
    queries, vertices, labels = inputs()
    queries, vertices = queries.astype(np.float32), vertices.astype(np.float32)
    project = partial(project_to_class_hulls, labels=labels, num_classes=CLASSES, variant="away")
    expected = project(queries, vertices)
    assert expected.distance.dtype == np.float32

    @jax.jit
    def traced(queries, vertices):
        answer = project(queries, vertices)
        return answer, nearest_hull(answer)

    answer, nearest = traced(queries.reshape(4, 2, CLASSES), vertices)
    assert answer.distance.shape == (4, 2, CLASSES)
    np.testing.assert_allclose(
        answer.distance.reshape(8, -1), expected.distance, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(nearest.label.reshape(8), nearest_hull(expected).label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(40, 4)}, r"labels to lie in \[0, 3\], got labels=4"),
        ({"labels": np.zeros(40)}, r"labels\.dtype to be an integer type"),
        ({"labels": np.zeros(39, int)}, r"labels\.shape to be \(vertices,\)"),
        ({"num_classes": 0}, "num_classes to be an integer >= 1"),
        ({"rtol": -1.0}, "rtol to be"),
        ({"start": "any"}, "start not to be given"),
    ],
)
@pytest.mark.usefixtures("plain_types")
def test_bad_input_is_named(change, message):
    queries, vertices, labels = inputs()
    options = {"labels": labels, "num_classes": CLASSES} | change
    with pytest.raises(ValueError, match=message):
        project_to_class_hulls(queries, vertices, **options)


@pytest.mark.usefixtures("plain_types")
def test_traced_labels_are_refused():
    queries, vertices, labels = inputs()
    with pytest.raises(ValueError, match="labels to be known values"):
        jax.jit(lambda labels: project_to_class_hulls(queries, vertices, labels, CLASSES))(labels)
