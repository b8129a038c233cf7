"""The class cells on a plane against dense sampling and SciPy's half-space intersections."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, HalfspaceIntersection

from hullgeo import _plane


def pieces(cells):
    vertices, starts, classes = cells
    return dict(zip(classes.tolist(), np.split(vertices, starts[1:-1]), strict=True))


def area(polygon):
    after = np.roll(polygon, -1, axis=0)
    return 0.5 * (polygon[:, 0] * after[:, 1] - after[:, 0] * polygon[:, 1]).sum()


VIEW = np.array([[-2.0, -1.0], [3.0, 2.0]])


@hypothesis.given(st.integers(0, 10_000), st.integers(2, 12))
def test_cells_fill_the_view_and_hold_their_class(seed, num_classes):
    rng = np.random.default_rng(seed)
    logits, slopes = rng.normal(size=num_classes), rng.normal(size=(2, num_classes))
    cells = pieces(_plane.cell_polygons(logits, slopes, VIEW))
    assert sum(map(area, cells.values())) == pytest.approx(15.0)
    points = rng.uniform(VIEW[0], VIEW[1], size=(500, 2))
    scores = logits + points @ slopes
    ordered = np.sort(scores, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 1e-9
    vertices, starts, classes = _plane.cell_polygons(logits, slopes, VIEW)
    found = _plane.cells_at(points, vertices, starts, classes)
    np.testing.assert_array_equal(found[clear], scores.argmax(axis=1)[clear])


def test_areas_are_scipys():
    rng = np.random.default_rng(3)
    logits, slopes = rng.normal(size=6), rng.normal(size=(2, 6))
    cells = pieces(_plane.cell_polygons(logits, slopes, VIEW))
    (left, bottom), (right, top) = VIEW
    frame = np.array([[-1, 0, left], [1, 0, -right], [0, -1, bottom], [0, 1, -top]])
    assert len(cells) > 2
    for label, polygon in cells.items():
        others = np.delete(np.arange(6), label)
        offsets = logits[others] - logits[label]
        planes = np.column_stack([(slopes[:, others] - slopes[:, [label]]).T, offsets])
        corners = HalfspaceIntersection(np.vstack([planes, frame]), polygon.mean(axis=0))
        expected = ConvexHull(corners.intersections).volume
        assert area(polygon) == pytest.approx(expected, rel=1e-9)


def test_equal_logits_belong_to_the_smallest_class_alone():
    cells = pieces(_plane.cell_polygons(np.zeros(3), np.zeros((2, 3)), VIEW))
    assert list(cells) == [0]
    assert area(cells[0]) == pytest.approx(15.0)
    np.testing.assert_array_equal(
        _plane.cells_at(np.array([[9.0, 9.0]]), *_plane.cell_polygons(
            np.zeros(2), np.zeros((2, 2)), VIEW)), [-1]
    )  # fmt: skip


def test_axes_span_the_three_points():
    rng = np.random.default_rng(0)
    corners = rng.normal(size=(3, 9)) + 10.0
    origin, axes = _plane.axes_through(corners)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-14)
    there = (corners - origin) @ axes.T
    np.testing.assert_allclose(origin + there @ axes, corners, rtol=1e-13)


@pytest.mark.parametrize(
    "corners", [np.ones((3, 4)), np.arange(3.0)[:, None] * np.ones((3, 4))], ids=["point", "line"]
)
def test_axes_where_the_points_span_no_plane(corners):
    origin, axes = _plane.axes_through(corners)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-14)
    there = (corners - origin) @ axes.T
    np.testing.assert_allclose(origin + there @ axes, corners, atol=1e-12)


def test_anchors_are_typical_images_of_neighbouring_classes():
    points = np.array([[0.0, 0], [1, 0], [0.4, 0], [10, 0], [11, 0], [10.4, 0], [0, 99], [0, 98]])
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    predicted = labels.copy()
    rival = np.array([1, 1, 1, 0, 0, 0, 1, 1])
    found = _plane.anchors(points, labels, predicted, predicted, rival, 4)
    assert set(labels[found]) == {0, 1, 2}
    assert {2, 5} <= set(found.tolist())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_anchors_of_too_few_classes(size):
    points = np.arange(float(size))[:, None] * np.ones(3)
    labels = np.zeros(size, int)
    found = _plane.anchors(points, labels, labels, labels, 1 - labels, 2)
    assert found.shape == (3,)
    assert len(set(found.tolist())) == min(size, 3)


def test_a_label_finds_an_open_spot():
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    taken, half = np.array([[0.2, 0.2], [0.3, 0.7]]), np.array([0.2, 0.1])
    spot = _plane.open_spot(square, taken, half)
    assert (spot - half > 0).all()
    assert (spot + half < 1).all()
    assert spot[0] > 0.5
    assert _plane.open_spot(square, taken, np.array([0.2, 0.6])) is None
    assert _plane.open_spot(square, np.zeros((0, 2)), half) is not None
