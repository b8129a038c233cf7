"""One message form: argument, value, way out; traced values pass, shapes never do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import _check


def refuses(check, *arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check(*arguments)


@pytest.mark.parametrize("value", [0, 0.0, 1e-6, np.float32(0.5), jnp.float32(0.5), np.array(2.0)])
def test_nonnegative_accepts(value):
    _check.nonnegative("rtol", value)


@pytest.mark.parametrize(
    "value",
    [-1e-9, float("nan"), float("inf"), "1e-6", None, [0.1], np.zeros(1), 1j, np.array("a")],
)
def test_nonnegative_refuses(value):
    refuses(
        _check.nonnegative, "rtol", value,
        message=f"Expected rtol to be a finite number >= 0, got rtol={value!r}.",
    )  # fmt: skip


@pytest.mark.parametrize("value", [1, 2.5, np.float64(1e-300), jnp.float32(3)])
def test_positive_accepts(value):
    _check.positive("scale", value)


@pytest.mark.parametrize("value", [0, -0.0, -1, float("nan"), float("inf"), None, "x", (1,)])
def test_positive_refuses(value):
    refuses(
        _check.positive, "scale", value,
        message=f"Expected scale to be a finite number > 0, got scale={value!r}.",
    )  # fmt: skip


@pytest.mark.parametrize("value", [2, 7, np.int64(2), np.array(3), jnp.int32(5)])
def test_at_least_accepts(value):
    _check.at_least("capacity", value, 2)


@pytest.mark.parametrize("value", [1, -3, 2.0, True, np.array([4]), None, "3", np.bool_(True)])
def test_at_least_refuses(value):
    refuses(
        _check.at_least, "capacity", value, 0 if isinstance(value, bool) else 2,
        message=f"Expected capacity to be an integer >= {0 if isinstance(value, bool) else 2}, "
        f"got capacity={value!r}.",
    )  # fmt: skip


def test_one_of():
    _check.one_of("variant", "away_step", ["vanilla", "away_step"])
    refuses(
        _check.one_of, "variant", "swiss", iter(["vanilla", "away_step"]),
        message="Expected variant to be one of 'vanilla', 'away_step', got variant='swiss'.",
    )  # fmt: skip
    with pytest.raises(ValueError, match="Expected variant to be one of"):
        _check.one_of("variant", np.zeros(2), ["vanilla", "away_step"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_floating_accepts(dtype):
    _check.floating("queries", jnp.zeros(2, dtype))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64])
def test_floating_refuses_and_shows_the_way_out(dtype):
    with pytest.raises(ValueError, match=r"Expected queries.dtype to be floating.*astype"):
        _check.floating("queries", np.zeros(2, dtype))


def test_rank_and_shape():
    _check.rank_at_least("queries", np.zeros((2, 3)), 1, "(*batch, dim)")
    refuses(
        _check.rank_at_least, "queries", np.zeros(()), 1, "(*batch, dim)",
        message="Expected queries.shape to be (*batch, dim), got queries.shape=().",
    )  # fmt: skip
    _check.shape("vertices", np.zeros((5, 3)), (None, 3), "(n, 3)")
    for wrong in [(0, 3), (5, 4), (5,), (1, 5, 3)]:
        refuses(
            _check.shape, "vertices", np.zeros(wrong), (None, 3), "(n, 3) with n > 0",
            message=f"Expected vertices.shape to be (n, 3) with n > 0, got vertices.shape={wrong}.",
        )  # fmt: skip


def test_all_finite_names_the_first_bad_number():
    _check.all_finite("vertices", np.zeros((2, 3), np.float32))
    _check.all_finite("vertices", np.zeros((0, 3)))
    _check.all_finite("labels", np.arange(3))
    bad = np.zeros((3, 2), np.float32)
    bad[1, 1], bad[2, 0] = np.inf, np.nan
    refuses(
        _check.all_finite, "vertices", bad, "Drop that row.",
        message="Expected vertices[1, 1] to be finite, got vertices[1, 1]=inf. Drop that row.",
    )  # fmt: skip
    refuses(
        _check.all_finite, "vertices", jnp.asarray(bad, jnp.bfloat16),
        message="Expected vertices[1, 1] to be finite",
    )  # fmt: skip


def test_traced_values_pass_and_traced_shapes_do_not():
    @jax.jit
    def traced(number, integer, array):
        _check.nonnegative("rtol", number)
        _check.positive("rtol", number)
        _check.at_least("max_steps", integer, 2)
        _check.all_finite("array", array)
        _check.floating("array", array)
        assert not _check.is_concrete(number)
        return array

    traced(-1.0, 0, jnp.full(2, jnp.nan))
    with pytest.raises(ValueError, match=r"array\.shape"):
        jax.jit(lambda array: _check.shape("array", array, (3,), "(3,)"))(jnp.zeros(2))
