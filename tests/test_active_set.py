"""The problem on few vertices, against float64 linear algebra."""

import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import active_set


def solved(seed):
    """Three queries in float32 with six vertices each, the last of them without any."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, 6, 9)).astype(np.float32) + 1
    used = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    constant = jnp.ones(3, jnp.float32)
    index = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (3, 6))
    active = active_set.from_rows(index, used, jnp.asarray(rows), constant)
    start = used.astype(jnp.float32)
    live = jnp.any(used, axis=1)
    active, _ = active_set.solve(active, start, live, constant, 1e-6 * constant, 20)
    return active, constant


def exact_weights(rows, basis):
    """Of the point nearest to the origin in the affine hull of the rows of the basis."""
    chosen = rows[basis].astype(np.float64)
    weights = np.linalg.solve(chosen @ chosen.T + 1, np.ones(len(chosen)))
    return weights / weights.sum()


@pytest.mark.parametrize("seed", range(5))
def test_corrected_weights_lose_the_rounding_of_former_ones(seed):
    active, constant = solved(seed)
    noise = 1e-3 * jnp.arange(6, dtype=jnp.float32)[None]
    rough = active._replace(value=active.value * (1 + noise))
    corrected = active._replace(value=active_set.corrected(rough, constant))
    assert not np.any(corrected.value[2])
    for lane in range(2):
        basis = np.asarray(active.basic[lane])
        expected = exact_weights(np.asarray(active.rows[lane]), basis)
        before, after = (
            np.abs(np.asarray(active_set.weights(slots)[lane])[basis] - expected).max()
            for slots in (rough, corrected)
        )
        assert after < 1e-6
        assert basis.sum() == 1 or before > 1e-5


def test_a_correction_that_would_leave_the_simplex_is_left_out():
    active, constant = solved(0)
    basis = np.asarray(active.basic[0])
    assert basis.sum() > 1
    # Moved far towards one vertex, whose weight alone would then be positive.
    first = active.rows[:, np.flatnonzero(basis)[0]]
    moved = active._replace(rows=active.rows - 3 * first[:, None])
    np.testing.assert_array_equal(active_set.corrected(moved, constant)[0], active.value[0])
