"""Distance to a convex hull: brackets against outside references, certificates, hard cases.

The front door is tested with a classic variant; `test_fully_corrective.py` has the engine's tests.
"""

from functools import partial

import daqp
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from sklearn.datasets import load_digits

from hullgeo import (
    Membership,
    Status,
    half_squared_distance,
    hull_distance,
    membership,
    project_to_hull,
)
from hullgeo.frank_wolfe import VARIANTS

CLASSIC = "blended_pairwise"
project = partial(project_to_hull, variant=CLASSIC)


def daqp_distance(query, vertices):
    """min |w|^2 / 2 with <w, v - q> >= 1: the plane of largest margin lies at distance 1 / |w|."""
    shifted = np.asarray(vertices, np.float64) - np.asarray(query, np.float64)
    scale = np.abs(shifted).max()
    count, dim = shifted.shape
    solution, _, flag, _ = daqp.solve(
        np.eye(dim), np.zeros(dim), shifted / scale, np.full(count, 1e30), np.ones(count),
        np.zeros(count, np.int32), primal_tol=1e-12, dual_tol=1e-12,
    )  # fmt: skip
    assert flag == 1
    return scale / np.linalg.norm(solution)


def nnls_distance(query, vertices):
    """min |U'a|^2 + (1'a - 1)^2 with a >= 0 and U = V - q; the nearest point is that of a / sum."""
    shifted = np.asarray(vertices, np.float64) - np.asarray(query, np.float64)
    scale = max(np.abs(shifted).max(), 1e-300)
    columns = np.vstack([shifted.T / scale, np.ones(len(shifted))])
    target = np.zeros(len(columns))
    target[-1] = 1
    weights, _ = scipy.optimize.nnls(columns, target, maxiter=10_000)
    return np.linalg.norm(weights @ shifted) / weights.sum()


def digits(dtype=np.float64, num_vertices=60, num_queries=4):
    """Real pixels; the default shape everywhere, so that few programs are compiled."""
    pixels = load_digits(return_X_y=True)[0]
    return pixels[1500 : 1500 + num_queries].astype(dtype), pixels[:num_vertices].astype(dtype)


def assert_bracket(answer, reference, slack):
    assert np.all(np.asarray(answer.distance_lower_bound, np.float64) <= reference + slack)
    assert np.all(np.asarray(answer.distance, np.float64) >= reference - slack)


def assert_consistent(answer, queries, vertices, dtype):
    """What every answer promises, recomputed in float64."""
    eps = np.finfo(np.float64).eps + float(jnp.finfo(dtype).eps)
    vertices, queries = np.asarray(vertices, np.float64), np.asarray(queries, np.float64)
    weights, point = np.asarray(answer.weights, np.float64), np.asarray(answer.point, np.float64)
    size = np.abs(vertices).max() + np.abs(queries).max()
    assert answer.point.dtype == answer.distance.dtype == answer.gap.dtype == dtype
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=8 * eps)
    mean = np.einsum("...s,...sd->...d", weights, vertices[np.asarray(answer.support)])
    np.testing.assert_allclose(point, mean / weights.sum(-1)[..., None], atol=8 * eps * size)
    distance = np.linalg.norm(point - queries, axis=-1)
    np.testing.assert_allclose(distance, answer.distance, rtol=1e-3, atol=50 * eps * size)
    assert np.all(answer.distance_lower_bound <= answer.distance)
    residual = point - queries
    gap = (residual * point).sum(-1) - (residual @ vertices.T).min(-1)
    np.testing.assert_allclose(gap, answer.gap, rtol=1e-2, atol=1e3 * eps * size**2)


@pytest.mark.parametrize("variant", [*VARIANTS, "fully_corrective"])
def test_variants_agree_with_daqp_and_nnls(variant):
    queries, vertices = digits()
    rtol = 1e-2 if variant == "vanilla" else 1e-6
    answer = project_to_hull(queries, vertices, variant=variant, rtol=rtol)
    assert (answer.status == Status.CONVERGED).all()
    reference = np.array([daqp_distance(query, vertices) for query in queries])
    other = np.array([nnls_distance(query, vertices) for query in queries])
    np.testing.assert_allclose(reference, other, rtol=1e-10)
    assert_bracket(answer, reference, 1e-9 * reference)
    width = answer.distance**2 - answer.distance_lower_bound**2
    assert np.all(width <= rtol * answer.distance**2)
    assert_consistent(answer, queries, vertices, jnp.float64)


@pytest.mark.parametrize(
    "dtype",
    [np.float32, jnp.bfloat16, pytest.param(np.float16, marks=pytest.mark.slow)],
)
def test_narrow_types_are_rounded_outwards(dtype):
    queries, vertices = digits(dtype)
    answer = project(queries, vertices)
    assert (answer.status == Status.CONVERGED).all()
    assert_consistent(answer, queries, vertices, dtype)
    reference = np.array([daqp_distance(query, vertices) for query in queries])
    assert_bracket(answer, reference, 1e-12 * reference)
    ulp = reference * float(jnp.finfo(dtype).eps)
    assert np.all(np.asarray(answer.distance, np.float64) <= reference * (1 + 1e-6) + 2 * ulp)


@given(
    points=st.lists(st.integers(-3, 3), min_size=21, max_size=21),
    targets=st.lists(st.integers(-5, 5), min_size=6, max_size=6),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_any_small_hull_is_bracketed(points, targets, scale, offset):
    vertices = (np.reshape(points, (7, 3)) + offset) * scale
    queries = (np.reshape(targets, (2, 3)) + offset) * scale
    answer = project(queries, vertices, max_steps=300)
    reference = np.array([nnls_distance(query, vertices) for query in queries])
    assert_bracket(answer, reference, 1e-9 * scale)
    assert np.all(answer.distance <= reference + 1e-3 * scale)
    verdict = np.asarray(membership(answer))
    assert np.all(verdict[reference > 1e-3 * scale] == Membership.OUTSIDE)
    assert np.all(verdict[reference < 1e-12 * scale] != Membership.OUTSIDE)


SQUARE = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])


def solve(query, vertices):
    query, vertices = np.asarray(query), np.asarray(vertices)
    answer = project(query, vertices)
    assert np.isfinite(answer.distance)
    assert_bracket(answer, nnls_distance(query, vertices), 1e-12)
    return answer


def test_inside_on_a_face_at_a_vertex_and_outside_of_a_square():
    at_a_vertex = solve([1.0, 1.0], SQUARE)
    assert at_a_vertex.distance == 0
    assert at_a_vertex.status == Status.CONVERGED
    assert membership(at_a_vertex) == Membership.INSIDE
    inside = solve([0.3, 0.1], SQUARE)
    assert inside.distance < 1e-12
    assert membership(inside) != Membership.OUTSIDE
    assert membership(inside, atol=1e-9) == Membership.INSIDE
    on_a_face = solve([1.0, 0.3], SQUARE)
    assert on_a_face.distance < 1e-12
    assert membership(on_a_face) != Membership.OUTSIDE
    outside = solve([2.0, 0.3], SQUARE)
    assert membership(outside) == Membership.OUTSIDE
    np.testing.assert_allclose(outside.distance, 1, rtol=1e-6)
    np.testing.assert_allclose(outside.point, [1, 0.3], atol=1e-6)


def test_duplicates_and_hulls_that_are_points():
    duplicates = solve([2.0, 0.3], np.repeat(SQUARE, 5, axis=0))
    np.testing.assert_allclose(duplicates.distance, 1, rtol=1e-6)
    all_equal = solve([4.0, 5.0], np.repeat(SQUARE[:1], 20, axis=0))
    np.testing.assert_allclose(all_equal.distance, 5, rtol=1e-13)
    assert all_equal.status == Status.CONVERGED
    zeros = solve([0.0, 1e-30], np.zeros((20, 2)))
    np.testing.assert_allclose(zeros.distance, 1e-30, rtol=1e-12)


@pytest.mark.parametrize(
    ("query", "vertices", "expected"),
    [
        ([4.0, 5.0], [[1.0, 1.0]], 5.0),  # one vertex
        ([3.0], [[1.0], [-1.0], [0.5]], 2.0),  # one dimension
        ([0.5, 0.5, 2.0, 0.0, 0.0], np.eye(5)[:2], 2.0),  # fewer vertices than dimensions
    ],
)
def test_smallest_shapes(query, vertices, expected):
    answer = solve(query, vertices)
    assert answer.status == Status.CONVERGED
    np.testing.assert_allclose(answer.distance, expected, rtol=1e-6)


@pytest.mark.parametrize(("scale", "offset"), [(1e-20, 0.0), (1e20, 0.0), (1e-30, 0.0), (1.0, 1e4)])
def test_scales_and_offsets_in_float32(scale, offset):
    rng = np.random.default_rng(2)
    vertices = ((rng.normal(size=(60, 64)) + offset) * scale).astype(np.float32)
    queries = ((2 * rng.normal(size=(4, 64)) + offset) * scale).astype(np.float32)
    answer = project(queries, vertices)
    reference = np.array([nnls_distance(query, vertices) for query in queries])
    assert_bracket(answer, reference, 1e-10 * scale)
    assert np.all(answer.status == Status.CONVERGED)
    assert np.all(np.asarray(answer.distance_lower_bound, np.float64) >= reference * (1 - 2e-6))


def test_subnormal_numbers_may_be_flushed_but_not_claimed():
    vertices, queries = np.zeros((60, 64), np.float32), np.zeros((4, 64), np.float32)
    vertices[1, 0] = vertices[2, 1] = 1e-38
    queries[:, :2] = np.array([[4e-39, 4e-39], [1e-38, 1e-38], [1e-38, 0], [0, 0]])
    answer = project(queries, vertices)
    reference = [nnls_distance(query, vertices) for query in queries]
    assert_bracket(answer, np.array(reference), 1e-50)


def test_nan_query_leaves_the_others_right():
    queries, vertices = digits()
    clean = project(queries, vertices)
    queries[2, 7], queries[3, 0] = np.nan, np.inf
    answer = project(queries, vertices)
    keep = np.array([0, 1])
    assert np.all(answer.status[keep] == Status.CONVERGED)
    assert np.all(np.delete(answer.status, keep) == Status.NONFINITE)
    assert np.isnan(answer.distance[2])
    assert np.all(membership(answer)[2:] == Membership.UNDECIDED)
    np.testing.assert_allclose(answer.distance[keep], clean.distance[keep], rtol=1e-6)


def test_float64_numpy_is_answered_in_float64_whatever_the_flag():
    queries, vertices = digits()
    with jax.enable_x64(False):
        answer = project(queries, vertices)
        verdict = membership(answer)
        value = half_squared_distance(queries, vertices, variant=CLASSIC)
        narrow = jax.jit(project)(queries.astype(np.float32), vertices.astype(np.float32))
    assert answer.distance.dtype == answer.weights.dtype == value.dtype == np.float64
    assert answer.num_steps.dtype == answer.status.dtype == verdict.dtype == np.int32
    width = answer.distance - answer.distance_lower_bound
    assert np.all(width <= 1e-6 * answer.distance)
    assert narrow.distance.dtype == np.float32
    assert (narrow.status == Status.CONVERGED).all()


def test_step_limit_and_precision_limit_are_admitted():
    queries, vertices = digits()
    limited = project(queries, vertices, max_steps=5)
    assert np.all(limited.status == Status.STEP_LIMIT)
    assert np.all(limited.num_steps == 5)
    impossible = project(queries, vertices, rtol=0.0)
    assert np.all(impossible.status == Status.PRECISION_LIMIT)
    reference = np.array([nnls_distance(query, vertices) for query in queries])
    assert_bracket(limited, reference, 1e-9)
    assert_bracket(impossible, reference, 1e-9)
    loose = project(queries, vertices, rtol=0.0, atol=10.0)
    assert np.all(loose.status == Status.CONVERGED)
    assert np.all(loose.distance**2 - loose.distance_lower_bound**2 <= 20)


@pytest.mark.slow
def test_more_slots_are_found_outside_jit_and_missed_inside():
    queries, vertices = digits()
    plenty = project(queries, vertices)
    few = int((np.asarray(plenty.weights) > 0).sum(1).min()) - 1
    outside = project(queries, vertices, capacity=few)
    assert np.all(outside.status == Status.CONVERGED)
    np.testing.assert_allclose(outside.distance, plenty.distance, rtol=1e-6)
    inside = jax.jit(lambda q, v: project(q, v, capacity=few))(queries, vertices)
    assert np.all(inside.status == Status.CAPACITY)
    assert_bracket(inside, np.asarray(plenty.distance), 1e-6 * np.asarray(plenty.distance))


def test_any_leading_batch():
    queries, vertices = digits()
    flat = project(queries, vertices)
    grid = project(queries.reshape(2, 1, 2, 64), vertices)
    assert grid.point.shape == (2, 1, 2, 64)
    assert grid.distance.shape == grid.status.shape == (2, 1, 2)
    np.testing.assert_allclose(grid.distance.ravel(), flat.distance, rtol=1e-6)
    none = project(queries[:0], vertices)
    assert none.point.shape == (0, 64)
    assert none.distance.shape == (0,)


def assert_same(one, other):
    """Both certified, and the brackets of one distance overlap."""
    assert np.all(one.status == Status.CONVERGED)
    assert np.all(other.status == Status.CONVERGED)
    assert np.all(one.distance_lower_bound <= other.distance)
    assert np.all(other.distance_lower_bound <= one.distance)


def test_inside_jit_and_vmap():
    queries, vertices = digits()
    answer = project(queries, vertices)
    assert_same(answer, jax.jit(project)(queries, vertices))
    lanes = jax.vmap(project, in_axes=(0, None))
    assert_same(answer, lanes(jnp.asarray(queries), jnp.asarray(vertices)))
    assert_same(jax.tree.map(lambda x: x[1], answer), project(queries[1], vertices))


@pytest.mark.slow
def test_inside_scan_and_shard_map():
    queries, vertices = digits()
    answer = project(queries, vertices)

    def body(carry, query):
        return carry, project(query, vertices)

    assert_same(answer, jax.lax.scan(body, 0, jnp.asarray(queries))[1])
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda query: project(query, vertices),
        mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch"),
    )  # fmt: skip
    assert_same(answer, jax.jit(split)(jnp.asarray(queries)))


@pytest.mark.parametrize("size", [3, 6])
@pytest.mark.slow
def test_queries_split_over_devices(size):
    queries, vertices = digits(num_queries=size)
    assert len(jax.devices()) == 4
    split = project(queries, vertices, devices=jax.devices())
    assert split.point.shape == queries.shape
    assert_same(split, project(queries, vertices))


def test_sweeping_tolerances_compiles_once():
    queries, vertices = digits()
    jax.block_until_ready(project(queries, vertices))
    sweep = [(1e-3, 0.0, 100), (1e-5, 1.0, 7), (jnp.asarray(0.1), 0.0, 50)]
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for rtol, atol, max_steps in sweep:
        project(queries + 1, vertices, rtol=rtol, atol=atol, max_steps=max_steps)
    assert not compiled
    jax.jit(lambda x: x + 17)(1.0)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled  # the counter counts


@pytest.mark.parametrize("function", [half_squared_distance, hull_distance])
def test_gradients_are_finite_differences(function):
    rng = np.random.default_rng(4)
    vertices, queries = rng.normal(size=(9, 3)), 3 * rng.normal(size=(4, 3))

    @jax.jit
    def values(queries, vertices):
        return function(queries, vertices, rtol=1e-13, variant=CLASSIC)

    def slope(argument, index):
        arrays = [queries.copy(), vertices.copy()]
        totals = []
        for shift in (1e-4, -2e-4):
            arrays[argument][index] += shift
            totals.append(float(values(*arrays).sum()))
        return (totals[0] - totals[1]) / 2e-4

    value, pullback = jax.vjp(values, queries, vertices)
    gradients = pullback(jnp.ones_like(value))
    for argument in (0, 1):
        shape = gradients[argument].shape
        numeric = np.array([slope(argument, index) for index in np.ndindex(shape)]).reshape(shape)
        np.testing.assert_allclose(gradients[argument], numeric, atol=1e-5)
        assert np.abs(numeric).max() > 0.1


@pytest.mark.slow
def test_gradients_forward_mode_vmapped_and_checkpointed():
    rng = np.random.default_rng(4)
    vertices, queries = rng.normal(size=(9, 3)), 3 * rng.normal(size=(4, 3))
    answer = project(queries, vertices, rtol=1e-13)

    def value(query):
        return half_squared_distance(query, vertices, rtol=1e-13, variant=CLASSIC)

    expected = queries - np.asarray(answer.point)
    np.testing.assert_allclose(jax.vmap(jax.grad(value))(queries), expected, atol=1e-6)
    slopes = jax.jvp(value, (queries,), (np.ones_like(queries),))[1]
    np.testing.assert_allclose(slopes, expected.sum(1), atol=1e-6)
    again = jax.grad(lambda q: jnp.sum(jax.checkpoint(value)(q)))(queries)
    np.testing.assert_allclose(again, expected, atol=1e-6)


def test_gradients_in_float32_at_a_vertex_and_beside_nan():
    rng = np.random.default_rng(4)
    vertices = rng.normal(size=(9, 3)).astype(np.float32)
    queries = np.stack([3 * vertices[0], vertices[1], np.full(3, np.nan)]).astype(np.float32)

    @jax.jit
    def gradients(queries, vertices):
        def total(queries, vertices):
            return jnp.nansum(hull_distance(queries, vertices, variant=CLASSIC))

        return jax.grad(total, (0, 1))(queries, vertices)

    to_queries, to_vertices = gradients(queries, vertices)
    assert to_queries.dtype == to_vertices.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(to_queries[0]), 1, rtol=1e-5)
    np.testing.assert_array_equal(to_queries[1], 0)
    assert np.isfinite(to_vertices).all()


@pytest.mark.usefixtures("plain_types")
def test_membership_uses_the_callers_tolerance():
    queries, vertices = digits()
    answer = project(queries, vertices)
    assert np.all(membership(answer) == Membership.OUTSIDE)
    between = float(np.sort(answer.distance)[1:3].mean())
    verdict = membership(answer, atol=between)
    assert sorted(verdict.tolist()) == [Membership.OUTSIDE] * 2 + [Membership.INSIDE] * 2
    np.testing.assert_array_equal(jax.jit(membership)(answer), membership(answer))
    with pytest.raises(ValueError, match=r"Expected atol to be .*, got atol=-1"):
        membership(answer, atol=-1)


@pytest.mark.usefixtures("plain_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.ones((2, 3))}, r"queries.shape to end in dim=2.*\(2, 3\)"),
        ({"queries": np.float64(1)}, r"queries.shape to be \(\*batch, dim\)"),
        ({"queries": np.ones((2, 2), int)}, "queries.dtype to be floating"),
        ({"vertices": np.ones((4, 2), int)}, "vertices.dtype to be floating"),
        ({"vertices": np.ones((0, 2))}, "vertices.shape to be"),
        ({"vertices": np.ones(2)}, "vertices.shape to be"),
        ({"vertices": np.array([[0.0, 1], [np.nan, 0]])}, r"vertices\[1, 0\] to be finite"),
        ({"variant": "lazy"}, "variant to be one of"),
        ({"rtol": -1e-6}, "rtol to be"),
        ({"rtol": np.nan}, "rtol to be"),
        ({"atol": -1.0}, "atol to be"),
        ({"max_steps": 0}, "max_steps to be an integer >= 1"),
        ({"capacity": 1}, "capacity to be an integer >= 2"),
        ({"devices": []}, "devices to hold at least one"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"queries": np.ones((2, 2)), "vertices": np.eye(2)} | change
    with pytest.raises(ValueError, match=message):
        project_to_hull(**arguments)


def test_traced_vertices_that_are_not_finite_leave_nothing_proved():
    queries, vertices = digits()
    vertices[3, 5] = np.nan
    answer = jax.jit(project)(queries, vertices)
    assert np.all(answer.status == Status.NONFINITE)
    assert np.all(membership(answer) == Membership.UNDECIDED)
