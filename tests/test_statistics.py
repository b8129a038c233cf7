"""Spectrum, dimension and diameter against SciPy, scikit-learn and known clouds."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA

from hullgeo import _statistics


def cloud(seed, size, dim, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * (rng.normal(size=(size, dim)) + offset)


@pytest.mark.parametrize("shape", [(50, 7), (5, 30), (1, 3)])
def test_spectrum_is_that_of_pca(shape):
    points = cloud(0, *shape, offset=3.0)
    mean, variance = _statistics.spectrum(points)
    np.testing.assert_allclose(mean, points.mean(axis=0))
    np.testing.assert_allclose(variance.sum(), points.var(axis=0).sum(), atol=1e-12)
    assert (np.diff(variance) <= 0).all()
    if shape[0] > 2:
        expected = PCA().fit(points).explained_variance_ratio_
        share = (variance / variance.sum())[: len(expected)]
        np.testing.assert_allclose(share, expected, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_two_nn_finds_the_dimension_of_a_flat_cloud(dim):
    rng = np.random.default_rng(dim)
    flat = rng.uniform(size=(3000, dim)) @ rng.normal(size=(dim, 20)) + 100.0
    found = _statistics.two_nn(flat, max_points=1500)
    assert found.num_points == 1500
    assert abs(found.estimate - dim) < 4 * found.standard_error + 0.05 * dim
    assert found.standard_error == pytest.approx(dim / np.sqrt(1500), rel=0.15)


def test_two_nn_ignores_duplicates_and_admits_too_few():
    points = cloud(0, 200, 3)
    once, twice = _statistics.two_nn(points), _statistics.two_nn(np.repeat(points, 2, axis=0))
    assert once == twice
    assert np.isnan(_statistics.two_nn(np.ones((9, 3))).estimate)


@hypothesis.given(
    st.integers(0, 1000), st.integers(1, 60), st.integers(1, 12),
    st.sampled_from([0.0, 1e4]), st.sampled_from([1e-6, 1.0, 1e6]),
)  # fmt: skip
def test_diameter_encloses_scipys(seed, size, dim, offset, scale):
    points = cloud(seed, size, dim, offset, scale)
    expected = pdist(points).max(initial=0.0)
    lower, upper = _statistics.diameter(points)
    assert lower <= expected * (1 + 1e-15)
    assert upper >= expected * (1 - 1e-15)
    assert upper - lower <= 1e-10 * upper
    coarse = _statistics.diameter(points, max_pairs=0)
    assert coarse[0] <= expected * (1 + 1e-15)
    assert coarse[1] >= expected * (1 - 1e-15)


def test_diameter_where_sweeps_from_one_end_fail():
    angle = np.linspace(0, 2 * np.pi, 101)[:-1]
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    triangle = 0.999 * np.sqrt(3) * ring[[0, 33, 67]] / np.linalg.norm(ring[0] - ring[33])
    points = np.concatenate([ring, 1.15 * triangle])
    lower, upper = _statistics.diameter(points)
    assert lower <= pdist(points).max() <= upper


def test_nearest():
    rows, others = cloud(0, 20, 6, 50.0), cloud(1, 90, 6, 50.0)
    index, distance = _statistics.nearest(rows, others)
    expected = cdist(rows, others)
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), rtol=1e-12)
