"""The digits experiment: it starts both ways, trains, and its hull term does what it says."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from experiments import data, digits

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Flax and optax mix types and ranks, and users rarely turn float64 on."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.mark.parametrize("command", [["-m", "experiments.digits"], ["experiments/digits.py"]])
def test_both_ways_to_start(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--hull-term" in done.stdout


def outside(model, images, labels, test_images, test_labels):
    """What the hull term measures, on images held out, by SciPy's nonnegative least squares."""
    features, queries = (
        np.asarray(model.features(jnp.asarray(x)), np.float64) for x in (images, test_images)
    )
    total = 0.0
    for query, label in zip(queries, test_labels, strict=True):
        hull = features[labels == label][: digits.BANK]
        rows = np.vstack([hull.T, 1e4 * np.ones(len(hull))])
        total += scipy.optimize.nnls(rows, np.append(query, 1e4))[1] ** 2 / 2
    return total / len(queries) / queries.var(axis=0).sum()


@pytest.mark.slow
def test_the_hull_term_draws_features_to_the_hull_of_their_class():
    images, labels = (array[:512] for array in data.load("digits", "train"))
    held_out = [array[:150] for array in data.load("digits", "test")]
    plain, drawn = (
        digits.train(images, labels, epochs=14, seed=0, hull_term=weight) for weight in (0.0, 1.0)
    )
    for model, least in ((plain, 0.7), (drawn, 0.25)):
        predicted = np.asarray(model(jnp.asarray(images))).argmax(axis=1)
        assert np.mean(predicted == labels) > least
    assert outside(drawn, images, labels, *held_out) < 0.75 * outside(
        plain, images, labels, *held_out
    )


def test_training_is_the_same_every_time():
    images, labels = data.load("digits", "train")
    one, other = (digits.train(images[:128], labels[:128], epochs=1, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.head.kernel[...], other.head.kernel[...])
