import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from hullgeo import Status
from hullgeo.crossing import find_crossing

KERNELS = [
    np.random.default_rng(seed).normal(size=shape)
    for seed, shape in enumerate([(12, 32), (32, 32), (32, 5)])
]


def network(images, dtype=None):
    """A small ReLU network over images (*batch, 2, 2, 3)."""
    x = images.reshape(*images.shape[:-3], 12)
    for kernel in KERNELS[:-1]:
        x = jax.nn.relu(jnp.matmul(x, jnp.asarray(kernel, x.dtype), precision="highest"))
    return jnp.matmul(x, jnp.asarray(KERNELS[-1], x.dtype), precision="highest")


def images(seed, batch, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*batch, 2, 2, 3)), dtype)


def on_segment(start, end, position):
    position = position.astype(start.dtype)[..., None, None, None]
    return (1 - position) * start + position * end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bracket_holds_two_classes_of_the_callers_function(dtype):
    start, end = images(0, (4, 30), dtype), images(1, (4, 30), dtype)
    result = find_crossing(network, start, end)
    crossed = result.status == Status.CONVERGED
    assert crossed.shape == (4, 30)
    assert 60 < crossed.sum() < 120
    assert result.lower.dtype == dtype
    ends = jnp.argmax(network(start), -1), jnp.argmax(network(end), -1)
    np.testing.assert_array_equal(crossed, ends[0] != ends[1])
    np.testing.assert_array_equal(result.status[~crossed], Status.NO_CROSSING)
    np.testing.assert_array_equal(result.class_lower, ends[0])
    for position, label in [
        (result.lower, result.class_lower),
        (result.upper, result.class_upper),
    ]:
        logits = network(on_segment(start, end, position))
        deficit = jnp.max(logits, -1) - jnp.take_along_axis(logits, label[..., None], -1)[..., 0]
        assert deficit[crossed].max() <= (0 if dtype == np.float64 else 1e-4)
    assert (result.class_lower != result.class_upper)[crossed].all()
    assert (result.upper - result.lower)[crossed].max() <= 1e-6
    assert result.num_evaluations[crossed].mean() < 12
    assert result.num_evaluations.max() <= 25


def test_a_single_crossing_is_the_one_scipy_finds():
    def two_classes(x):
        return jnp.stack([jnp.exp(x[..., 0]), 2 + 0 * x[..., 0]], -1)

    start, end = jnp.asarray([3.0]), jnp.asarray([-1.0])
    result = find_crossing(two_classes, start, end, xtol=1e-12)
    root = optimize.brentq(lambda t: np.exp(3 - 4 * t) - 2, 0, 1, xtol=1e-15)
    assert result.lower <= root <= result.upper
    assert result.upper - result.lower <= 1e-12
    assert result.num_evaluations <= 12


def steps_of(margin):
    """A two-class function of a scalar image from a margin, to meet any shape of curve."""
    return lambda x: jnp.stack([margin(x[..., 0]), jnp.zeros_like(x[..., 0])], -1)


@pytest.mark.parametrize(
    "margin",
    [
        lambda t: jnp.sign(0.3 - t),
        lambda t: jnp.where(t < 0.7, 0.0, -1.0),
        lambda t: jnp.where(t < 0.2, 1.0, jnp.where(t < 0.9, 0.0, -1.0)),
        lambda t: (0.37 - t) ** 9,
        lambda t: 1e30 * (1e-3 - t),
        lambda t: jnp.exp(-60 * t) - 1e-20,
        lambda t: jnp.where(t < 0.61, 1e-20, -1e20),
        lambda t: jnp.cos(40 * t) + 0.3 - t,
    ],
    ids=["jump", "tie first", "plateau", "flat root", "huge", "decay", "scales", "waves"],
)
def test_hard_margins_keep_the_budget(margin):
    function = steps_of(margin)
    result = find_crossing(function, jnp.zeros(1), jnp.full(1, 0.97))
    assert result.status == Status.CONVERGED
    assert (result.class_lower, result.class_upper) == (0, 1)
    assert 0 <= result.lower < result.upper <= 1
    assert result.num_evaluations <= 25
    for position, label in [(result.lower, 0), (result.upper, 1)]:
        assert jnp.argmax(function(position * jnp.full(1, 0.97))) == label


def test_a_third_class_between_is_reported_as_found():
    def three(x):
        t = x[..., 0]
        return jnp.stack([0.4 - t, 0.3 - jnp.abs(t - 0.5), t - 0.6], -1)

    result = find_crossing(three, jnp.zeros(1), jnp.ones(1))
    pair = int(result.class_lower), int(result.class_upper)
    assert pair == (0, 1)
    np.testing.assert_allclose(result.lower, 0.3, atol=1e-6)


def test_status_of_each_row_alone():
    start = jnp.asarray([[0.0], [0.0], [np.nan], [0.0], [0.0]])
    end = jnp.asarray([[1.0], [0.0], [1.0], [np.inf], [-3.0]])
    function = steps_of(lambda t: 0.3 - t)
    result = find_crossing(function, start, end)
    expected = ["CONVERGED", "NO_CROSSING", "NONFINITE", "NONFINITE", "NO_CROSSING"]
    assert [Status(int(code)).name for code in result.status] == expected
    np.testing.assert_allclose(result.lower[0], 0.3, atol=1e-6)


def test_nan_met_on_the_way_leaves_a_true_bracket():
    function = steps_of(lambda t: jnp.where(jnp.abs(t - 0.5) < 0.1, jnp.nan, 0.45 - t))
    result = find_crossing(function, jnp.zeros(1), jnp.ones(1))
    assert result.status == Status.NONFINITE
    assert (result.class_lower, result.class_upper) == (0, 1)


def test_limits_are_admitted():
    function = steps_of(lambda t: 0.3 - t)
    start, end = jnp.zeros(1, jnp.float32), jnp.ones(1, jnp.float32)
    result = find_crossing(function, start, end, max_evaluations=3)
    assert result.status == Status.STEP_LIMIT
    assert result.lower < 0.3 < result.upper
    result = find_crossing(function, start, end, xtol=1e-12)
    assert result.status == Status.PRECISION_LIMIT
    assert result.upper == np.nextafter(result.lower, np.float32(1))
    result = find_crossing(function, start, end, xtol=0.0)
    assert result.status == Status.PRECISION_LIMIT


def test_repeated_calls_compile_once():
    traces = []

    def counted(kernel, x):
        traces.append(1)
        return jnp.matmul(x, kernel)

    kernel = jnp.asarray(KERNELS[0])
    start, end = jnp.ones((3, 12)), -jnp.ones((3, 12))
    for scale, xtol in [(1.0, 1e-6), (2.0, 1e-5)]:
        function = jax.tree_util.Partial(counted, scale * kernel)
        find_crossing(function, scale * start, end, xtol=xtol)
    assert len(traces) == 2  # once for the shape of the logits, once to compile


def test_jit_and_vmap_agree():
    start, end = images(2, (3, 8)), images(3, (3, 8))
    plain = find_crossing(network, start, end)
    jitted = jax.jit(lambda a, b, xtol: find_crossing(network, a, b, xtol=xtol))(start, end, 1e-6)
    mapped = jax.vmap(lambda a, b: find_crossing(network, a, b))(start, end)
    for other in (jitted, mapped):
        jax.tree.map(np.testing.assert_array_equal, plain.status, other.status)
        np.testing.assert_allclose(plain.lower, other.lower, atol=2e-6)


def test_bfloat16_images_get_float32_positions():
    start, end = images(0, (6,), jnp.bfloat16), images(1, (6,), jnp.bfloat16)
    assert find_crossing(network, start, end).lower.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": jnp.ones((2, 2, 3))}, "end.shape"),
        ({"end": jnp.ones((4, 2, 2, 3), np.float32)}, "end.dtype"),
        ({"start": np.ones((4, 2, 2, 3), int)}, "start.dtype"),
        ({"xtol": -1.0}, "xtol"),
        ({"max_evaluations": 1}, "max_evaluations"),
        ({"logits_fn": jnp.sum}, "logits_fn"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"logits_fn": network, "start": images(0, (4,)), "end": images(1, (4,))} | change
    function, start, end = (arguments.pop(key) for key in ("logits_fn", "start", "end"))
    with pytest.raises(ValueError, match=message):
        find_crossing(function, start, end, **arguments)
