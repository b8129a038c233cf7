"""Float64 enclosures against exact rational arithmetic."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import _numerics, active_set, enclosure

RNG = np.random.default_rng(1)


def exactly(array):
    return [Fraction(float(value)) for value in np.asarray(array).ravel()]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("spread", [0, 30])
def test_scores_are_enclosed(exact, spread):
    rows = RNG.standard_normal((1, 5, 9)) * 10.0 ** -RNG.integers(0, spread + 1, (1, 5, 9))
    # Nearly orthogonal, as next to the hull: most of the products cancels.
    direction = np.linalg.svd(rows[0])[2][-1:][:, :]
    norms = enclosure.length(jnp.asarray(rows))
    value, error = enclosure.scores(jnp.asarray(rows), jnp.asarray(direction), norms, exact=exact)
    for index in range(5):
        truth = sum(
            a * b for a, b in zip(exactly(rows[0, index]), exactly(direction[0]), strict=True)
        )
        assert abs(exactly(value)[index] - truth) <= exactly(error)[index]
    if exact:
        assert float(error.max()) < 2.0**-50


def test_scores_divided_by_the_norm_of_the_direction_are_enclosed():
    rows = RNG.standard_normal((1, 40, 9))
    direction = 1e-5 * RNG.standard_normal((1, 9))
    norms = enclosure.length(jnp.asarray(rows))
    size = enclosure.length(jnp.asarray(direction))[:, None]
    unit = jnp.asarray(direction) / size
    value, _ = enclosure.scores(jnp.asarray(rows), jnp.asarray(direction), norms, exact=False)
    error = exactly(enclosure.score_error(9, norms))
    for row, found, bound in zip(rows[0], exactly(value / size), error, strict=True):
        truth = sum(a * b for a, b in zip(exactly(row), exactly(unit), strict=True))
        assert abs(found - truth) <= bound


def test_refinement_ends_when_the_scores_agree():
    rows = jnp.asarray(RNG.standard_normal((3, 4, 9)) + 3)
    used = jnp.ones((3, 4), bool)
    constant = jnp.ones((3,), jnp.float32)
    with _numerics.float64():
        index = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (3, 4))
        active = active_set.from_rows(index, used, rows.astype(jnp.float32), constant)
        active, _ = active_set.solve(
            active, jnp.ones((3, 4), jnp.float32), used[:, 0], constant, 0 * constant, 50
        )
        weights = active_set.weights(active).astype(jnp.float64)
        direction = active_set.combine(weights, rows)

        def spread(done):
            found = enclosure.refine(active, rows, weights, direction, done)
            refined, toward, scores = map(np.asarray, found)
            np.testing.assert_allclose(np.einsum("bm,bmd->bd", refined, rows), toward, rtol=1e-12)
            np.testing.assert_allclose(np.einsum("bmd,bd->bm", rows, toward), scores, rtol=1e-13)
            basis = np.where(active.basic, scores, np.nan)
            return np.max((np.nanmax(basis, axis=1) - np.nanmin(basis, axis=1)) / scores.min())

        once, twice = (
            spread(lambda scores: jnp.bool_(True)),
            spread(lambda scores: jnp.bool_(False)),
        )
        assert 1e-14 < once < 1e-9
        assert twice < 1e-15
        assert spread(None) == twice


@pytest.mark.parametrize("exact", [False, True])
def test_points_are_enclosed(exact):
    rows = RNG.standard_normal((1, 6, 4))
    weights = RNG.random((1, 6))
    rows[0, 5] = -(weights[0, :5] @ rows[0, :5]) / weights[0, 5]  # the point is nearly 0
    norms = enclosure.length(jnp.asarray(rows))
    value, error = enclosure.point(jnp.asarray(weights), jnp.asarray(rows), norms, exact=exact)
    normal = exactly(weights / weights.sum())
    total = sum(normal)
    square = Fraction(0)
    for coordinate in range(4):
        entries = exactly(rows[0, :, coordinate])
        truth = sum(w * u for w, u in zip(normal, entries, strict=True)) / total
        square += (truth - exactly(value)[coordinate]) ** 2
    # The weights are normalised once more inside, in which the claim leaves an ulp.
    assert float(square) ** 0.5 <= float(error[0]) + 2.0**-52
    assert float(error[0]) < 2.0**-46


def ball(rows, weights):
    weights = jnp.asarray(weights)
    point = weights @ jnp.asarray(rows)
    return float(
        enclosure.interior_radius(
            jnp.asarray(rows),
            weights,
            jnp.zeros(rows.shape[1], bool),
            jnp.linalg.norm(point),
            jnp.asarray(1e-15),
        )
    )


def test_the_ball_of_a_triangle_is_its_incircle():
    angles = 2 * np.pi * np.arange(3) / 3
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert ball(rows, np.full(3, 1 / 3)) == pytest.approx(0.5, abs=1e-12)


def test_no_ball_without_proof():
    angles = 2 * np.pi * np.arange(3) / 3
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert ball(rows, np.array([0.5, 0.5, 0.0])) == 0  # an edge has no interior
    assert ball(rows + 2.0, np.full(3, 1 / 3)) == 0  # the query is outside
    flat = np.array([[-1.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    assert ball(flat, np.array([0.5, 0.25, 0.25])) == 0  # no interior at all
