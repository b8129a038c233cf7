"""What is read from a user's function: which operations are exact, which are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import hullgeo
from hullgeo import Proof, Status, segment_path, trace_segment

RNG = np.random.default_rng(0)
START, END = (2 * RNG.normal(size=(6, 4, 2)).astype(np.float32) for _ in range(2))


class Convolutions(nn.Module):
    """Strided, grouped, dilated and transposed convolutions, batch norm, a residual sum."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 1))(x))
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = nn.relu(y + x[..., ::-1])
        x = nn.leaky_relu(nn.Conv(4, (2, 2), kernel_dilation=2, padding="SAME")(x))
        x = nn.relu(nn.ConvTranspose(2, (2, 2), strides=(2, 2))(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Pools(nn.Module):
    """Max pooling with padding, mean pooling, concatenation, clipping, padding."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.Conv(4, (2, 2))(x[:, 1:]), (2, 2), (2, 2), "SAME")
        x = jnp.concatenate([jnp.clip(x, -0.5, 0.75), x], -1)
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))
        return nn.Dense(3)(nn.avg_pool(x, (2, 2)).reshape(x.shape[0], -1))


class Selections(nn.Module):
    """Absolute values, leaky and thresholded units, minima, splits, transposes, slopes learnt."""

    @nn.compact
    def __call__(self, x):
        a, b = jnp.split(nn.Dense(8)(x), 2, -1)
        x = jnp.abs(a) - nn.PReLU()(b)
        x = jnp.where(x > 0.25, x, 0.25).transpose(0, 3, 1, 2)
        x = jnp.minimum(x, x[:, ::-1]).squeeze()[None]
        x = jax.nn.hard_tanh(x.sum(2) * np.float32(0.3)) + jnp.min(x, 2)
        return nn.Dense(3)(x.reshape(1, -1))


def initialised(module):
    variables = module.init(jax.random.key(1), START[None])
    keys = iter(jax.random.split(jax.random.key(2), 100))
    shift = lambda x: x + 0.2 * jax.random.uniform(next(keys), x.shape, x.dtype)  # noqa: E731
    variables = jax.tree.map(shift, variables)
    return lambda x: module.apply(variables, x)


# Flax's own pooling mixes types.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(
    "module", [pytest.param(Convolutions, marks=pytest.mark.slow), Pools, Selections]
)
def test_paths_are_those_of_the_callers_function(module):
    function = initialised(module())
    start, end = START.astype(np.float64), END.astype(np.float64)
    path = segment_path(function, start, end)
    assert path.status == Status.CONVERGED
    assert path.proof == (Proof.RIGOROUS if module is Pools else Proof.UP_TO_ROUNDING)
    assert 30 < len(path.position) < 1000
    assert (path.position[0], path.position[-1]) == (0, 1)
    share = np.linspace(0, 1, 1000)
    images = (1 - share)[:, None, None, None] * start + share[:, None, None, None] * end
    dense = jax.lax.map(lambda image: function(image[None])[0], images)
    read = [np.interp(share, path.position, column) for column in np.asarray(path.value).T]
    np.testing.assert_allclose(np.stack(read, 1), dense, atol=1e-12 * np.abs(dense).max())


def flat(x):
    return x.reshape(x.shape[0], -1)[:, :3]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: jnp.tanh(flat(x)), "'tanh'"),
        (lambda x: jax.nn.softmax(flat(x)), "'exp'"),
        (lambda x: flat(x) * flat(x[:, ::-1]), "'mul of two values that depend on the image'"),
        (lambda x: 1 / flat(x), "'div whose argument 1 depends on the image'"),
        (lambda x: jnp.sort(flat(x)), "'sort'"),
        (lambda x: jnp.round(flat(x)), "'round'"),
        (lambda x: flat(x).astype(jnp.bfloat16), "'convert_element_type to bfloat16'"),
        (lambda x: flat(x) * (flat(x) > 0), "'convert_element_type of a comparison'"),
        (lambda x: jax.nn.gelu(flat(x)), "'erf|tanh|integer_pow|erfc'"),
        (lambda x: flat(x) @ flat(x).T @ flat(x), "'dot_general of two values"),
        (lambda x: jax.lax.cond(x.sum() > 0, flat, lambda y: -flat(y), x), "comparison|'cond'"),
        (lambda x: jnp.where(flat(x) > 0, flat(x) + 1, flat(x)), "select_n between values"),
        (lambda x: x.mean(0).reshape(1, -1)[:, :3] * x.max(), "'mul of two"),
    ],
)
def test_operations_beyond_are_refused_by_name(function, named):
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=named):
        trace_segment(function, START[None], END[None], proof=True)


def test_what_the_logits_do_not_depend_on_is_not_looked_at():
    def function(x):
        aside = jnp.sin(x).sum()
        del aside
        return jax.nn.relu(flat(x)) * jnp.exp(jnp.float32(0.5))

    trace = trace_segment(function, START[None], END[None], proof=True)
    assert trace.status == Status.CONVERGED


def test_a_jump_on_a_row_that_is_exactly_zero_is_refused():
    # d = x is exactly 0 at the start, where no sign change is met.
    function = lambda x: jnp.where(x > 0, x + 1, x)  # noqa: E731
    start, end = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="select_n between values"):
        trace_segment(function, start, end, proof=True)


class Trained(nnx.Module):
    """Batch norm, dropout with its random state, max pooling."""

    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(24, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.head(self.drop(x.reshape(x.shape[0], -1)))


@jax.numpy_dtype_promotion("standard")
@pytest.mark.slow
def test_nnx_models_and_their_features_are_read():
    model = Trained(nnx.Rngs(0))
    start, end = START.astype(np.float64), END.astype(np.float64)
    classifier = hullgeo.from_nnx(model, np.stack([START, END]))
    path = segment_path(classifier.features, start, end)
    model.eval()
    trace = trace_segment(model, start[None], end[None], proof=True)
    assert trace.status == path.status == Status.CONVERGED
    # Along the path the head is affine: its classes change where those of the model do.
    logits = np.asarray(classifier.head(path.value))
    ends = [0, *np.asarray(trace.upper[0]), 1]
    for begin, stop, label in zip(ends, ends[1:], np.asarray(trace.classes[0]), strict=False):
        inside = (begin < path.position) & (path.position < stop - 1e-9)
        assert (logits.argmax(axis=1)[inside] == label).all()


def test_nested_calls_are_read():
    @jax.custom_vjp
    def inner(x):
        return jnp.maximum(x, 0)

    inner.defvjp(lambda x: (inner(x), x), lambda x, g: (g,))
    function = jax.jit(jax.checkpoint(lambda x: inner(flat(x))))
    path = segment_path(function, START, END)
    assert len(path.position) <= 5
    np.testing.assert_allclose(path.value[0], np.maximum(START.reshape(-1)[:3], 0), rtol=1e-6)
