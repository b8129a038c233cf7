"""Inversion: exact answers on linear features, bounds to the bit, rows on their own."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadprog
import scipy.optimize
from jax.tree_util import Partial

from hullgeo import Status, invert_features


def linear(matrix, images):
    return images.reshape(images.shape[0], -1) @ matrix


def problem(dtype=np.float32, size=4, dim=3, shape=(2, 3, 1), seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(int(np.prod(shape)), dim)).astype(dtype)
    images = rng.uniform(0.3, 0.7, (size, *shape)).astype(dtype)
    goal = rng.uniform(0.2, 0.8, (size, *shape)).astype(dtype)
    return Partial(linear, matrix), images, goal.reshape(size, -1) @ matrix


def nearest(matrix, image, target):
    """Distance to the nearest image within [0, 1] with these features, by quadprog."""
    pixels, dim = matrix.shape
    rows = np.concatenate([matrix.T, np.eye(pixels), -np.eye(pixels)]).astype(float)
    offsets = np.concatenate([target, np.zeros(pixels), -np.ones(pixels)]).astype(float)
    start = image.reshape(-1).astype(float)
    answer = quadprog.solve_qp(np.eye(pixels), start, rows.T, offsets, dim)[0]
    return np.linalg.norm(answer - start)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_a_reachable_target_is_reached_within_the_bounds(dtype):
    features, images, target = problem(dtype)
    result = invert_features(features, target, images)
    assert result.image.dtype == dtype
    assert (result.status == Status.CONVERGED).all()
    assert (result.residual <= 1e-3).all()
    assert (result.image >= 0).all()
    assert (result.image <= 1).all()
    np.testing.assert_allclose(features(result.image), result.features, rtol=1e-5)
    error = np.linalg.norm(result.features - target, axis=-1) / np.linalg.norm(target, axis=-1)
    np.testing.assert_allclose(error, result.residual, rtol=1e-2, atol=1e-7)


def test_an_unreachable_target_ends_at_the_bounds_with_a_status():
    features, images, _ = problem()
    far = np.asarray(features(np.ones_like(images))) * 50
    result = invert_features(features, far, images, max_steps=200, optimizer=optax.sgd(0.5))
    assert (result.status != Status.CONVERGED).all()
    assert (result.active > 0).all()
    assert ((result.image >= 0) & (result.image <= 1)).all()


def test_a_target_that_no_image_has_is_missed_by_as_little_as_possible():
    features, images, target = problem(np.float64, dim=5)
    beyond = target + 6 * (target - np.asarray(features(images)))
    found = invert_features(features, beyond, images)
    for row, goal in enumerate(beyond):
        best = scipy.optimize.lsq_linear(features.args[0].T, goal, (0, 1))
        least = np.sqrt(2 * best.cost) / np.linalg.norm(goal)
        assert least > 0.01
        assert found.residual[row] < 1.001 * least


def shut(matrix, shift, images):
    return jnp.maximum(linear(matrix, images) - shift[None], 0)


def test_a_unit_that_is_off_is_told_apart():
    features, images, _ = problem(dim=3)
    values = np.asarray(features(images))
    shift = np.append(values[:, :2].min(0), values[:, 2].max()) + np.float32([-1, -1, 1])
    features = Partial(shut, features.args[0], shift)
    start = np.asarray(features(images))
    assert (start[:, 2] == 0).all()
    target = start * np.float32(1.01) + np.float32([0.01, 0.01, 0])
    within = invert_features(features, target, images)
    assert (within.status == Status.CONVERGED).all()
    assert (within.num_dead == 0).all()
    beyond = invert_features(features, target + np.float32([0, 0, 1]), images)
    assert (beyond.status == Status.NO_GRADIENT).all()
    assert (beyond.num_dead == 1).all()


def test_a_nan_row_leaves_the_others_right():
    features, images, target = problem()
    clean = invert_features(features, target, images)
    images = images.copy()
    images[1, 0, 0, 0] = np.nan
    result = invert_features(features, target, images)
    assert result.status[1] == Status.NONFINITE
    assert np.isnan(result.residual[1])
    for row in (0, 2, 3):
        np.testing.assert_allclose(result.image[row], clean.image[row], atol=1e-6)


def test_any_leading_batch_agrees():
    features, images, target = problem()
    flat = invert_features(features, target, images)
    grid = invert_features(features, target.reshape(2, 2, -1), images.reshape(2, 2, 2, 3, 1))
    np.testing.assert_array_equal(grid.image.reshape(flat.image.shape), flat.image)


def test_features_that_cannot_move_are_told():
    features, images, target = problem()
    still = Partial(linear, np.zeros_like(features.args[0]))
    result = invert_features(still, target, images)
    assert (result.status == Status.NO_GRADIENT).all()
    np.testing.assert_array_equal(result.stationarity, 0)
    np.testing.assert_allclose(result.residual, 1, rtol=1e-6)


def test_linear_answers_are_the_nearest():
    features, images, target = problem()
    near = invert_features(features, target, images)
    exact = np.array([nearest(features.args[0], *row) for row in zip(images, target, strict=True)])
    assert np.isfinite(exact).all()
    np.testing.assert_allclose(near.pixel_distance, exact, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 2, 3, 1), int)}, "images.dtype"),
        ({"images": np.zeros((3, 2, 3, 1), np.float32)}, "images.shape"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"bounds": 1.0}, "bounds"),
        ({"rtol": -1.0}, "rtol"),
        ({"max_steps": -1}, "max_steps"),
    ],
)
def test_bad_input_is_named(change, message):
    features, images, target = problem()
    options = {"target": jnp.asarray(target), "images": images} | change
    with pytest.raises(ValueError, match=message):
        invert_features(features, **options)
