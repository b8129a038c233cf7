"""Classic Frank-Wolfe variants: known iteration counts, other people's optima, other oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.projections
import pytest
import scipy.optimize
from sklearn.datasets import load_digits
from sklearn.linear_model import Lasso

from hullgeo import frank_wolfe, project_to_hull
from hullgeo.frank_wolfe import VARIANTS, Atom, Problem, hull_oracle, init, minimize, step

LINEAR = [variant for variant in VARIANTS if variant != "vanilla"]


def simplex_oracle(direction):
    best = jax.lax.argmin(direction, 0, jnp.int32)
    return Atom(best, jax.nn.one_hot(best, direction.size, dtype=direction.dtype))


def l1_ball_oracle(direction):
    best = jax.lax.argmax(jnp.abs(direction), 0, jnp.int32)
    sign = -jnp.sign(direction[best])
    point = sign * jax.nn.one_hot(best, direction.size, dtype=direction.dtype)
    return Atom(jnp.where(sign < 0, best, best + direction.size), point)


def nearest_in_hull(query, vertices):
    return Problem(lambda point: point - query, hull_oracle(vertices))


def polytope(seed=0, num_vertices=12, dim=4, dtype=np.float64):
    rng = np.random.default_rng(seed)
    vertices = rng.normal(size=(num_vertices, dim)).astype(dtype)
    return jnp.asarray(rng.normal(size=dim).astype(dtype) * 2), jnp.asarray(vertices)


def solve(problem, start, variant, tolerance, capacity=64, max_steps=20_000):
    run = jax.jit(
        lambda: minimize(
            problem,
            init(problem, start, capacity=capacity),
            variant=variant,
            unfinished=lambda state: state.gap > tolerance,
            max_steps=max_steps,
        )
    )
    return run()


def digits_problem():
    """Pixels of scikit-learn's digits, centred and scaled to largest norm 1."""
    pixels = load_digits(return_X_y=True)[0]
    vertices, queries = pixels[:1500], pixels[1500:1524]
    center = vertices.mean(0)
    radius = np.linalg.norm(vertices - center, axis=1).max()
    return (queries - center) / radius, (vertices - center) / radius


@pytest.mark.parametrize(
    ("variant", "expected"), [("away", 344), ("pairwise", 189), ("blended_pairwise", 192)]
)
@pytest.mark.slow
def test_steps_to_a_relative_gap_of_1e_6_on_the_digits(variant, expected):
    queries, vertices = digits_problem()
    steps = np.asarray(project_to_hull(queries, vertices, variant=variant).num_steps)
    assert expected / 1.2 < steps.mean() < 1.2 * expected


@pytest.mark.slow
def test_vanilla_needs_more_than_3000_steps_on_the_digits():
    queries, vertices = digits_problem()
    answer = project_to_hull(queries, vertices, variant="vanilla", max_steps=3000)
    assert np.mean(answer.num_steps == 3000) > 0.9
    assert np.mean(answer.status == 1) > 0.9


@pytest.mark.parametrize("variant", VARIANTS)
def test_projection_onto_the_simplex_is_optax(variant):
    query = jnp.asarray([0.9, -0.3, 0.55, 0.1, 0.4])
    problem = Problem(lambda point: point - query, simplex_oracle)
    start = Atom(jnp.int32(1), jax.nn.one_hot(1, 5, dtype=query.dtype))
    tolerance = 1e-4 if variant == "vanilla" else 1e-14
    state = solve(problem, start, variant, tolerance)
    assert state.gap <= tolerance
    with jax.numpy_dtype_promotion("standard"):
        expected = optax.projections.projection_simplex(query)
    np.testing.assert_allclose(state.point, expected, atol=2 * tolerance**0.5)


@pytest.mark.parametrize("variant", LINEAR)
def test_least_squares_over_the_l1_ball_is_the_lasso(variant):
    rng = np.random.default_rng(3)
    matrix, target = rng.normal(size=(40, 10)), rng.normal(size=40)
    penalty = 0.1
    lasso = Lasso(alpha=penalty, fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = lasso.fit(matrix, target).coef_
    radius = np.abs(expected).sum()

    def gradient(point):
        return radius * matrix.T @ (radius * (matrix @ point) - target)

    start = Atom(jnp.int32(0), jax.nn.one_hot(0, 10, dtype=jnp.float64) * -1)
    state = solve(Problem(gradient, l1_ball_oracle), start, variant, 1e-13)
    assert state.gap <= 1e-13
    np.testing.assert_allclose(radius * state.point, expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["away"])
def test_short_step_minimises_a_function_that_is_not_quadratic(variant):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(30, 6))

    def loss(point):
        return jnp.sum(jax.nn.softplus(rows @ point))

    smoothness = float(0.25 * np.linalg.norm(rows, 2) ** 2)
    problem = Problem(jax.grad(loss), simplex_oracle, smoothness)
    start = Atom(jnp.int32(0), jax.nn.one_hot(0, 6, dtype=jnp.float64))
    state = solve(problem, start, variant, 1e-10)
    assert state.gap <= 1e-10
    reference = scipy.optimize.minimize(
        loss,
        np.full(6, 1 / 6),
        jac=jax.grad(loss),
        bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda point: point.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert reference.success
    assert loss(state.point) <= reference.fun + 1e-9


@pytest.mark.parametrize("variant", ["vanilla", "blended_pairwise"])
def test_a_recorded_trajectory_never_increases_and_the_gap_bounds_the_error(variant):
    query, vertices = polytope()
    problem = nearest_in_hull(query, vertices)
    start = init(problem, Atom(jnp.int32(0), vertices[0]), capacity=16)

    def record(state, _):
        seen = (jnp.vdot(state.gradient, state.gradient) / 2, state.gap)
        return step(problem, state, variant), seen

    _, (values, gaps) = jax.jit(lambda: jax.lax.scan(record, start, length=300))()
    assert np.all(np.diff(values) <= 1e-14)
    assert np.all(gaps >= values - values.min() - 1e-14)
    assert values[0] > 1.01 * values[-1]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("away", np.float64), ("pairwise", np.float32), ("blended_pairwise", np.float64)],
)
def test_the_active_set_explains_the_point(variant, dtype):
    query, vertices = polytope(dtype=dtype)
    problem = nearest_in_hull(query, vertices)
    state = solve(problem, Atom(jnp.int32(0), vertices[0]), variant, 1e-4)
    assert state.point.dtype == state.weights.dtype == dtype
    eps = np.finfo(dtype).eps
    assert np.all(state.weights >= 0)
    assert abs(state.weights.sum() - 1) <= 8 * eps
    active = np.asarray(state.weights) > 0
    assert len(set(np.asarray(state.keys)[active])) == active.sum()
    np.testing.assert_array_equal(state.atoms[active], vertices[state.keys[active]])
    np.testing.assert_allclose(state.point, state.weights @ state.atoms, rtol=0, atol=50 * eps)


def test_lanes_of_a_batch_stop_on_their_own():
    _, vertices = polytope()
    queries = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4))) * jnp.asarray(
        [[0.5], [1.0], [2.0], [4.0], [8.0]]
    )

    def lane(query):
        problem = nearest_in_hull(query, vertices)
        state = init(problem, Atom(jnp.int32(0), vertices[0]), capacity=16)
        return minimize(
            problem, state, variant="away", unfinished=lambda s: s.gap > 1e-9, max_steps=500
        )

    together = jax.jit(jax.vmap(lane))(queries)
    single = jax.jit(lane)
    for row, query in enumerate(queries):
        alone = single(query)
        np.testing.assert_allclose(together.point[row], alone.point, atol=1e-8)
        assert together.gap[row] <= 1e-9


def test_a_step_without_jit_is_the_same():
    query, vertices = polytope()
    problem = nearest_in_hull(query, vertices)
    state = jax.jit(lambda: init(problem, Atom(jnp.int32(0), vertices[0]), capacity=8))()
    jitted = jax.jit(lambda state: step(problem, state, "vanilla"))(state)
    eager = step(problem, state, "vanilla")
    np.testing.assert_allclose(jitted.point, eager.point, atol=1e-14)
    assert jitted.num_steps == eager.num_steps == 1


def test_a_vertex_without_a_slot_freezes_the_state():
    query, vertices = polytope(num_vertices=30, dim=8)
    problem = nearest_in_hull(query / 4, vertices)
    state = solve(problem, Atom(jnp.int32(0), vertices[0]), "pairwise", 1e-12, capacity=2)
    assert state.full
    assert not np.isnan(state.point).any()
    again = step(problem, state, "pairwise")
    np.testing.assert_array_equal(again.point, state.point)
    assert again.num_steps == state.num_steps


def test_nan_stops_at_once():
    query, vertices = polytope()
    problem = nearest_in_hull(query * jnp.nan, vertices)
    state = solve(problem, Atom(jnp.int32(0), vertices[0]), "away", 1e-9)
    assert state.num_steps == 0


def test_bad_options_are_named():
    query, vertices = polytope()
    problem = nearest_in_hull(query, vertices)
    start = Atom(jnp.int32(0), vertices[0])
    with pytest.raises(ValueError, match="capacity to be an integer >= 2, got capacity=1"):
        init(problem, start, capacity=1)
    with pytest.raises(ValueError, match=r"variant to be one of 'vanilla', .* got variant='lazy'"):
        step(problem, init(problem, start, capacity=2), "lazy")


def test_oracles_of_the_docstring_are_those_tested():
    for function in (simplex_oracle, l1_ball_oracle):
        assert f"def {function.__name__}(direction):" in (frank_wolfe.__doc__ or "")
