"""The screening pass: no vertex escapes it, and its error bound holds."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import _numerics, oracle, prepare, prepare_hull

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("num", "dim"), [(1, 3), (33, 5), (2049, 4), (5000, 7), (9000, 3)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("phase", [oracle.SAMPLE, oracle.SKETCH, oracle.COARSE, oracle.FINE])
@pytest.mark.parametrize(
    ("unrolled", "long"),
    [(160, 1024), (16, 1024), (0, 1024), (32, 1)],
    ids=["one chunk", "slices", "whole", "product at once"],
)
def test_every_class_names_its_least_unmasked_vertex(num, dim, phase, unrolled, long, monkeypatch):
    monkeypatch.setattr(oracle, "_UNROLLED", unrolled)  # accelerators reduce a chunk at once
    monkeypatch.setattr(oracle, "_LONG", long)
    vertices = RNG.standard_normal((num, dim)).astype(np.float32)
    components = min(num, dim) if phase == oracle.SKETCH else 0  # all: only bfloat16 is lost
    hull = prepare_hull(vertices, naming_dtype=jnp.bfloat16, num_components=components)
    if phase not in hull.phases:
        assert (phase, num < 8192) == (oracle.SAMPLE, True)
        return
    off = 1e-5 if phase == oracle.FINE else 0.02
    candidates = np.asarray(hull.sampled) if phase == oracle.SAMPLE else np.arange(num)
    direction = RNG.standard_normal((3, dim)).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    masked = np.full((3, 4), num, np.int32)
    masked[0, :2] = candidates[[0, len(candidates) // 2]]
    found = hull.screen(jnp.asarray(direction), jnp.asarray(masked), phase=phase)

    rows = np.asarray(hull.rows).reshape(-1, dim)[np.asarray(hull.place(candidates))]
    scores = rows.astype(np.float64) @ direction.T.astype(np.float64)
    for lane in range(3):
        allowed = ~np.isin(candidates, masked[lane])
        value = np.asarray(found.value)[lane]
        if allowed.any():
            assert value.min() == pytest.approx(scores[allowed, lane].min(), abs=off)
        named = np.asarray(found.index)[lane][np.isfinite(value)]
        assert not np.isin(named, masked[lane]).any()
        if num > 100:
            assert len(named) == len(value)
        position = np.argmax(candidates == named[:, None], axis=1)
        assert (candidates[position] == named).all()
        assert (np.abs(value[np.isfinite(value)] - scores[position, lane]) < off).all()


@pytest.mark.parametrize("dim", [3, 1025])
def test_the_sample_holds_the_most_outlying_vertices_where_the_covariance_is_known(dim):
    vertices = (RNG.standard_normal((8200, dim)) * np.linspace(1, 5, dim)).astype(np.float32)
    hull = prepare_hull(vertices, num_components=0)
    sampled = np.sort(hull.sampled)
    if dim > 1024:
        assert (sampled == np.arange(0, 8200, 8)).all()
        return
    centred = vertices - np.asarray(hull.center)
    norms = np.einsum("id,de,ie->i", centred, np.asarray(hull.inverse_covariance), centred)
    assert len(sampled) == 1025
    assert np.isin(sampled, np.argsort(-norms)[:1025]).mean() > 0.99
    place = np.asarray(hull.in_sample)
    assert (np.asarray(hull.sampled)[place[sampled]] == sampled).all()
    assert (np.delete(place, sampled) == 1025).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators have larger chunks")
@pytest.mark.parametrize("phase", [oracle.COARSE, oracle.FINE])
def test_nearby_vertices_are_the_best_of_each_group_and_class(phase, monkeypatch):
    for name, value in {"_SMALLEST_NEARBY": 0, "_UNROLLED": 2, "_SLICES": (2, 2)}.items():
        monkeypatch.setattr(oracle, name, value)
    num, dim, classes = 3001, 5, 32
    vertices = RNG.standard_normal((num, dim)).astype(np.float32)
    hull = prepare_hull(vertices, naming_dtype=jnp.bfloat16)
    assert hull.num_nearby == 2 * classes
    chunks, size, _ = hull.rows.shape
    group = np.arange(num) // size // -(-chunks // 2)
    direction = RNG.standard_normal((3, dim)).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    rows = np.asarray(hull.rows).reshape(-1, dim)[np.asarray(hull.place(np.arange(num)))]
    scores = rows.astype(np.float64) @ direction.T.astype(np.float64)
    masked = np.full((3, 4), num, np.int32)
    masked[:, 0] = scores.argmin(axis=0)
    scores[masked[:, 0], np.arange(3)] = np.inf
    first = hull.screen(jnp.asarray(direction), jnp.asarray(masked), phase=phase)
    off = 1e-6 if phase == oracle.FINE else 0.02
    for lane in range(3):
        for place, named in enumerate(np.asarray(first.nearby)[lane]):
            fellows = (group == place // classes) & (np.arange(num) % classes == place % classes)
            assert fellows[named]
            assert scores[named, lane] == pytest.approx(scores[fellows, lane].min(), abs=off)

    masked[:, 1] = np.take_along_axis(
        np.asarray(first.index), np.asarray(first.value).argmin(1)[:, None], axis=1
    )[:, 0]
    scores[masked[:, 1], np.arange(3)] = np.inf
    again = hull.screen_nearby(jnp.asarray(direction), jnp.asarray(masked), first.nearby)
    # What one lane has named serves the others; classes are counted among these alone.
    shared = np.asarray(first.nearby).reshape(-1)
    shared = shared[[vertex not in shared[at + 1 :] for at, vertex in enumerate(shared)]]
    among = np.full((3, classes), np.inf)
    np.minimum.at(among.T, np.arange(len(shared)) % classes, scores[shared])
    np.testing.assert_allclose(again.value, among, atol=1e-6)
    named = np.take_along_axis(scores.T, np.asarray(again.index), axis=1)
    np.testing.assert_allclose(named, again.value, atol=1e-6)
    none = jnp.full_like(first.nearby, num)
    nobody = hull.screen_nearby(jnp.asarray(direction), jnp.asarray(masked), none)
    assert np.all(np.isinf(nobody.value))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_screened_values_are_within_their_error_bound(scale, offset):
    vertices = ((RNG.standard_normal((40, 6)) + offset) * scale).astype(np.float32)
    hull = prepare_hull(vertices)
    unit = RNG.standard_normal((1, 6))
    unit /= np.linalg.norm(unit)
    direction = unit.astype(np.float32)
    rows = np.asarray(hull.rows).reshape(-1, 6)[np.asarray(hull.place(np.arange(40)))]
    screened = rows @ direction[0]
    bound = float(hull.error(jnp.asarray(unit), jnp.asarray(direction))[0])
    center = [Fraction(float(value)) for value in np.asarray(hull.center)]
    factor = Fraction(2) ** -int(hull.exponent)
    for row, value in zip(vertices, screened, strict=True):
        exact = sum(
            (Fraction(float(entry)) - middle) * factor * Fraction(float(weight))
            for entry, middle, weight in zip(row, center, unit[0], strict=True)
        )
        assert abs(Fraction(float(value)) - exact) <= Fraction(bound)
    assert bound < 1e-5
    assert float(hull.radius) <= 1


def test_constant_coordinates_and_flushed_numbers_are_noticed():
    vertices = RNG.standard_normal((20, 3)).astype(np.float32)
    vertices[:, 1] = 0.1
    hull = prepare_hull(vertices)
    assert list(np.asarray(hull.constant)) == [False, True, False]
    assert float(hull.flushed) == 0
    vertices[3, 0] = 1e-40
    assert 0 < float(prepare_hull(vertices).flushed) < 1e-30


@pytest.mark.parametrize("value", [0.3, 1.0, 1.5, 2.0**-700, 3e250, 0.0])
def test_powers_of_two(value):
    exponent = oracle.exponent_of(jnp.asarray(value))
    power = float(oracle.power_of_two(exponent))
    assert power == 2.0 ** int(exponent)
    assert value <= power
    assert value == 0 or power <= 4 * value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("wide", [False, True])
def test_a_prepared_hull_is_the_same_inside_jit_and_keeps_its_type(dtype, wide):
    vertices = RNG.standard_normal((20, 3)).astype(dtype)
    with jax.enable_x64(wide):
        hull = prepare_hull(vertices)
        assert hull.vertices.dtype == dtype
        np.testing.assert_array_equal(hull.vertices, vertices)
        assert hull.rows.dtype == hull.radius.dtype == np.float32
        if wide or dtype == np.float32:
            inside = jax.jit(prepare_hull)(vertices)
            jax.tree.map(np.testing.assert_array_equal, inside, hull)
            jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda same: same)(hull), hull)


def test_bad_vertices_are_named():
    with pytest.raises(ValueError, match=r"vertices\[2, 1\]"):
        prepare_hull(np.array([[0, 0], [1, 0], [0, np.nan]], np.float32))
    with pytest.raises(ValueError, match=r"vertices\.shape"):
        prepare_hull(np.ones((0, 2), np.float32))


def test_another_naming_type_is_refused():
    with pytest.raises(ValueError, match=r"naming_dtype to be one of .*got naming_dtype='float16'"):
        prepare_hull(np.eye(3), naming_dtype=jnp.float16)


def test_the_faster_type_is_measured_once_even_under_a_trace():
    _numerics.bfloat16_pays.cache_clear()
    pays = jax.jit(lambda one: one if _numerics.bfloat16_pays() else 0 * one)(jnp.ones(()))
    assert _numerics.bfloat16_pays.cache_info().currsize == 1
    large = prepare_hull(np.eye(2**14, 2, dtype=np.float32))
    assert (oracle.COARSE in large.phases) == bool(pays)
    assert oracle.COARSE not in prepare_hull(np.eye(3, dtype=np.float32)).phases


def test_a_sketch_is_made_where_few_components_hold_nearly_all_variance(monkeypatch):
    monkeypatch.setattr(prepare, "_SMALLEST_SKETCHED", 64)
    rows = RNG.standard_normal((5000, 64))
    turned = rows * np.arange(1, 65) ** -1.5 @ np.linalg.qr(RNG.standard_normal((64, 64)))[0]
    hull = prepare_hull(turned.astype(np.float32), naming_dtype=jnp.float32)
    assert hull.phases == (oracle.SKETCH, oracle.FINE)
    assert hull.components.shape == (64, 8)
    components = np.asarray(hull.components)
    np.testing.assert_allclose(components.T @ components, np.eye(8), atol=1e-5)
    assert hull.left_out.shape == hull.sketch.shape[:2]
    kept = np.sum(np.asarray(hull.sketch) ** 2) / np.sum(np.asarray(hull.rows) ** 2)
    best = np.sum(np.arange(1.0, 9) ** -3) / np.sum(np.arange(1.0, 65) ** -3)
    assert kept == pytest.approx(best, abs=0.01)
    assert oracle.SKETCH not in prepare_hull(rows.astype(np.float32)).phases  # varies everywhere
    assert oracle.SKETCH not in prepare_hull(turned.astype(np.float32), num_components=0).phases
    wanted = jax.jit(partial(prepare_hull, num_components=4))(turned[:70].astype(np.float32))
    assert oracle.SKETCH in wanted.phases
    long = prepare_hull(
        np.pad(turned[:70].astype(np.float32), ((0, 0), (0, 961))), num_components=4
    )
    assert oracle.SKETCH in long.phases
    assert not long.left_out.size  # with so many dimensions, passes score in all of them
    # All rows alike: there is no variance to be shared, and nothing is decided by 0 / 0.
    assert oracle.SKETCH not in prepare_hull(np.ones((5000, 64), np.float32)).phases


@pytest.mark.parametrize("count", [-1, 4])
def test_components_beyond_the_dimensions_are_refused(count):
    with pytest.raises(ValueError, match=rf"num_components.*from 0 to 3.*num_components={count}"):
        prepare_hull(np.ones((5, 3), np.float32), num_components=count)


@pytest.mark.parametrize("num", [60, 2000])
def test_the_first_direction_separates_a_query_from_a_flat_cloud(num):
    spread = np.array([1, 1, 1e-3])
    vertices = (RNG.standard_normal((num, 3)) * spread).astype(np.float32)
    hull = prepare_hull(vertices)
    query = np.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]], np.float32)
    found = np.asarray(hull.first_direction(jnp.asarray(query)))
    assert np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-6)
    assert found[0, 2] < -0.98  # across the cloud, where -query would be -0.58
    assert (found[1] == 0).all()
    with jax.enable_x64(True):  # where float32 overflows
        far = hull.first_direction(jnp.asarray(query.astype(np.float64) * 1e60))
    np.testing.assert_allclose(far, found, rtol=1e-5)
    same = prepare_hull(np.ones((num, 3), np.float32))
    np.testing.assert_allclose(
        same.first_direction(jnp.asarray(query[:1]))[0], -(3**-0.5), rtol=1e-6
    )
