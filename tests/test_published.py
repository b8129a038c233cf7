"""Published CIFAR-10 networks: published accuracies to the digit, one network in Linen and NNX."""

import os

import numpy as np
import pytest

from experiments import data
from experiments import resnet20_cifar10 as experiment
from hullgeo import extract_features

pytestmark = [
    pytest.mark.slow,
    pytest.mark.published,
    pytest.mark.skipif(not os.environ.get("HULLGEO_DATA"), reason="HULLGEO_DATA is unset"),
]


@pytest.fixture(scope="module")
def test_set():
    return data.cifar10("test")


@pytest.mark.parametrize(
    ("network", "published"),
    [pytest.param("resnet20", 0.9173, marks=pytest.mark.slow), ("resnet2b", 0.6925)],
)
def test_published_accuracies(test_set, network, published):
    build, _ = experiment.NETWORKS[network]
    classifier = build(test_set.images)
    share = experiment.accuracy(classifier, *test_set, batch_size=500)
    assert round(share, 10) == published


def test_linen_and_nnx_features_agree_to_float32_rounding(test_set):
    images = test_set.images[:64]
    linen, nnx = (
        extract_features(build(images), images, batch_size=64)
        for build in (experiment.resnet20, experiment.resnet20_nnx)
    )
    assert linen.shape == (64, 64)
    assert linen.dtype == nnx.dtype == np.float32
    assert linen.min() >= 0
    np.testing.assert_allclose(nnx, linen, rtol=1e-5, atol=1e-5 * linen.max())


def test_the_images_are_the_original_ones():
    images, labels = data.cifar10("train")
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 5000))
    channels = images.reshape(-1, 3)
    mean = channels.mean(0, np.float64)
    second = np.asarray([np.vdot(column, column) for column in channels.T]) / len(channels)
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=1e-4)
    np.testing.assert_allclose(np.sqrt(second - mean**2), (0.2470, 0.2435, 0.2616), atol=1e-3)
    images, labels = data.fashion_mnist("train")
    assert images.shape == (60000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 6000))
