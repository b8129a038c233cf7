"""Norms without overflow, roundings judged by exact fractions, float64 islands anywhere."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from hullgeo import _numerics

NARROW = [jnp.float32, jnp.bfloat16, jnp.float16]
HARD = np.concatenate(
    [
        [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 1 / 3, 1 + 2.0**-24, 1 + 2.0**-23, 1 - 2.0**-25],
        [65504, 65520, 3.4028234663852886e38, 3.4028235e38, 1e39, -1e39, 1e300, -1e300],
        [1e-300, -1e-300, 2.0**-126, 1.1754944e-38, -1.1754943e-38, 1e-40, -1e-40, 1.4e-45],
        [1e-46, 5e-324, -5e-324, 6e-5, 7e-5, 6e-8, 2.5e-8, -2.5e-8, 1.5e-39, 9.2e-41],
    ]
)


def exact(value) -> Fraction | float:
    number = float(np.asarray(value, np.float64))
    if abs(number) < np.finfo(np.float64).smallest_normal:
        return Fraction(0)
    return Fraction(number) if np.isfinite(number) else number


def assert_brackets(values, dtype):
    """Judged outside XLA, by Fractions and by NumPy's rounding, which know subnormal numbers."""
    down = np.asarray(jax.jit(_numerics.round_down, static_argnums=1)(values, dtype))
    up = np.asarray(jax.jit(_numerics.round_up, static_argnums=1)(values, dtype))
    assert down.dtype == up.dtype == dtype
    limits = jnp.finfo(dtype)
    for value, low, high in zip(values, down, up, strict=True):
        assert exact(low) <= exact(value) <= exact(high), (value, low, high)
        smallest, largest = float(limits.smallest_normal), float(limits.max)
        assert all(float(end) == 0 or abs(float(end)) >= smallest for end in (low, high))
        if smallest <= abs(value) <= largest:
            # Tight: one of the two is the nearest number, and they are neighbours.
            nearest = value.astype(dtype)
            assert nearest in (low, high), (value, low, high)
            assert (low == high) == (float(nearest) == float(value)), (value, low, high)
            assert float(high) - float(low) <= 2 * float(limits.eps) * abs(float(value))


@pytest.mark.parametrize("dtype", NARROW)
def test_outward_rounding_of_hard_numbers(dtype):
    assert_brackets(HARD, dtype)


@pytest.mark.parametrize("dtype", NARROW)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
def test_outward_rounding_of_any_number(dtype, values):
    assert_brackets(np.array(values), dtype)


def test_rounding_keeps_nan_infinity_and_equal_types():
    for rounding in [_numerics.round_down, _numerics.round_up]:
        assert not np.signbit(rounding(jnp.float64(0), jnp.float32))
        special = rounding(jnp.array([jnp.nan, jnp.inf, -jnp.inf]), jnp.float32)
        np.testing.assert_array_equal(special, np.array([np.nan, np.inf, -np.inf], np.float32))
        same = np.asarray(rounding(jnp.asarray(HARD), jnp.float64))
        normal = (smallest := np.finfo(float).tiny) <= np.abs(HARD)
        np.testing.assert_array_equal(same[normal], HARD[normal])
        assert (np.abs(same[~normal]) <= smallest).all()  # CPUs read them as zero, GPUs do not
        wider = rounding(jnp.float32(0.1), jnp.float64)
        assert wider.dtype == jnp.float64
        assert float(wider) == float(np.float32(0.1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e-36, 1.0, 1e20, 5e37])
def test_norm_at_any_scale(dtype, scale):
    rng = np.random.default_rng(0)
    array = (scale * rng.normal(size=(7, 5))).astype(dtype)
    wide = array.astype(np.longdouble)
    expected = np.sqrt((wide**2).sum(-1))
    got = _numerics.norm(jnp.asarray(array))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected.astype(np.float64), rtol=4 * np.finfo(dtype).eps)


def test_norm_of_special_rows_leaves_the_others():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [1e308, 1e308]])
    np.testing.assert_allclose(
        _numerics.norm(rows), [5, 0, np.nan, np.inf, np.sqrt(2) * 1e308], rtol=1e-15
    )
    assert _numerics.norm(jnp.zeros((3, 0))).tolist() == [0, 0, 0]
    assert _numerics.norm(jnp.zeros(2)).shape == ()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_norm_gradient_is_the_unit_vector(scale):
    array = jnp.asarray(scale * np.random.default_rng(1).normal(size=(4, 3)))
    gradient = jax.vmap(jax.grad(_numerics.norm))(array)
    np.testing.assert_allclose(gradient, array / _numerics.norm(array)[:, None], rtol=1e-14)
    tangent = jax.jvp(_numerics.norm, (array,), (array,))[1]
    np.testing.assert_allclose(tangent, _numerics.norm(array), rtol=1e-14)


def test_norm_gradient_is_zero_at_the_origin():
    np.testing.assert_array_equal(jax.jit(jax.grad(_numerics.norm))(jnp.zeros(3)), np.zeros(3))
    row = jnp.array([[0.0, 0.0], [0.0, 2.0]])
    gradient = jax.grad(lambda value: _numerics.norm(value).sum())(row)
    np.testing.assert_array_equal(gradient, [[0, 0], [0, 1]])


def test_product_says_its_precision():
    jaxpr = jax.make_jaxpr(_numerics.product)(jnp.zeros((2, 3)), jnp.zeros((3, 4)))
    (equation,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert "HIGHEST" in str(equation.params["precision"])


def test_argmin_is_the_first_smallest_or_the_first_nan():
    rows = np.random.default_rng(2).integers(0, 4, size=(5, 3, 8)).astype(np.float64)
    rows[1, 1, 5:] = np.nan
    rows[2, 0] = np.inf
    np.testing.assert_array_equal(_numerics.argmin(jnp.asarray(rows)), np.argmin(rows, axis=-1))
    assert _numerics.argmin(jnp.ones(3)).dtype == jnp.int32


def island(row):
    """Sums that float32 gets wrong, with a float64 carry, index and loop inside."""
    with _numerics.float64():
        wide = row.astype(jnp.float64)
        start = (jnp.zeros((), jnp.int32), 0 * wide[0], 0 * wide[0])

        def body(carry):
            step, total, compensation = carry
            term = lax.dynamic_index_in_dim(wide, step, keepdims=False)
            return step + jnp.int32(1), total + term, compensation + term * jnp.float64(1e-12)

        size = jnp.int32(row.shape[0])
        _, total, small = lax.while_loop(lambda carry: carry[0] < size, body, start)
        least = _numerics.argmin(wide)
        return (total + small - total).astype(row.dtype), total.astype(row.dtype), least


ROW = np.array([2.0**24, 1.0, 1.0, -(2.0**24), 3.0], np.float32)
SMALL = np.float32(5e-12)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("way", ["plain", "jit", "vmap", "jit_vmap", "scan", "pmap", "shard_map"])
def test_islands_whatever_the_flag_and_the_transformation(way, x64):
    rows = np.stack([ROW, ROW[::-1].copy(), 2 * ROW, ROW])
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    ways = {
        "plain": lambda rows: [jnp.stack(parts) for parts in zip(*map(island, rows), strict=True)],
        "jit": lambda rows: [
            jnp.stack(parts) for parts in zip(*map(jax.jit(island), rows), strict=True)
        ],
        "vmap": jax.vmap(island),
        "jit_vmap": jax.jit(jax.vmap(island)),
        "scan": lambda rows: lax.scan(lambda carry, row: (carry, island(row)), 0, rows)[1],
        "pmap": jax.pmap(island),
        "shard_map": jax.jit(
            jax.shard_map(jax.vmap(island), mesh=mesh, in_specs=spec, out_specs=spec)
        ),
    }
    with jax.enable_x64(x64):
        small, total, least = ways[way](jnp.asarray(rows))
        assert small.dtype == total.dtype == jnp.float32
        assert least.dtype == jnp.int32
        np.testing.assert_allclose(total, [5, 5, 10, 5], rtol=0)
        np.testing.assert_allclose(small, [SMALL, SMALL, 2 * SMALL, SMALL], rtol=1e-3)
        np.testing.assert_array_equal(least, [3, 1, 3, 3])


def test_island_gradient():
    def total(row):
        with _numerics.float64():
            wide = row.astype(jnp.float64)
            return jnp.sum(wide * wide).astype(jnp.float32)

    with jax.enable_x64(False):
        gradient = jax.jit(jax.grad(total))(jnp.asarray(ROW))
        assert gradient.dtype == jnp.float32
        np.testing.assert_array_equal(gradient, 2 * ROW)


def test_rounding_out_of_an_island_with_the_flag_off():
    @partial(jax.jit, static_argnums=1)
    def leave(row, rounding):
        with _numerics.float64():
            return rounding(jnp.sum(row.astype(jnp.float64)) / jnp.float64(3), jnp.float32)

    with jax.enable_x64(False):
        low = leave(jnp.float32([1, 0]), _numerics.round_down)
        high = leave(jnp.float32([1, 0]), _numerics.round_up)
        assert low.dtype == high.dtype == jnp.float32
        assert Fraction(float(low)) < Fraction(1, 3) < Fraction(float(high))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_narrowed_number_is_not_widened_to_the_one_before(dtype):
    # XLA leaves out a conversion there and back where it may; it must see a rounding here.
    def there_and_back(value):
        return _numerics.narrow(value, dtype).astype(jnp.float64)

    value = jnp.asarray(np.random.default_rng(0).normal(size=100))
    assert "reduce_precision" in str(jax.make_jaxpr(there_and_back)(value))
    expected = np.asarray(value).astype(dtype).astype(np.float64)
    np.testing.assert_array_equal(jax.jit(there_and_back)(value), expected)
    assert "reduce_precision" in jax.jit(there_and_back).lower(value).as_text()
