"""Crossings found by samples, against the functions they are found in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import Proof, Status, trace_segment


def waves(x):
    """Classes along t = x[0]: 0, 1, 0, 1, ... at the zeros of cos(5 pi t)."""
    wave = jnp.cos(5 * jnp.pi * x[..., :1])
    return jnp.concatenate([wave, jnp.zeros_like(wave)], -1)


START, END = np.zeros((1, 1)), np.ones((1, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_crossings_are_refined_together(dtype):
    trace = trace_segment(waves, START.astype(dtype), END.astype(dtype), num_probes=30)
    assert trace.status == Status.CONVERGED
    assert trace.proof == Proof.SAMPLED
    assert trace.lower.dtype == dtype
    np.testing.assert_array_equal(trace.classes, [[0, 1, 0, 1, 0, 1]])
    exact = np.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_allclose(trace.lower[0], exact, atol=2e-6)
    assert (trace.upper - trace.lower).max() <= 1e-6
    if dtype == np.float64:
        assert ((trace.lower[0] <= exact) & (exact <= trace.upper[0])).all()
    np.testing.assert_allclose(trace.slope, 5 * np.pi * np.ones((1, 5)), rtol=1e-3)
    assert 30 < trace.num_evaluations < 30 + 5 * 14
    assert trace.num_pieces == 0
    assert np.isinf(trace.slack)


def test_a_third_class_between_two_samples_is_followed():
    def three(x):
        t = x[..., :1]
        return jnp.concatenate([0.5 - t, 0.01 - 0 * t, t - 0.5], -1)

    trace = trace_segment(three, START, END, num_probes=2)
    np.testing.assert_array_equal(trace.classes, [[0, 1, 2]])
    np.testing.assert_allclose(trace.lower, [[0.49, 0.51]], atol=2e-6)


def test_a_change_that_another_batch_undoes_is_not_found_twice():
    """The first tie moves by 5e-5 with the company a segment is evaluated in, as rounding may."""

    def restless(x):
        t, own = x[..., :1], x[..., 1:]
        shift = 1e-4 * (own.mean(0, keepdims=True) - own)
        return jnp.concatenate([0.5 - t + shift, 0 * t, t - 0.51], -1)

    start, end = np.asarray([[0.0, 1.0], [0.0, 0.0]]), np.asarray([[1.0, 1.0], [0.505, 0.0]])
    trace = trace_segment(restless, start, end, num_probes=2)
    np.testing.assert_array_equal(trace.classes, [[0, 1, 2], [0, 1, 1]])


def test_few_samples_miss_what_they_do_not_meet():
    assert trace_segment(waves, START, END, num_probes=2).num_crossings == 1
    assert trace_segment(waves, START, END / 5, num_probes=2).num_crossings == 1
    assert trace_segment(waves, START, 2 * END / 5, num_probes=2).num_crossings == 0


def test_the_margin_is_that_of_the_lowest_sample_inside_a_class():
    dip = lambda x: jnp.concatenate([0.1 + jnp.abs(x[..., :1] - 0.5), 0 * x[..., :1]], -1)  # noqa: E731
    trace = trace_segment(dip, START, END, num_probes=11)
    np.testing.assert_allclose(trace.margin, [[0.1]], rtol=1e-6)
    wave = trace_segment(waves, START, END, num_probes=1001)
    np.testing.assert_array_equal(wave.margin, np.full((1, 6), np.inf))


def test_batches_are_padded_with_what_repeats():
    start, end = np.zeros((2, 2, 1)), np.asarray([[[0.05], [0.2]], [[0.4], [1.0]]])
    trace = trace_segment(waves, start, end)
    np.testing.assert_array_equal(trace.num_crossings, [[0, 1], [2, 5]])
    assert trace.classes.shape == (2, 2, 6)
    np.testing.assert_array_equal(trace.lower[0, 0], np.ones(5))
    np.testing.assert_array_equal(trace.classes[0, 1], [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(trace.lower[1, 0, 1:], np.repeat(trace.lower[1, 0, 1], 4))


def test_nan_stays_in_its_segment():
    start = np.asarray([[0.0], [0.0], [0.0]])
    end = np.asarray([[1.0], [np.nan], [1.0]])
    trace = trace_segment(waves, start, end)
    np.testing.assert_array_equal(trace.status, [0, Status.NONFINITE, 0])
    np.testing.assert_array_equal(trace.num_crossings, [5, 0, 5])


def test_what_cannot_be_bracketed_is_told():
    trace = trace_segment(waves, START.astype("f4"), END.astype("f4"), xtol=1e-12)
    assert trace.status == Status.PRECISION_LIMIT
    assert trace.num_crossings == 5


def test_repeated_calls_compile_once():
    traces = []

    def counted(kernel, x):
        traces.append(1)
        return jnp.matmul(jax.nn.relu(x), kernel)

    for factor in (1.0, 2.0):
        function = jax.tree_util.Partial(counted, factor * jnp.eye(2))
        trace_segment(function, np.eye(2)[:1], np.eye(2)[1:])
    # The shape of the logits, the samples, the refinement and the slopes.
    assert len(traces) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_probes": 1}, "num_probes"),
        ({"xtol": -1.0}, "xtol"),
        ({"max_pieces": 0}, "max_pieces"),
        ({"end": np.ones((2, 1))}, "end.shape"),
        ({"start": np.zeros((1, 1), int), "end": np.ones((1, 1), int)}, "start.dtype"),
        (
            {"start": START.astype(jnp.bfloat16), "end": END.astype(jnp.bfloat16), "proof": True},
            "float32 or float64",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"start": START, "end": END} | change
    start, end = arguments.pop("start"), arguments.pop("end")
    with pytest.raises(ValueError, match=message):
        trace_segment(waves, start, end, **arguments)


def test_traced_arrays_are_refused():
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda start, end: trace_segment(waves, start, end))(START, END)
