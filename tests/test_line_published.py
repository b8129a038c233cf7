"""Proofs along segments between CIFAR-10 test images, through two published networks."""

import os

import numpy as np
import pytest

from experiments import data, networks
from hullgeo import Proof, Status, find_crossing, trace_segment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.published,
    pytest.mark.skipif(not os.environ.get("HULLGEO_DATA"), reason="HULLGEO_DATA is unset"),
]


@pytest.fixture(scope="module")
def images():
    return data.cifar10("test", lossless_only=True).images[:400]


# Test images between which ResNet-2b enters a class for about a hundredth of the way.
SHORT_STAY = 109, 11


def linen(build, weights, **options):
    module, variables = build(data.published_weights(weights))
    return lambda x: module.apply(variables, x, **options)


@pytest.fixture(scope="module")
def resnet20():
    return linen(networks.resnet20_linen, "resnet20_cifar10", train=False)


@pytest.fixture(scope="module")
def resnet2b():
    return linen(networks.resnet2b_linen, "crown_resnet2b")


def contradictions(function, start, end, trace, count):
    """Samples of the caller's function whose class is not the one proved there."""
    where = np.linspace(0, 1, count, dtype=np.float32)
    labels = []
    for part in np.array_split(where, -(-count // 500)):
        share = part[:, None, None, None]
        labels.append(np.asarray(function((1 - share) * start + share * end)).argmax(1))
    num = int(trace.num_crossings[0])
    lower, upper = np.asarray(trace.lower[0, :num]), np.asarray(trace.upper[0, :num])
    # Float32 rounding of the function moves a crossing by about 1e-6.
    before, after = np.searchsorted(lower - 1e-5, where), np.searchsorted(upper + 1e-5, where)
    clear = before == after
    classes = np.asarray(trace.classes[0])[after]
    return int((np.concatenate(labels) != classes)[clear].sum())


def test_resnet2b_is_proved_rigorously_where_samples_miss_a_class(images, resnet2b):
    start, end = images[[SHORT_STAY[0]]], images[[SHORT_STAY[1]]]
    trace = trace_segment(resnet2b, start, end, proof=True)
    assert trace.status == Status.CONVERGED
    assert trace.proof == Proof.RIGOROUS
    assert trace.slack < 1e-6
    assert 1000 < trace.num_pieces < 6000
    assert contradictions(resnet2b, start[0], end[0], trace, 5000) == 0
    few = trace_segment(resnet2b, start, end, num_probes=20)
    assert (few.num_crossings, trace.num_crossings) == (2, 4)
    many = trace_segment(resnet2b, start, end, num_probes=5000)
    np.testing.assert_array_equal(many.classes, trace.classes)
    np.testing.assert_allclose(many.lower, trace.lower, atol=2e-5)


@pytest.mark.slow
def test_a_piece_of_a_resnet20_segment_is_proved(images, resnet20):
    start, end = images[[0]], images[[3]]
    crossing = find_crossing(resnet20, start, end)
    middle = np.float32(crossing.lower[0])
    share = middle + np.float32(0.005) * np.asarray([-1, 1], np.float32)
    start, end = ((1 - s) * start + s * end for s in share)
    trace = trace_segment(resnet20, start, end, proof=True)
    assert trace.status == Status.CONVERGED
    assert trace.proof == Proof.UP_TO_ROUNDING
    assert trace.num_pieces > 300
    assert trace.num_crossings >= 1
    assert contradictions(resnet20, start[0], end[0], trace, 1000) == 0
    pair = {int(crossing.class_lower[0]), int(crossing.class_upper[0])}
    assert pair <= set(np.asarray(trace.classes[0]).tolist())


def test_crossings_of_resnet20_cost_twelve_evaluations(images, resnet20):
    found = find_crossing(resnet20, images[:50], images[50:100])
    crossed = np.asarray(found.status) == Status.CONVERGED
    assert crossed.sum() > 30
    assert np.asarray(found.num_evaluations)[crossed].mean() <= 12
    assert np.asarray(found.upper - found.lower)[crossed].max() <= 1e-6
