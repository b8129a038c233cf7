"""Splitting a batch over devices: nothing lost, nothing mixed, nothing compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo.parallel import split_over_devices

traces = []


def affine(replicated, batched):
    traces.append(1)
    matrix, offset = replicated["matrix"], replicated["offset"]
    return {"image": batched["x"] @ matrix + offset[None], "count": batched["n"] + 1}


def arguments(size):
    rng = np.random.default_rng(0)
    replicated = {"matrix": rng.normal(size=(3, 2)), "offset": rng.normal(size=2)}
    return replicated, {"x": rng.normal(size=(size, 3)), "n": np.arange(size)}


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8])
def test_ragged_batches_are_padded_and_cut(size):
    replicated, batched = arguments(size)
    split = split_over_devices(affine, replicated, batched, jax.devices())
    expected = batched["x"] @ replicated["matrix"] + replicated["offset"]
    np.testing.assert_allclose(split["image"], expected, atol=1e-14)
    np.testing.assert_array_equal(split["count"], np.arange(size) + 1)


def test_every_device_gets_its_share_and_only_those_named():
    seen = {}

    def record(_, rows):
        jax.debug.callback(lambda place, rows: seen.update({int(place): rows}), rows[0], rows)
        return rows

    split_over_devices(record, 0.0, np.arange(6), jax.devices()[:3])
    jax.effects_barrier()
    assert {place: rows.tolist() for place, rows in seen.items()} == {
        0: [0, 1], 2: [2, 3], 4: [4, 5],
    }  # fmt: skip


def test_repeated_calls_compile_once():
    replicated, batched = arguments(5)
    split_over_devices(affine, replicated, batched, jax.devices())
    traces.clear()
    for shift in range(3):
        moved = jax.tree.map(lambda array, by=shift: array + by, batched)
        split_over_devices(affine, replicated, moved, jax.devices())
    assert not traces
    split_over_devices(affine, replicated, batched, jax.devices()[:2])
    assert traces


def test_nan_stays_in_its_row():
    replicated, batched = arguments(6)
    batched["x"][4] = np.nan
    image = split_over_devices(affine, replicated, batched, jax.devices())["image"]
    assert np.isnan(image[4]).all()
    assert np.isfinite(jnp.delete(image, 4, axis=0)).all()


def test_one_device_is_the_plain_function():
    replicated, batched = arguments(4)
    split = split_over_devices(affine, replicated, batched, jax.devices()[:1])
    plain = jax.jit(affine)(replicated, batched)
    jax.tree.map(np.testing.assert_array_equal, split, plain)
