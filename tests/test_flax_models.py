"""Classifiers from Flax models: the reference is Flax's own evaluation of the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from hullgeo import extract_features, from_linen, from_nnx

IMAGES = np.random.default_rng(0).random((9, 6, 6, 1)).astype(np.float32)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Compact(nn.Module):
    """Batch norm, dropout and a nested block; training by default."""

    dtype: object = None

    @nn.compact
    def __call__(self, x, train=True):
        x = Block(4, self.dtype, name="block")(x, train)
        x = nn.relu(nn.Dense(7, dtype=self.dtype)(x.mean((1, 2))))
        x = nn.Dropout(0.5, deterministic=not train, name="before")(x)
        return nn.Dense(3, dtype=self.dtype, name="logits")(x)


class Block(nn.Module):
    channels: int
    dtype: object = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(x)
        return nn.relu(nn.BatchNorm(not train, dtype=self.dtype)(x))


class Setup(nn.Module):
    """`setup`, the head inside a nested module, a switch given as an attribute."""

    deterministic: bool = False

    def setup(self):
        self.body = nn.Dense(7)
        self.before = nn.Dropout(0.5, deterministic=self.deterministic)
        self.decoder = Decoder()

    def __call__(self, x):
        return self.decoder(self.before(nn.relu(self.body(x.reshape(x.shape[0], -1)))))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="logits")(x)


class Counting(nn.Module):
    """A collection that every call writes to, and a rematerialised head without bias."""

    @nn.compact
    def __call__(self, x, *, training=False):
        calls = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        calls.value = calls.value + 1
        x = nn.remat(nn.Dense)(7)(x.reshape(x.shape[0], -1))
        x = nn.Dropout(0.5, deterministic=not training, name="before")(nn.relu(x))
        return nn.remat(nn.Dense)(3, use_bias=False, name="logits")(x)


def trained_variables(module):
    """Variables whose batch statistics differ from those of any batch."""
    variables = jax.jit(module.init)(KEYS, IMAGES)
    noise = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: a + a.dtype.type(0.3) * noise.random(a.shape).astype(a.dtype), variables
    )


@jax.jit
def both(classifier):
    return classifier.features(IMAGES), classifier(IMAGES)


@pytest.mark.parametrize(
    ("module", "evaluation", "path"),
    [
        (Compact(), {"train": False}, ("logits",)),
        (Setup(), {}, ("decoder", "logits")),
        (Counting(), {"training": False}, ("logits",)),
    ],
    ids=["compact", "setup", "mutable"],
)
def test_linen_features_are_what_flax_records_before_the_head(module, evaluation, path):
    variables = trained_variables(module)
    kept = jax.tree.map(np.array, variables)
    classifier = from_linen(module, variables, IMAGES)

    evaluated = module.clone(deterministic=True) if isinstance(module, Setup) else module

    @jax.jit
    def reference(variables):
        collections = ["intermediates", "calls"]
        return evaluated.apply(
            variables, IMAGES, mutable=collections, capture_intermediates=True, **evaluation
        )

    logits, state = reference(variables)
    before = state["intermediates"]["before"]["__call__"][0]
    features, own = both(classifier)
    np.testing.assert_allclose(features, before, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(own, logits, rtol=1e-5, atol=1e-5)
    params = variables["params"]
    for step in path:
        params = params[step]
    np.testing.assert_array_equal(classifier.head.kernel, params["kernel"])
    np.testing.assert_array_equal(classifier.head.bias, params.get("bias", np.zeros(3)))
    jax.tree.map(np.testing.assert_array_equal, variables, kept)


@jax.numpy_dtype_promotion("standard")  # as Flax needs
def test_bfloat16_compute_gives_float32_features_and_the_rounded_kernel():
    module = Compact(dtype=jnp.bfloat16)
    variables = trained_variables(module)
    classifier = from_linen(module, variables, IMAGES)
    features, own = both(classifier)
    assert features.dtype == classifier.head.kernel.dtype == np.float32
    for array in (features, classifier.head.kernel):
        np.testing.assert_array_equal(array, array.astype(jnp.bfloat16).astype(np.float32))
    logits = jax.jit(lambda variables: module.apply(variables, IMAGES, train=False))(variables)
    np.testing.assert_allclose(own, logits.astype(np.float32), rtol=0.02, atol=0.02)


def test_linen_variables_may_be_traced():
    module = Compact()
    variables = trained_variables(module)
    expected = from_linen(module, variables, IMAGES)

    @jax.jit
    def features(variables, images):
        return from_linen(module, variables, images).features(images)

    found = features(variables, IMAGES)
    np.testing.assert_allclose(found, both(expected)[0], rtol=1e-5, atol=1e-6)


def test_equal_linen_models_share_a_compiled_program():
    module, traced = Setup(), []
    first, second = (
        from_linen(module, trained_variables(module), IMAGES, head=head)
        for head in (None, ("decoder", "logits"))
    )

    @jax.jit
    def apply(classifier, images):
        traced.append(images.shape)
        return classifier(images)

    np.testing.assert_array_equal(apply(first, IMAGES), apply(second, IMAGES))
    assert len(traced) == 1


class Masked(nn.Module):
    """Unhashable: a list of layers, and an array as an argument."""

    layers: object

    @nn.compact
    def __call__(self, x, mask):
        for layer in self.layers:
            x = layer(x * jnp.broadcast_to(mask, x.shape))
        return x


def test_unhashable_modules_and_arguments():
    module = Masked([nn.Dense(4, name="first"), nn.Dense(3, name="last")])
    flat = IMAGES.reshape(-1, 36)
    mask = np.ones(1, np.float32) / 2
    variables = module.init(KEYS, flat, mask)
    classifier = from_linen(module, variables, flat, arguments={"mask": mask})
    expected = module.apply(variables, flat, mask)
    np.testing.assert_allclose(jax.jit(classifier)(flat), expected, rtol=1e-5, atol=1e-6)


class Other(nn.Module):
    """Whatever comes after a body and a Dense layer."""

    after: object = None
    switch: bool = True

    @nn.compact
    def __call__(self, x, is_learning=True):
        x = nn.Dense(5, name="body")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(not (self.switch and is_learning))(x)
        x = nn.Dense(3, name="logits")(nn.relu(x))
        return x if self.after is None else self.after(x)


class NoDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (3, 3), name="only")(x).mean((1, 2))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            nn.softmax,
            "the last layer Dense 'logits'; its outputs sum to 1, so it ends in a softmax",
        ),
        (nn.log_softmax, "its outputs differ from the logits of that layer by up to"),
        (nn.relu, "its outputs differ"),
        (
            lambda x: (x, x),
            r"an array \(9, 3\), got module='outputs of shape \(\(9, 3\), \(9, 3\)\)",
        ),
        (lambda x: x[0], r"an array \(9, 3\), got module='outputs of shape \(3,\)"),
        (lambda x: x[:, :2], r"an array \(9, 3\), got module='outputs of shape \(9, 2\)"),
    ],
    ids=["softmax", "log_softmax", "relu", "tuple", "first", "cut"],
)
def test_linen_models_that_do_not_end_in_a_linear_layer(after, message):
    module = Other(after, switch=False)
    with pytest.raises(ValueError, match=message) as error:
        from_linen(module, trained_variables(module), IMAGES)
    assert "from_callables(features, head, images)" in str(error.value)


def test_linen_models_that_cannot_be_evaluated():
    with pytest.raises(ValueError, match=r"module to execute an nn.Dense .* Conv 'only'"):
        from_linen(NoDense(), trained_variables(NoDense()), IMAGES)
    module = Other()
    variables = trained_variables(module)
    with pytest.raises(ValueError, match=r"in evaluation mode, got: .*batch_stats.* arguments="):
        from_linen(module, variables, IMAGES)
    from_linen(module, variables, IMAGES, arguments={"is_learning": False})
    options = {"arguments": {"is_learning": False}}
    with pytest.raises(ValueError, match="head to be one of 'body', 'logits', got head='missing'"):
        from_linen(module, variables, IMAGES, head="missing", **options)
    with pytest.raises(ValueError, match=r"last linear layer 'body' returns, an array \(9, 5\)"):
        from_linen(module, variables, IMAGES, head="body", **options)
    with pytest.raises(ValueError, match=r"in evaluation mode, got: .*unexpected keyword"):
        from_linen(module, variables, IMAGES, arguments={"missing": 1})
    with pytest.raises(ValueError, match=r"in evaluation mode, got: Could not find parameter"):
        from_linen(Compact(), {"params": variables["params"]}, IMAGES)
    with pytest.raises(ValueError, match=r"images.dtype to be floating"):
        from_linen(module, variables, (IMAGES * 255).astype(np.uint8))
    with pytest.raises(ValueError, match=r"in evaluation mode, got: "):
        from_linen(module, variables, IMAGES[:, :5], **options)


class Network(nnx.Module):
    """Batch norm, dropout, a list of layers, a counter, a switch of its own."""

    def __init__(self, *, rngs, use_bias=True, dtype=None, after=None):
        self.conv = nnx.Conv(1, 4, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 7, dtype=dtype, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.unused = nnx.Linear(3, 3, rngs=rngs)
        self.logits = nnx.Linear(7, 3, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.training = True
        self.after = after
        noise = np.random.default_rng(1)
        self.norm.mean[...] = noise.random(4).astype(np.float32)

    def body(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.dropout(nnx.relu(self.layers[0](x)))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.body(x)
        if self.training:
            x = -x
        x = self.logits(x)
        return x if self.after is None else self.after(x)


def evaluation_copy(model):
    copy = nnx.view(model, deterministic=True, use_running_average=True)
    copy.training = False
    return copy


@pytest.mark.parametrize("use_bias", [True, False])
def test_nnx_features_are_what_the_evaluated_model_computes(use_bias):
    model = Network(rngs=nnx.Rngs(0), use_bias=use_bias)
    graph = nnx.graphdef(model)
    kept = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    classifier = from_nnx(model, IMAGES)
    classifier(IMAGES)  # eagerly, and without a trace in the classifier or the model

    np.testing.assert_array_equal(model.calls[...], 0)
    assert model.training
    assert not model.dropout.deterministic
    assert nnx.graphdef(model) == graph
    now = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, now, kept)

    evaluated = evaluation_copy(nnx.clone(model))
    np.testing.assert_allclose(
        classifier.features(IMAGES), evaluated.body(IMAGES), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(classifier(IMAGES), evaluated(IMAGES), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(classifier.head.kernel, model.logits.kernel[...])


@jax.numpy_dtype_promotion("standard")
def test_nnx_bfloat16_compute():
    model = Network(rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    classifier = from_nnx(model, IMAGES)
    features, own = both(classifier)
    assert features.dtype == classifier.head.kernel.dtype == np.float32
    logits = nnx.jit(lambda model: model(IMAGES))(evaluation_copy(nnx.clone(model)))
    np.testing.assert_allclose(own, logits.astype(np.float32), rtol=0.02, atol=0.02)


def test_nnx_classifiers_pass_through_jit_vmap_pmap_and_share_programs():
    traced = []
    first, second = (from_nnx(Network(rngs=nnx.Rngs(seed)), IMAGES) for seed in (0, 1))

    @jax.jit
    def apply(classifier, images):
        traced.append(images.shape)
        return classifier(images)

    found = apply(first, IMAGES), apply(second, IMAGES)
    assert len(traced) == 1
    assert np.abs(found[0] - found[1]).max() > 0.01
    np.testing.assert_allclose(found[0], first(IMAGES), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(first)(IMAGES), found[0], rtol=1e-5, atol=1e-6)
    spread = extract_features(first, IMAGES, batch_size=8, devices=jax.devices())
    np.testing.assert_allclose(spread, first.features(IMAGES), rtol=1e-5, atol=1e-6)


def test_nnx_sequential_and_paths():
    rngs = nnx.Rngs(0)
    flatten = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    model = nnx.Sequential(
        flatten, nnx.Linear(36, 5, rngs=rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(5, 3, rngs=rngs),
    )  # fmt: skip
    classifier = from_nnx(model, IMAGES)
    features = nnx.relu(model.layers[1](flatten(IMAGES)))
    np.testing.assert_allclose(classifier.features(IMAGES), features, rtol=1e-6)
    for path in ("layers/4", ("layers", 4)):
        assert from_nnx(model, IMAGES, head=path).head.kernel.shape == (5, 3)
    with pytest.raises(ValueError, match="head to be one of 'layers/1', 'layers/4'"):
        from_nnx(model, IMAGES, head="layers/2")
    with pytest.raises(ValueError, match="last linear layer 'layers/1' returns"):
        from_nnx(model, IMAGES, head="layers/1")


class Switched(nnx.Module):
    """A switch whose name nobody can guess."""

    def __init__(self, *, rngs):
        self.network = Network(rngs=rngs)

    def __call__(self, x, *, norm_in_use=True, noise=True):
        net = self.network
        x = net.norm(net.conv(x), use_running_average=not norm_in_use).mean((1, 2))
        x = net.dropout(net.layers[0](x), deterministic=not noise)
        return net.logits(x)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (nnx.softmax, "the last layer Linear 'logits'; its outputs sum to 1, so it ends in a soft"),
        (nnx.log_softmax, "its outputs differ from the logits of that layer by up to"),
        (lambda x: {"logits": x}, "outputs of shape {'logits': "),
    ],
)
def test_nnx_models_that_do_not_end_in_a_linear_layer(after, message):
    with pytest.raises(ValueError, match=message):
        from_nnx(Network(rngs=nnx.Rngs(0), after=after), IMAGES)


def test_nnx_models_that_cannot_be_evaluated():
    model = Switched(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="updates its batch statistics"):
        from_nnx(model, IMAGES, arguments={"noise": False})
    with pytest.raises(ValueError, match="draws random numbers"):
        from_nnx(model, IMAGES, arguments={"norm_in_use": False})
    from_nnx(model, IMAGES, arguments={"norm_in_use": False, "noise": False})
    with pytest.raises(ValueError, match=r"model to execute an nnx.Linear .* Conv 'network/conv'"):
        from_nnx(_Convolution(model), IMAGES)
    with pytest.raises(ValueError, match="in evaluation mode, got: "):
        from_nnx(Network(rngs=nnx.Rngs(0)), IMAGES[..., :0])


class _Convolution(nnx.Module):
    def __init__(self, switched):
        self.network = switched.network

    def __call__(self, x):
        return self.network.conv(x).mean((1, 2))
