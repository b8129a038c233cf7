"""Least-norm steps inside a box against quadprog, and convolutions rewritten for loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog
from jax import lax

from hullgeo import _box
from hullgeo._convolution import canonical


def reference(matrix, right, lower, upper, equations):
    """The shortest point in the box with `matrix @ d >= right`, or equal, by quadprog."""
    pixels = matrix.shape[1]
    rows = np.concatenate([matrix, np.eye(pixels), -np.eye(pixels)])
    offsets = np.concatenate([right, lower, -upper])
    return quadprog.solve_qp(
        np.eye(pixels), np.zeros(pixels), rows.T, offsets, len(right) if equations else 0
    )[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inequality", [False, True])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_steps_are_the_shortest(dtype, inequality, scale):
    rng = np.random.default_rng(0)
    count, rows, pixels = 20, 4, 12
    matrix = rng.normal(size=(count, rows, pixels))
    lower, upper = -rng.uniform(0.1, 1, (count, pixels)), rng.uniform(0.1, 1, (count, pixels))
    inner = rng.uniform(lower, upper)
    right = np.einsum("nkp,np->nk", matrix, inner)
    arrays = [(array * scale).astype(dtype) for array in (matrix, right)]
    arrays += [array.astype(dtype) for array in (lower, upper)]
    options = {"ridge": 1e-7, "inequality": inequality, "num_steps": 15}
    steps = np.asarray(_box.least_norm(*map(jnp.asarray, arrays), **options))
    assert steps.dtype == dtype
    assert (steps >= arrays[2]).all()
    assert (steps <= arrays[3]).all()
    for row in range(count):
        exact = reference(matrix[row], right[row], lower[row], upper[row], not inequality)
        np.testing.assert_allclose(steps[row], exact, atol=2e-3)


def test_dependent_and_missing_rows_are_harmless():
    matrix = np.zeros((2, 3, 5), np.float32)
    matrix[0] = 1.0
    bound = jnp.ones((2, 5), jnp.float32)
    right = np.full((2, 3), 0.5, np.float32) * np.array([[1], [0]], np.float32)
    options = {"ridge": 1e-6, "inequality": False, "num_steps": 6}
    steps = _box.least_norm(jnp.asarray(matrix), jnp.asarray(right), -bound, bound, **options)
    np.testing.assert_allclose(steps[0], 0.1, rtol=1e-4)
    np.testing.assert_array_equal(steps[1], 0)


def test_rewritten_convolutions_have_the_same_gradient():
    rng = np.random.default_rng(0)
    filters = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)
    images = jnp.asarray(rng.normal(size=(3, 9, 8, 2)), jnp.float32)

    def loss(images):
        layout = ("NHWC", "HWIO", "NHWC")
        out = lax.conv_general_dilated(
            images, filters, (2, 1), [(1, 1), (0, 2)], dimension_numbers=layout
        )
        return (jax.nn.relu(out) ** 2).sum()

    plain, rewritten = jax.grad(loss), canonical(jax.grad(loss))
    np.testing.assert_allclose(rewritten(images), plain(images), rtol=1e-5, atol=1e-5)
    jaxpr = str(jax.make_jaxpr(rewritten)(images))
    assert jaxpr.count("conv_general_dilated[") == str(jax.make_jaxpr(plain)(images)).count(
        "conv_general_dilated["
    )
    assert "rhs_spec=(3, 2, 0, 1)" in jaxpr
    assert "rhs_spec=(2, 3, 0, 1)" not in jaxpr
