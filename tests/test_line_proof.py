"""Proofs along segments against brute force, dense sampling and the caller's own function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hullgeo import Proof, Status, propagation, segment_path, trace_segment
from hullgeo.propagation import Line, Propagator

RNG = np.random.default_rng(3)
WEIGHTS = [
    (RNG.normal(size=(inputs, outputs)), RNG.normal(size=outputs))
    for inputs, outputs in [(3, 12), (12, 12), (12, 4)]
]
STARTS, ENDS = 4 * RNG.normal(size=(2, 5, 3))


def network(x):
    """A ReLU network with a residual connection, in the type of its input."""
    layers = [(jnp.asarray(w, x.dtype), jnp.asarray(b, x.dtype)[None]) for w, b in WEIGHTS]
    (w0, b0), (w1, b1), (w2, b2) = layers
    first = jax.nn.relu(jnp.matmul(x, w0, precision="highest") + b0)
    second = jax.nn.relu(jnp.matmul(first, w1, precision="highest") + b1 + first)
    return jnp.matmul(second, w2, precision="highest") + b2


def brute_force(start, end):
    """All knots of `network` and its values there, unit by unit and interval by interval."""
    (w0, b0), (w1, b1), (w2, b2) = WEIGHTS
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)

    def hidden(t):
        first = np.maximum(((1 - t) * start + t * end) @ w0 + b0, 0)
        return first, first @ w1 + b1 + first

    before, after = start @ w0 + b0, end @ w0 + b0
    knots = [0.0, 1.0, *(a / (a - b) for a, b in zip(before, after, strict=True) if a * b < 0)]
    knots = sorted(knots)
    for left, right in itertools.pairwise(knots):
        a, b = hidden(left)[1], hidden(right)[1]
        inside = a * b < 0
        knots = knots + list(left + (a / (a - b))[inside] * (right - left))
    knots = np.sort(knots)
    values = np.stack([np.maximum(hidden(t)[1], 0) @ w2 + b2 for t in knots])
    return knots, values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_knot_is_found(dtype):
    start, end = STARTS.astype(dtype), ENDS.astype(dtype)
    for first, last in zip(start, end, strict=True):
        path = segment_path(network, first, last)
        knots, values = brute_force(first, last)
        assert path.status == Status.CONVERGED
        assert path.position.dtype == dtype
        rtol = 1e-5 if dtype == np.float32 else 1e-11
        np.testing.assert_allclose(path.position, knots, atol=rtol)
        np.testing.assert_allclose(path.value, values, atol=20 * rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_crossings_are_all_there_and_true(dtype):
    start, end = STARTS.astype(dtype), ENDS.astype(dtype)
    trace = trace_segment(network, start, end, proof=True)
    np.testing.assert_array_equal(trace.status, Status.CONVERGED)
    np.testing.assert_array_equal(trace.proof, Proof.RIGOROUS)
    assert trace.lower.dtype == dtype
    assert trace.num_crossings.sum() >= 4
    where = np.linspace(0, 1, 20001)
    for row in range(len(start)):
        knots, values = brute_force(start[row], end[row])
        assert trace.num_pieces[row] == len(knots) - 1
        dense = np.stack([np.interp(where, knots, column) for column in values.T], 1).argmax(1)
        count = int(trace.num_crossings[row])
        lower, upper = np.asarray(trace.lower[row, :count]), np.asarray(trace.upper[row, :count])
        piece = np.searchsorted(upper, where)
        clear = np.searchsorted(lower, where) == piece
        np.testing.assert_array_equal(dense[clear], np.asarray(trace.classes[row])[piece[clear]])
        assert (upper - lower).max(initial=0) <= (2e-7 if dtype == np.float32 else 1e-9)
        np.testing.assert_array_equal(trace.lower[row, count:], trace.lower[row, count - 1])
        np.testing.assert_array_equal(trace.classes[row, count:], trace.classes[row, count])


def test_proof_and_samples_agree():
    proof = trace_segment(network, STARTS, ENDS, proof=True)
    samples = trace_segment(network, STARTS, ENDS, num_probes=1000)
    np.testing.assert_array_equal(samples.proof, Proof.SAMPLED)
    np.testing.assert_array_equal(samples.num_crossings, proof.num_crossings)
    np.testing.assert_array_equal(samples.classes, proof.classes)
    np.testing.assert_allclose(samples.lower, proof.lower, atol=2e-6)
    np.testing.assert_allclose(samples.slope, proof.slope, rtol=1e-6)
    seen = np.isfinite(samples.margin)
    assert (samples.margin >= proof.margin - 1e-9)[seen].all()


def spike(x):
    """Class 1 for |x - 0.512| < 0.0007 only."""
    distance = jnp.abs(x[..., :1] - 0.512)
    return jnp.concatenate([jnp.zeros_like(distance), 0.0007 - distance], -1)


def test_the_proof_finds_what_samples_miss():
    start, end = np.zeros((1, 1)), np.ones((1, 1))
    assert trace_segment(spike, start, end, num_probes=20).num_crossings == 0
    trace = trace_segment(spike, start, end, proof=True)
    np.testing.assert_array_equal(trace.classes, [[0, 1, 0]])
    np.testing.assert_allclose(trace.lower, [[0.5113, 0.5127]], atol=1e-9)
    np.testing.assert_allclose(trace.slope, [[1, 1]], rtol=1e-12)
    assert trace.num_pieces == 2
    assert trace.status == Status.CONVERGED


def test_a_near_miss_is_told_by_its_margin():
    near = lambda x: spike(x) - jnp.asarray([[0.0, 0.0008]])  # noqa: E731
    trace = trace_segment(near, np.zeros((1, 1)), np.ones((1, 1)), proof=True)
    assert trace.num_crossings == 0
    np.testing.assert_allclose(trace.margin, [[1e-4]], rtol=1e-9)


def amplified(x):
    """The network with constants that are computed, as in batch norm: no rigorous bound."""
    return network(x) * jnp.exp(jnp.ones((), x.dtype))


def test_float32_windows_are_decided_in_float64():
    start, end = STARTS.astype(np.float32), ENDS.astype(np.float32)
    trace = trace_segment(amplified, start, end, proof=True)
    wide = trace_segment(amplified, STARTS, ENDS, proof=True)
    for found in (trace, wide):
        np.testing.assert_array_equal(found.proof, Proof.UP_TO_ROUNDING)
        np.testing.assert_array_equal(found.status, Status.CONVERGED)
    np.testing.assert_array_equal(trace.classes, wide.classes)
    np.testing.assert_allclose(trace.lower, wide.lower, atol=1e-6)
    np.testing.assert_allclose(trace.slope, wide.slope, rtol=1e-4)
    assert (trace.upper - trace.lower).max() <= 2e-7


def test_the_slack_covers_the_error():
    """Float32 rows, whose error can be seen in float64, against the running bound."""
    from hullgeo import rounding_bound
    from hullgeo.line_proof import Prover

    prover = Prover(*reversed(_split(network)), (3,), np.float32)
    program = prover.program
    narrow = Propagator(program, np.float32)
    for first, last in zip(STARTS, ENDS, strict=True):
        line = Line(0.0, 1.0, *(x.astype(np.float32).astype(np.float64) for x in (first, last)))
        swept, reach = narrow.propagate(narrow.constants([]), [line], max_rows=1000)
        rows = swept[0]
        exact = prover.wide.constants([])
        bound = rounding_bound.error_function(program, np.float32)
        error = bound(exact, np.maximum(np.abs(line.first), np.abs(line.last)), reach)
        where = np.linspace(0, 1, 3000)
        share = where[:, None]
        true, _ = prover.wide.evaluate(exact, (1 - share) * line.first + share * line.last)
        read = np.stack([np.interp(where, rows.position, column) for column in rows.value.T], 1)
        actual = np.abs(read - true).max(0)
        assert (actual <= error).all()
        assert (error <= 3e4 * actual.max()).all()
        assert actual.max() > 0


def _split(function):
    from hullgeo.crossing import split_callable

    return split_callable(function)


def test_parts_and_devices_do_not_change_the_answer(monkeypatch):
    from hullgeo.line_proof import Prover

    prover = Prover(*reversed(_split(network)), (3,), np.float64)
    line = Line(0.0, 1.0, STARTS[1] * 3, ENDS[1] * 3)
    constants = prover.wide.constants([])
    whole, _ = prover.wide.propagate(constants, [line], max_rows=1000)
    monkeypatch.setattr(propagation, "_MAX_ROWS", 8)
    monkeypatch.setattr(propagation, "_TILE_BYTES", 1)
    small = Propagator(prover.program, np.float64)
    assert small.rows == 8 < len(whole[0].position)
    for devices in (None, jax.devices()):
        parts, _ = small.propagate(constants, [line, line], max_rows=1000, devices=devices)
        for part in parts:
            assert len(part.position) > len(whole[0].position)  # positions that parts share
            kept = np.append(np.diff(part.position) > 0, True)
            np.testing.assert_allclose(part.position[kept], whole[0].position, rtol=1e-14)
            np.testing.assert_allclose(part.value[kept], whole[0].value, rtol=1e-12)


def test_statuses_per_row():
    start = np.repeat(STARTS[:1], 4, 0)
    end = np.stack([ENDS[0], STARTS[0], np.full(3, np.nan), ENDS[0]])
    trace = trace_segment(network, start, end, proof=True)
    expected = [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    np.testing.assert_array_equal(trace.status, expected)
    assert trace.num_crossings[1] == 0
    np.testing.assert_array_equal(trace.classes[0], trace.classes[3])
    assert trace.proof[2] == Proof.SAMPLED
    assert np.isinf(trace.slack[2])
    given_up = trace_segment(network, start[:1], end[:1], proof=True, max_pieces=3)
    assert given_up.status == Status.STEP_LIMIT
    assert given_up.proof == Proof.SAMPLED
    assert segment_path(network, start[0], end[0], max_pieces=3).status == Status.STEP_LIMIT


def test_ties_are_admitted():
    twice = lambda x: jnp.concatenate([x, x], -1)  # noqa: E731
    trace = trace_segment(twice, np.zeros((1, 1)), np.ones((1, 1)), proof=True)
    assert trace.status == Status.PRECISION_LIMIT
    assert trace.num_crossings == 0


def test_a_constant_function_has_one_class():
    constant = lambda x: jnp.zeros((*x.shape[:-1], 2), x.dtype) + jnp.arange(2.0)[None]  # noqa: E731
    trace = trace_segment(constant, np.zeros((1, 1)), np.ones((1, 1)), proof=True)
    assert trace.status == Status.CONVERGED
    np.testing.assert_array_equal(trace.classes, [[1]])


def test_a_function_that_is_not_row_by_row_is_noticed():
    mixing = lambda x: x * (2.0 if x.shape[0] == 1 else 1.0)  # noqa: E731
    trace = trace_segment(mixing, np.ones((1, 2)), np.ones((1, 2)), proof=True)
    assert trace.status == Status.PRECISION_LIMIT
    assert trace.proof == Proof.SAMPLED


def test_parameters_are_arguments_and_one_program_serves_them():
    traces = []

    def scaled(scale, x):
        traces.append(1)
        return jnp.matmul(jax.nn.relu(x), scale)

    start, end = np.ones((1, 2)), -np.ones((1, 2))
    for factor in (1.0, 2.0):
        kernel = jnp.asarray([[1.0, 0.0], [0.0, factor]])
        trace = trace_segment(jax.tree_util.Partial(scaled, kernel), start, end, proof=True)
        assert bool(trace.classes[0, 0]) == (factor > 1)
    assert len(traces) == 3  # the shape of the logits, the caller's own, and the program


def test_without_the_global_flag():
    with jax.enable_x64(False):
        start, end = STARTS.astype(np.float32), ENDS.astype(np.float32)
        narrow = trace_segment(network, start, end, proof=True)
        wide = trace_segment(network, STARTS, ENDS, proof=True)
    assert narrow.lower.dtype == np.float32
    assert wide.lower.dtype == np.float64
    np.testing.assert_array_equal(narrow.status, Status.CONVERGED)
    np.testing.assert_array_equal(narrow.classes, wide.classes)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scales(scale):
    scaled = lambda x: network(x) * jnp.asarray(scale, x.dtype)  # noqa: E731
    start, end = STARTS.astype(np.float32), ENDS.astype(np.float32)
    trace = trace_segment(scaled, start, end, proof=True)
    plain = trace_segment(network, start, end, proof=True)
    np.testing.assert_array_equal(trace.status, Status.CONVERGED)
    np.testing.assert_array_equal(trace.classes, plain.classes)
