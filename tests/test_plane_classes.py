"""Planes through three points: exact cells and refined pictures against dense evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import LinearHead, Status, _plane, plane_cells, plane_classes

RNG = np.random.default_rng(5)
WEIGHTS = [RNG.normal(size=shape) for shape in [(12, 24), (24, 6)]]


def network(images):
    hidden = jax.nn.relu(images.reshape(*images.shape[:-3], 12) @ jnp.asarray(WEIGHTS[0], "f4"))
    return hidden @ jnp.asarray(WEIGHTS[1], "f4")


def test_cells_hold_their_class_and_the_corners_theirs():
    head = LinearHead(RNG.normal(size=(7, 5)), RNG.normal(size=5))
    corners = 3 * RNG.normal(size=(3, 7))
    cells = plane_cells(head, corners)
    np.testing.assert_allclose(cells.axes @ cells.axes.T, np.eye(2), atol=1e-12)
    rebuilt = cells.origin + cells.corners @ cells.axes
    np.testing.assert_allclose(rebuilt, corners, atol=1e-12)
    points = RNG.uniform(*cells.view, size=(2000, 2))
    labels = ((cells.origin + points @ cells.axes) @ head.kernel + head.bias).argmax(axis=1)
    found = _plane.cells_at(points, cells.vertices, cells.starts, cells.classes)
    np.testing.assert_array_equal(found, labels)
    found = _plane.cells_at(cells.corners, cells.vertices, cells.starts, cells.classes)
    np.testing.assert_array_equal(found, (corners @ head.kernel + head.bias).argmax(axis=1))


def test_the_picture_is_that_of_the_full_grid_at_a_part_of_its_cost():
    corners = 3 * RNG.normal(size=(3, 2, 2, 3)).astype(np.float32)
    picture = plane_classes(network, corners, resolution=1 / 128)
    assert picture.status == Status.CONVERGED
    assert picture.classes.shape == (129, 129)
    ticks = [np.linspace(low, high, 129) for low, high in picture.view.T]
    spots = np.stack(np.meshgrid(*ticks), -1).astype(np.float32)
    images = picture.origin + np.tensordot(spots, picture.axes, 1)
    grid = np.asarray(network(jnp.asarray(images, "f4"))).argmax(-1)
    assert len(np.unique(grid)) >= 3
    # Classes thinner than the coarsest squares may be missed, hardly anything else.
    assert (picture.classes != grid).mean() < 0.002
    wrong = picture.classes[picture.evaluated] != grid[picture.evaluated]
    assert wrong.mean() < 0.001  # another batch rounds differently on a boundary
    assert picture.num_evaluations == picture.evaluated.sum() < 0.35 * grid.size
    # Every square on a boundary is as small as asked for.
    differ = picture.classes[:, 1:] != picture.classes[:, :-1]
    assert (picture.evaluated[:, 1:] & picture.evaluated[:, :-1])[differ].all()


def test_squares_that_agree_are_not_refined():
    ball = lambda x: jnp.stack([1 - jnp.sum((x - 1.5) ** 2, (1, 2, 3)), 0 * x[:, 0, 0, 0]], -1)  # noqa: E731
    corners = np.zeros((3, 1, 2, 1), np.float32)
    corners[1, 0, 0], corners[2, 0, 1] = 3, 3
    coarse = plane_classes(ball, corners, resolution=1 / 16)
    assert coarse.num_evaluations == 17**2
    fine = plane_classes(ball, corners, resolution=1 / 256)
    share = (fine.classes == 0).mean() * np.prod(fine.view[1] - fine.view[0])
    np.testing.assert_allclose(share, np.pi, rtol=0.02)
    assert fine.num_evaluations < 0.1 * fine.classes.size


def test_corners_on_a_line_or_all_equal_have_a_plane():
    image = RNG.normal(size=(2, 2, 3)).astype(np.float32)
    for corners in ([image, image, image], [image, 2 * image, 3 * image]):
        picture = plane_classes(network, np.stack(corners), resolution=1 / 16)
        rebuilt = picture.origin + np.tensordot(picture.corners, picture.axes, 1)
        np.testing.assert_allclose(rebuilt, corners, atol=1e-5)


def test_nan_is_told():
    hole = lambda x: jnp.where(x[..., :1] > 0.4, jnp.nan, x)  # noqa: E731
    corners = np.eye(3, dtype=np.float32)
    assert plane_classes(hole, corners, resolution=1 / 16).status == Status.NONFINITE


@pytest.mark.parametrize(
    ("corners", "options", "message"),
    [
        (np.zeros((2, 2, 2, 3), np.float32), {}, "corners.shape"),
        (np.zeros((3, 2, 2, 3), int), {}, "dtype"),
        (np.full((3, 2, 2, 3), np.nan, np.float32), {}, "corners"),
        (np.zeros((3, 2, 2, 3), np.float32), {"resolution": 2.0}, "resolution"),
        (np.zeros((3, 2, 2, 3), np.float32), {"margin": -1.0}, "margin"),
    ],
)
def test_bad_input_is_named(corners, options, message):
    with pytest.raises(ValueError, match=message):
        plane_classes(network, corners, **options)


def test_a_head_that_does_not_fit_is_named():
    head = LinearHead(np.ones((4, 2)), np.zeros(2))
    with pytest.raises(ValueError, match=r"corners\.shape to be \(3, dim\) = \(3, 4\)"):
        plane_cells(head, np.zeros((3, 5)))
