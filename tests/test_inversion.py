"""Inversion: exact answers on linear features, bounds to the bit, rows on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
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


def test_any_leading_batch_and_vmap_agree():
    features, images, target = problem()
    flat = invert_features(features, target, images)
    single = invert_features(features, target[0], images[0])
    grid = invert_features(features, target.reshape(2, 2, -1), images.reshape(2, 2, 2, 3, 1))
    mapped = jax.vmap(lambda t, x: invert_features(features, t, x))(target, images)
    np.testing.assert_allclose(single.image, flat.image[0], atol=1e-5)
    np.testing.assert_allclose(grid.image.reshape(flat.image.shape), flat.image, atol=1e-5)
    np.testing.assert_allclose(mapped.image, flat.image, atol=1e-5)


def test_repeated_calls_compile_once():
    traces = []

    def counted(matrix, images):
        traces.append(1)
        return linear(matrix, images)

    _, images, target = problem()
    rng = np.random.default_rng(1)
    counts = []
    for limit in (5, 6, 7):
        matrix = rng.normal(size=(6, 3)).astype(np.float32)
        invert_features(Partial(counted, matrix), target, images, max_steps=limit, rtol=limit / 1e4)
        counts.append(len(traces))
    assert counts[0] == counts[-1]


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
