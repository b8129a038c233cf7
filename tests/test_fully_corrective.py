"""The engine: hard cases in one shape, every transformation, compilations and memory counted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
from jax.sharding import PartitionSpec

from hullgeo import (
    Membership,
    Status,
    _numerics,
    active_set,
    bracket,
    buckets,
    fully_corrective,
    membership,
    oracle,
    prepare,
    prepare_hull,
    programs,
    project_to_hull,
)  # fmt: skip
from hullgeo.bracket import Tolerances
from hullgeo.sketch import Sketch

VERTICES, DIM, QUERIES = 60, 6, 4  # one shape for most tests: few programs are compiled


def reference(query, vertices):
    """min |U'a|^2 + (1'a - 1)^2 with a >= 0 and U = V - q; the nearest point is that of a / sum."""
    rows = np.unique(np.asarray(vertices, np.float64), axis=0) - np.asarray(query, np.float64)
    scale = max(np.abs(rows).max(), 1e-300)
    columns = np.vstack([rows.T / scale, np.ones(len(rows))])
    weights, _ = scipy.optimize.nnls(columns, np.eye(len(columns))[-1], maxiter=10_000)
    return scale * np.linalg.norm(weights @ (rows / scale)) / weights.sum()


def cloud(seed=0):
    return np.random.default_rng(seed).normal(size=(VERTICES, DIM))


def around(seed=1, size=2.5):
    return size * np.random.default_rng(seed).normal(size=(QUERIES, DIM))


def filled(rows):
    """As many vertices as in all other cases, copies among them."""
    return np.resize(np.asarray(rows, float), (VERTICES, DIM))


def on_a_facet():
    hull = scipy.spatial.ConvexHull(cloud())
    return cloud()[hull.simplices[:QUERIES]].mean(axis=1)


def flat(points):
    """Two coordinates in which nothing varies."""
    return np.concatenate([points[:, : DIM - 2], np.full((len(points), 2), 3.0)], axis=1)


def near(distance):
    """Just outside of facets, in the middle of them."""
    hull = scipy.spatial.ConvexHull(cloud())
    return on_a_facet() + distance * hull.equations[:QUERIES, :-1]


LIMITS = Tolerances(*(np.asarray(limit) for limit in (1e-6, 0.0, np.int32(50), False)))
HARD = {
    "outside": (cloud(), around()),
    "inside": (cloud(), around(size=0.2)),
    "at a vertex": (cloud(), cloud()[:QUERIES]),
    "on a facet": (cloud(), on_a_facet()),
    "1e-4 outside": (cloud(), near(1e-4)),
    "1e-8 outside": (cloud(), near(1e-8)),
    "1e-8 inside": (cloud(), near(-1e-8)),
    "duplicates": (filled(cloud()[:7]), around()),
    "all equal": (filled(cloud()[:1]), around()),
    "two points": (filled(cloud()[:2]), around()),
    "nearly parallel": (1e-7 * cloud() + np.eye(DIM)[0], around()),
    "empty interior, outside": (flat(cloud()), around()),
    "empty interior, inside": (flat(cloud()), flat(around(size=0.2))),
    "far offset": (cloud() + 1e4, around() + 1e4),
    "1e-20": (1e-20 * cloud(), 1e-20 * around()),
    "1e20": (1e20 * cloud(), 1e20 * around()),
    "integers": (np.round(cloud()), np.round(around())),
    "heavy tails": (cloud() ** 5, around()),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", HARD)
def test_hard_cases_are_bracketed_and_judged(case, dtype):
    vertices, queries = (array.astype(dtype) for array in HARD[case])
    answer = jax.tree.map(np.asarray, project_to_hull(queries, vertices))
    expected = np.array([reference(query, vertices) for query in queries])
    size = np.abs(vertices).max() + np.abs(queries).max()
    lower, upper = (
        np.asarray(x, np.float64) for x in (answer.distance_lower_bound, answer.distance)
    )
    slack = 1e-9 * expected + 1e-13 * size  # of the reference
    assert np.all(lower <= expected + slack)
    assert np.all(upper >= expected - slack)
    weights = answer.weights.astype(np.float64)
    point = np.einsum("bs,bsd->bd", weights, vertices[answer.support].astype(np.float64))
    np.testing.assert_allclose(answer.point, point, atol=8 * np.finfo(dtype).eps * size)
    assert np.all(answer.num_steps < 100)  # rounding may let a basis change for ever
    verdict = np.asarray(membership(answer))
    if case == "inside" or case == "empty interior, inside":
        assert np.all(answer.status == Status.CONVERGED)
        assert np.all(verdict == Membership.INSIDE)
        assert np.all(upper == 0)
    elif case == "at a vertex":
        assert np.all(upper == 0)
        assert np.all(answer.status == Status.CONVERGED)
    elif np.all(expected > 1e-5 * size):
        assert np.all(verdict == Membership.OUTSIDE)
        assert np.all(answer.status == Status.CONVERGED)
        ulp = 4 * np.finfo(dtype).eps
        assert np.all(upper - lower <= (1e-6 + ulp) * upper)
    else:  # closer to the boundary than the reference can tell, or rounded across it
        assert np.all(lower[expected < 1e-13 * size] <= 1e-13 * size)


@pytest.mark.parametrize("distance", [1e-4, 1e-8])
def test_certified_close_to_the_hull(distance):
    """The true distances are known: the queries lie beyond the middle of facets."""
    answer = project_to_hull(near(distance), cloud())
    assert np.all(answer.status == Status.CONVERGED)
    np.testing.assert_allclose(answer.distance, distance, rtol=1e-6)
    inside = project_to_hull(near(-distance), cloud())
    assert np.all(membership(inside) == Membership.INSIDE)
    assert np.all(inside.interior_radius <= distance * (1 + 1e-6))


def test_the_ball_of_an_inside_query_lies_in_the_hull():
    queries = around(size=0.3)
    answer = project_to_hull(queries, cloud())
    equations = scipy.spatial.ConvexHull(cloud()).equations
    depth = -np.max(queries @ equations[:, :-1].T + equations[:, -1], axis=1)
    assert np.all(depth > 0)
    assert np.all(answer.interior_radius > 0)
    assert np.all(answer.interior_radius <= depth + 1e-12)


@pytest.mark.parametrize(
    ("query", "vertices", "expected"),
    [
        ([4.0, 5.0], [[1.0, 1.0]], 5.0),  # one vertex
        ([3.0], [[1.0], [-1.0], [0.5]], 2.0),  # one dimension
        ([0.5], [[1.0], [-1.0], [0.5]], 0.0),
        ([0.5, 0.5, 2.0, 0.0, 0.0], np.eye(5)[:2], 2.0),  # fewer vertices than dimensions
    ],
)
def test_smallest_shapes(query, vertices, expected):
    answer = project_to_hull(np.array(query), np.asarray(vertices))
    assert answer.status == Status.CONVERGED
    np.testing.assert_allclose(answer.distance, expected, rtol=1e-6)


@pytest.mark.slow
def test_many_more_dimensions_than_vertices():
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(20, 20_000)).astype(np.float32)
    queries = np.stack([np.float32(0.3) * vertices[:9].sum(axis=0), vertices[:5].mean(axis=0)])
    answer = project_to_hull(queries, vertices)
    # In their span nothing is lost: rotate vertices and queries into it.
    basis, _ = np.linalg.qr(np.concatenate([vertices, queries]).astype(np.float64).T)
    expected = [reference(query, vertices @ basis) for query in queries @ basis]
    assert answer.status[0] == Status.CONVERGED
    np.testing.assert_allclose(answer.distance[0], expected[0], rtol=1e-6)
    assert float(answer.distance_lower_bound[1]) <= expected[1] + 1e-5


def test_nan_row_leaves_the_others_right():
    queries = around()
    clean = project_to_hull(queries, cloud())
    queries[1, 3], queries[2, 0] = np.nan, -np.inf
    answer = project_to_hull(queries, cloud())
    assert answer.status.tolist() == [0, Status.NONFINITE, Status.NONFINITE, 0]
    assert np.isnan(np.asarray(answer.distance)[1:3]).all()
    np.testing.assert_array_equal(answer.distance[::3], clean.distance[::3])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_supports_take_more_slots_and_no_float64_passes(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(200, 40)).astype(np.float32)
    queries = vertices[:8] + 3 * np.abs(rng.normal(size=(8, 40))).astype(np.float32)
    hull = prepare_hull(vertices, naming_dtype=dtype)
    plenty = project_to_hull(queries, hull, capacity=48)
    assert (np.asarray(plenty.weights) > 0).sum(axis=1).max() > 6
    with monkeypatch.context() as patch:
        patch.delattr(programs, "finish_supports")
        assert_same(project_to_hull(queries, hull, capacity=3), plenty)


def test_passes_made_before_the_slots_overflowed_are_counted():
    hull = prepare_hull(cloud().astype(np.float32), num_components=3)
    with jax.enable_x64(True):
        lanes = fully_corrective.start(hull, jnp.asarray(around().astype(np.float32)), 20)
        lanes = lanes._replace(steps=lanes.steps + 5)
        named = jax.jit(partial(fully_corrective.name_candidates, phase=oracle.SKETCH))
        assert np.all(named(hull, lanes, LIMITS).steps > 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "components", "nearby", "phases"),
    [
        (jnp.bfloat16, 0, False, (oracle.SAMPLE, oracle.COARSE, oracle.FINE)),
        (jnp.float32, 2, False, (oracle.SAMPLE, oracle.SKETCH, oracle.FINE)),
        (jnp.float32, 0, True, (oracle.SAMPLE, oracle.FINE)),
        (jnp.bfloat16, 2, True, (oracle.SAMPLE, oracle.SKETCH, oracle.COARSE, oracle.FINE)),
    ],
    ids=["bfloat16", "components", "nearby", "all"],
)
def test_however_candidates_are_named_brackets_are_the_same(
    dtype, components, nearby, phases, monkeypatch
):
    """More queries than one batch, some inside, in and outside of jit; the step limit holds."""
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(9000, DIM)).astype(np.float32)
    size = np.repeat([0.3, 1.5], 70)[:, None]
    queries = (size * rng.normal(size=(140, DIM))).astype(np.float32)
    expected = project_to_hull(queries, prepare_hull(vertices, naming_dtype=jnp.float32))
    if nearby:
        monkeypatch.setattr(oracle, "_SMALLEST_NEARBY", 0)
        vertices = np.append(vertices, vertices[:1], axis=0)  # programs are kept by shape
    named = prepare_hull(vertices, naming_dtype=dtype, num_components=components)
    assert named.phases == phases
    assert bool(named.num_nearby) == nearby
    # Of a thousand queries inside one stays undecided, whatever names the candidates.
    assert_same(project_to_hull(queries, named), expected, undecided=1)
    assert_same(jax.jit(project_to_hull)(queries, named), expected, undecided=1)
    assert_same(project_to_hull(queries, named, start=expected), expected, undecided=1)
    in_rows = named._replace(left_out=named.left_out[:0])  # as of long rows
    assert_same(project_to_hull(queries, in_rows), expected, undecided=1)
    verdict, known = (
        membership(answer)
        for answer in (project_to_hull(queries, named, verdict_only=True), expected)
    )
    differs = verdict != known
    assert np.sum(differs) <= 2
    assert np.all((verdict == Membership.UNDECIDED) | (known == Membership.UNDECIDED) | ~differs)
    cut = project_to_hull(queries, named, max_steps=2)
    assert np.all(cut.num_steps <= 2)
    assert np.any(cut.status == Status.STEP_LIMIT)
    assert np.all(cut.distance_lower_bound <= expected.distance)
    assert np.all(cut.distance >= expected.distance_lower_bound)


def test_more_vertices_in_the_band_than_slots_hold_no_pass_over_few_for_ever(monkeypatch):
    """Copies up to rounding fill all slots, and more of them could join at every pass."""
    for name, value in {"_SMALLEST_NEARBY": 0, "_UNROLLED": 2, "_SLICES": (2, 2)}.items():
        monkeypatch.setattr(oracle, name, value)
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(400, DIM))
    vertices[:200] = 8 * np.eye(DIM)[0] + 1e-7 * vertices[:200]
    queries = 20 * np.eye(DIM)[0] + 0.1 * rng.normal(size=(64, DIM))
    hull = prepare_hull(vertices.astype(np.float32))
    assert hull.num_nearby > 0
    answer = project_to_hull(queries.astype(np.float32), hull)
    assert np.all(answer.status == Status.CONVERGED)
    assert answer.distance == pytest.approx(np.linalg.norm(queries - vertices[0], axis=1), rel=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_components_leave_out_of_a_vertex_counts_as_a_coordinate_of_its_own(dtype):
    """The supports are those of the points [E' v_i, t_i e_i], exactly."""
    rng = np.random.default_rng(5)
    vertices = (rng.normal(size=(VERTICES, 12)) / np.arange(1, 13)).astype(np.float32)
    queries = (8 * rng.normal(size=(16, 12)) / np.arange(1, 13)).astype(np.float32)
    hull = prepare_hull(vertices, naming_dtype=dtype, num_components=4)
    few, every = Sketch(hull), jnp.arange(VERTICES, dtype=jnp.int32)

    def supports(queries):
        shifted = fully_corrective.start(hull, queries, 24).shifted
        projected = jnp.matmul(shifted.astype(jnp.float32), hull.components, precision="highest")
        lanes = fully_corrective.start(few, projected, 24)
        return shifted, fully_corrective.name_candidates(few, lanes, LIMITS, phase=oracle.SAMPLE)

    with jax.enable_x64(True):
        exact, lanes = jax.jit(supports)(queries)
    points, left_out = np.asarray(few.gather(every), np.float64), np.sqrt(few.left_out(every))
    everything = np.asarray(hull.rows).reshape(-1, 12)[np.asarray(hull.place(every))]
    np.testing.assert_allclose(
        np.sum(points**2, axis=1) + left_out**2, np.sum(everything**2, axis=1), rtol=1e-5
    )
    components = np.asarray(hull.components, np.float64)
    for lane, shifted in enumerate(np.asarray(exact)):
        columns = np.vstack(
            [(points - shifted @ components).T, np.diag(left_out), np.ones(VERTICES)]
        )
        weights, _ = scipy.optimize.nnls(columns, np.eye(len(columns))[-1], maxiter=10_000)
        best = np.flatnonzero(weights > 1e-3 * weights.sum())
        named = np.asarray(lanes.active.index)[lane][np.asarray(lanes.active.value)[lane] > 0]
        assert set(best) == set(named)
    assert isinstance(few, oracle.Oracle)


def test_supports_in_components_leave_their_other_slots_to_what_is_nearly_named():
    """Slots are filled, with different vertices, the problem on them solved; inside is none."""
    rng = np.random.default_rng(5)
    vertices = (rng.normal(size=(VERTICES, 12)) / np.arange(1, 13)).astype(np.float32)
    queries = (8 * rng.normal(size=(16, 12)) / np.arange(1, 13)).astype(np.float32)
    queries[0] = vertices.mean(axis=0)
    queries[1] = np.nan
    hull = prepare_hull(vertices, num_components=4)
    with jax.enable_x64(True):
        start = partial(fully_corrective.start_in_components, slots=16)
        active = jax.jit(start)(hull, queries, tolerances=LIMITS).active
    assert not np.any(active.used[:2])
    assert np.all(active.used[2:])
    for lane in range(2, 16):
        index = np.asarray(active.index)[lane]
        assert len(set(index.tolist())) == 16
        rows = vertices[index].astype(np.float64) - queries[lane]
        weights = np.asarray(active_set.weights(active), np.float64)[lane]
        found = np.linalg.norm(weights @ rows)
        np.testing.assert_allclose(found, reference(queries[lane], vertices[index]), rtol=1e-5)
        assert np.sum(weights > 0) < 16


def test_a_pass_for_the_live_lanes_is_one_for_all():
    hull = prepare_hull(cloud().astype(np.float32))
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(16, DIM)), jnp.float32)
    masked = jnp.full((16, 2), VERTICES, jnp.int32).at[:, 0].set(jnp.arange(16, dtype=jnp.int32))
    expected = hull.screen(direction, masked)
    for number in (0, 7, 8, 9, 12, 13, 16):
        live = np.random.default_rng(number).permutation(16) < number
        found = jax.jit(fully_corrective.screen_live)(hull, live, direction, masked)
        np.testing.assert_allclose(found.value[live], expected.value[live], rtol=1e-6)
        np.testing.assert_array_equal(found.index[live], expected.index[live])
        assert number > 12 or np.all(np.isposinf(found.value[~live]))


@pytest.mark.slow
def test_slots_overflow_and_grow_outside_jit_only():
    few = partial(project_to_hull, capacity=3)
    plenty = project_to_hull(around(), cloud())
    assert (np.asarray(plenty.weights) > 0).sum(axis=1).max() > 3
    assert_same(few(around(), cloud()), plenty)
    traced = jax.jit(few)(around(), cloud())
    assert np.all((np.asarray(traced.status) == 0) | (np.asarray(traced.status) == Status.CAPACITY))
    assert np.any(traced.status == Status.CAPACITY)
    assert np.all(traced.distance_lower_bound <= plenty.distance)
    assert np.all(traced.distance >= plenty.distance_lower_bound)


def test_the_step_limit_is_admitted():
    answer = project_to_hull(around(), cloud(), max_steps=1)
    assert np.any(answer.status == Status.STEP_LIMIT)
    assert np.all(answer.num_steps <= 1)
    expected = np.array([reference(query, cloud()) for query in around()])
    assert np.all(answer.distance_lower_bound <= expected * (1 + 1e-9))
    assert np.all(answer.distance >= expected * (1 - 1e-9))


def test_a_verdict_needs_fewer_passes_and_is_the_same():
    rng = np.random.default_rng(3)
    vertices = rng.normal(size=(3000, DIM)).astype(np.float32)
    size = np.repeat([0.3, 1.5], 16)[:, None]
    queries = (size * rng.normal(size=(32, DIM))).astype(np.float32)
    full = project_to_hull(queries, vertices)
    fast = project_to_hull(queries, vertices, verdict_only=True)
    assert np.all(fast.status == Status.CONVERGED)
    np.testing.assert_array_equal(membership(fast), membership(full))
    assert set(np.asarray(membership(full)).tolist()) == {Membership.INSIDE, Membership.OUTSIDE}
    assert np.sum(fast.num_steps) < np.sum(full.num_steps)
    assert np.all(fast.distance_lower_bound <= full.distance)
    assert np.all(fast.distance >= full.distance_lower_bound)


def test_a_former_answer_saves_passes_and_a_bad_one_does_no_harm():
    rng = np.random.default_rng(3)
    vertices = rng.normal(size=(3000, DIM)).astype(np.float32)
    queries = (3 * rng.normal(size=(32, DIM))).astype(np.float32)
    cold = project_to_hull(queries, vertices)
    warm = project_to_hull(queries, vertices, start=cold)
    assert_same(warm, cold)
    assert np.all(warm.num_steps <= 2)
    assert np.mean(cold.num_steps) > 2
    moved = project_to_hull(queries, vertices + np.float32(1e-3), start=cold)
    assert_same(moved, project_to_hull(queries, vertices + np.float32(1e-3)))
    wrong = cold._replace(
        support=np.asarray(cold.support)[::-1] + 10_000, weights=np.full_like(cold.weights, np.nan)
    )
    assert_same(project_to_hull(queries, vertices, start=wrong), cold)
    traced = jax.jit(lambda queries, start: project_to_hull(queries, vertices, start=start))
    assert_same(traced(queries, cold), cold)


def test_bad_options_are_named():
    answer = project_to_hull(around(), cloud())
    with pytest.raises(ValueError, match=r"start\.support\.shape to be"):
        project_to_hull(around()[:2], cloud(), start=answer)
    with pytest.raises(ValueError, match="variant to be 'fully_corrective'"):
        project_to_hull(around(), cloud(), verdict_only=True, variant="away")


def test_the_hyperplane_separates():
    answer = project_to_hull(around(), cloud())
    normal, offset = np.asarray(answer.normal), np.asarray(answer.offset)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, rtol=1e-12)
    assert np.all(cloud() @ normal.T < offset)
    assert np.all(np.sum(around() * normal, axis=1) > offset)
    inside = project_to_hull(around(size=0.2), cloud())
    np.testing.assert_array_equal(inside.normal, 0)


def assert_same(one, other, undecided=0):
    """Both certified but for so many queries, and the brackets of one distance overlap."""
    assert np.sum(one.status != Status.CONVERGED) <= undecided
    assert np.sum(other.status != Status.CONVERGED) <= undecided
    assert np.all(one.distance_lower_bound <= other.distance)
    assert np.all(other.distance_lower_bound <= one.distance)


def mixed():
    """Two queries outside and two inside."""
    return np.concatenate([around()[:2], around(size=0.2)[2:]])


def test_inside_jit_vmap_and_stop_gradient():
    vertices, queries = cloud(), mixed()
    expected = project_to_hull(queries, vertices)
    assert_same(expected, jax.jit(project_to_hull)(queries, vertices))
    lanes = jax.vmap(project_to_hull, in_axes=(0, None))
    assert_same(expected, lanes(jnp.asarray(queries), jnp.asarray(vertices)))

    def weighted(queries):
        answer = project_to_hull(jax.lax.stop_gradient(queries), vertices)
        return jnp.sum(queries * answer.point), answer

    slope, answer = jax.grad(weighted, has_aux=True)(jnp.asarray(queries))
    assert_same(expected, answer)
    np.testing.assert_allclose(slope, answer.point, rtol=1e-12)


@pytest.mark.slow
def test_inside_scan_pmap_and_shard_map():
    vertices, queries = cloud(), mixed()
    expected = project_to_hull(queries, vertices)
    assert_same(expected, project_to_hull(queries, vertices, devices=jax.devices()))

    def body(carry, query):
        return carry, project_to_hull(query, vertices)

    assert_same(expected, jax.lax.scan(body, 0, jnp.asarray(queries))[1])
    mapped = jax.pmap(lambda query: project_to_hull(query, vertices))(queries[:, None])
    assert_same(expected, jax.tree.map(lambda array: array[:, 0], mapped))
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda query: project_to_hull(query, vertices),
        mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch"),
    )  # fmt: skip
    assert_same(expected, jax.jit(split)(jnp.asarray(queries)))


def test_programs_are_compiled_per_bucket_not_per_size():
    """Batches of any size fill a few buckets of lanes, each compiled once."""
    rng = np.random.default_rng(5)
    vertices = prepare_hull(rng.normal(size=(70, DIM)))
    counted = (programs.begin, programs.name, programs.conclude, programs.finish_supports)

    def counts():
        return np.array([program._cache_size() for program in counted])

    before = counts()
    for size in (2, 3, 5, 8, 7, 4, 6):
        project_to_hull(3 * rng.normal(size=(size, DIM)), vertices, rtol=1e-4, max_steps=50)
    project_to_hull(rng.normal(size=(4, DIM)), vertices, rtol=1e-9)
    # A full batch, and the last queries of several batches gathered in a smaller one.
    assert np.all(counts() - before <= 2)
    assert (counts() - before)[1] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "dim"),
    [(5_000, 512), (200_000, 32), (100, 20_000)],
)
def test_peak_memory_is_a_small_multiple_of_the_vertices(number, dim):
    """What XLA sets aside: 2.3 times the input to prepare, a little for the passes.

    One query whose support may be all of a few vertices takes a dozen times as much to finish.
    """
    shape = jax.ShapeDtypeStruct
    size = 4 * number * dim

    def temporary(program, *arguments, **static):
        compiled = program.lower(*arguments, **static).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    vertices = shape((number, dim), jnp.float32)
    hull = jax.eval_shape(partial(prepare._prepare, coarse=True), vertices)
    assert temporary(prepare._prepare, vertices, coarse=True) < 2.5 * size
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(hull))
    assert kept < 2.7 * size
    slots = buckets.default_slots(number, dim)
    lanes = buckets.num_lanes(256, slots, dim, number)
    tolerances = Tolerances(
        shape((), jnp.float64), shape((), jnp.float64), shape((), jnp.int32), shape((), jnp.bool_)
    )
    query = shape((lanes, dim), jnp.float32)
    state = jax.eval_shape(
        lambda hull, query: programs.begin(hull, query, None, slots=slots), hull, query
    )
    count = shape((), jnp.int32)
    assert temporary(programs.name, hull, state, tolerances, count, count) < 3 * size
    wide = buckets.finishing_slots(number, dim, slots)
    lanes = buckets.num_lanes(256, 2 * wide, dim, number)
    support = shape((lanes, slots), jnp.int32), shape((lanes, slots), jnp.bool_)
    finishing = temporary(
        programs.finish_supports,
        hull,
        tolerances,
        shape((lanes, dim), jnp.float32),
        *support,
        shape((lanes,), jnp.int32),
        slots=max(wide, slots),
        dtype=jnp.dtype("float32"),
    )
    assert finishing < 16 * size


def test_a_lane_without_support_claims_nothing():
    vertices, queries = cloud(), mixed()
    hull = prepare_hull(vertices)
    with _numerics.float64():
        lanes = fully_corrective.start(hull, jnp.asarray(queries), 8)
        tolerances = Tolerances(
            jnp.float64(1e-6), jnp.float64(0), jnp.int32(100), jnp.asarray(False)
        )
        dtype = jnp.dtype(jnp.float32)
        decision = bracket.decide(hull, lanes, tolerances, dtype, inside=False)
    upper = np.asarray(decision.upper) * 2.0 ** float(hull.exponent)
    np.testing.assert_allclose(upper, np.linalg.norm(vertices[0] - queries, axis=1))
    assert not np.asarray(decision.converged).any()


@pytest.mark.parametrize("number", [20, 130])  # the last lanes of a full batch go on alone
def test_few_vertices_are_named_by_their_gram_matrix(number):
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(100, 120)).astype(np.float32)
    vertices[50] = vertices[0]
    queries = np.concatenate([2 * rng.normal(size=(number, 120)), vertices[:1]])
    queries = queries.astype(np.float32)
    queries[3, 2] = np.nan
    hull = prepare_hull(vertices)
    assert hull.gram.shape == (100, 100)
    answer = project_to_hull(queries, hull)
    assert list(np.flatnonzero(answer.status != Status.CONVERGED)) == [3]
    assert answer.status[3] == Status.NONFINITE
    # Most are decided by the one pass that follows.
    assert np.median(answer.num_steps) == 1
    traced = jax.jit(project_to_hull)(queries, hull)
    finite = np.arange(len(queries)) != 3
    for one, other in ((answer, traced), (traced, answer)):
        assert (one.distance_lower_bound <= other.distance)[finite].all()
        np.testing.assert_allclose(one.distance[finite], other.distance[finite], atol=1e-6)
    assert answer.distance[-1] == 0
    expected = [reference(query, vertices) for query in queries[:3]]
    np.testing.assert_allclose(answer.distance[:3], expected, rtol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators decide whole batches")
def test_decisions_keep_to_the_memory_of_a_batch():
    assert buckets.num_decided(128, 48, 2048, 1000) == 8
    assert buckets.num_decided(64, 48, 512, 5000) == 32
    # Rows of a hundred vertices of 150,000 dimensions: one query at a time.
    assert buckets.num_decided(128, 100, 150_000, 100) == 1


def test_a_query_at_a_vertex_needs_no_float64_passes(monkeypatch):
    monkeypatch.setattr(programs, "finish_supports", None)
    corners = scipy.spatial.ConvexHull(cloud()).vertices[:QUERIES]
    vertices = cloud().astype(np.float32)
    answer = project_to_hull(vertices[corners], vertices)
    assert (answer.status == Status.CONVERGED).all()
    assert (answer.distance == 0).all()


def test_a_query_that_only_has_to_admit_its_band_is_not_given_up():
    corners = np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], np.float32)
    hull = prepare_hull(corners)
    query = jnp.asarray([[0.2, 0.1, 1.0]], jnp.float32)
    # Three corners hold the nearest point; the fourth scores as low as they do.
    start = jnp.asarray([[0, 1, 2]], jnp.int32), jnp.asarray([[0.15, 0.45, 0.4]], jnp.float32)
    lanes = programs.begin(hull, query, start, slots=4)
    with _numerics.float64():
        tolerances = Tolerances(jnp.float64(1e-6), jnp.float64(0), jnp.int32(9), jnp.bool_(False))
        idle = lanes._replace(idle=~lanes.idle, square=jnp.sum(lanes.shifted[:, 2:] ** 2, axis=1))
        after = fully_corrective._step(
            hull, idle, jnp.int32(0), tolerances=tolerances, phases=(oracle.FINE,), exact=False
        )
    assert int(lanes.active.used.sum()) == 3
    assert int(after.code[0]) == bracket.ACTIVE
    assert int(after.active.used.sum()) == 4


def test_the_first_pass_may_prove_that_a_query_is_outside():
    vertices = cloud()
    directions = np.random.default_rng(1).normal(size=(QUERIES, DIM))
    queries = 20 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    answer = project_to_hull(queries, vertices, verdict_only=True)
    assert (answer.num_steps == 1).all()
    for query, lower, upper in zip(
        queries, answer.distance_lower_bound, answer.distance, strict=True
    ):
        assert 0 < lower <= reference(query, vertices) <= upper < 1.5 * lower


@pytest.mark.parametrize(
    ("most", "width"), [(0, 4), (1, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16)]
)
def test_columns_in_use_hold_every_named_candidate(most, width):
    full = jax.random.normal(jax.random.key(0), (2, 16, 3))
    named = jnp.arange(16)[None] < jnp.array([[most], [most // 2]])
    made = fully_corrective._columns_in_use(lambda used: full[:, :used], named, axis=1)
    np.testing.assert_array_equal(made, full.at[:, width:].set(0))
