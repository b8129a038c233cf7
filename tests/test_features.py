"""Classifiers from plain parts, and the extraction of features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hullgeo import LinearHead, extract_features, from_arrays, from_callables

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(12, 5)).astype(np.float32)
KERNEL = RNG.normal(size=(5, 3)).astype(np.float32)
BIAS = RNG.normal(size=3).astype(np.float32)
IMAGES = RNG.random((7, 2, 2, 3)).astype(np.float32)


def relu_features(images):
    flat = jnp.reshape(images, (images.shape[0], 12))
    return jnp.maximum(flat @ jnp.asarray(WEIGHTS, flat.dtype), 0)


def affine(features):
    product = jnp.matmul(features, KERNEL, precision="highest")
    return product + jnp.broadcast_to(BIAS, product.shape)


def numpy_features(images):
    return np.maximum(images.reshape(-1, 12).astype(np.float64) @ WEIGHTS, 0)


def numpy_logits(images):
    return numpy_features(images) @ KERNEL + BIAS


CLASSIFIER = from_callables(relu_features, (KERNEL, BIAS), IMAGES)


@pytest.fixture
def classifier():
    return CLASSIFIER


@pytest.mark.parametrize(
    "head",
    [
        (KERNEL, BIAS),
        LinearHead(jnp.asarray(KERNEL), jnp.asarray(BIAS)),
        affine,
        jax.tree_util.Partial(affine),
        jax.jit(affine),
    ],
    ids=["pair", "LinearHead", "function", "Partial", "jitted"],
)
def test_every_form_of_head_gives_the_same_classifier(head):
    found = from_callables(relu_features, head, IMAGES)
    np.testing.assert_allclose(found.head.kernel, KERNEL, rtol=1e-6)
    np.testing.assert_allclose(found.head.bias, BIAS, rtol=1e-6)
    np.testing.assert_allclose(found(IMAGES), numpy_logits(IMAGES), rtol=1e-5, atol=1e-5)


def test_leading_axes_of_any_number(classifier):
    logits = numpy_logits(IMAGES).astype(np.float32)
    np.testing.assert_allclose(classifier(IMAGES[0]), logits[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        classifier(IMAGES[None, :, None])[0, :, 0], logits, rtol=1e-5, atol=1e-5
    )
    assert classifier(IMAGES[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"images.shape to end in the 3 axes of an image"):
        classifier(IMAGES[0, 0])


def test_a_classifier_passes_through_transformations(classifier):
    expected = np.asarray(classifier(IMAGES))
    apply = lambda classifier, images: classifier(images)  # noqa: E731
    np.testing.assert_allclose(jax.jit(apply)(classifier, IMAGES), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(classifier)(IMAGES), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(apply, (None, 0))(classifier, IMAGES), expected, rtol=1e-6)
    spread = jax.pmap(apply, in_axes=(None, 0))(classifier, IMAGES[:4, None])
    np.testing.assert_allclose(spread[:, 0], expected[:4], rtol=1e-6)


def test_gradients_agree_with_finite_differences():
    images = IMAGES.astype(np.float64)
    classifier = from_callables(relu_features, (KERNEL.astype("d"), BIAS.astype("d")), images)
    value = lambda classifier, images: jnp.sum(classifier(images) ** 2)  # noqa: E731
    in_head, in_images = jax.grad(value, argnums=(0, 1), allow_int=True)(classifier, images)
    step = 1e-6
    direction = RNG.normal(size=images.shape)
    moved = [value(classifier, images + sign * step * direction) for sign in (1, -1)]
    np.testing.assert_allclose(
        np.sum(in_images * direction), (moved[0] - moved[1]) / (2 * step), rtol=1e-6
    )
    direction = RNG.normal(size=KERNEL.shape)
    moved = [
        value(
            dataclasses.replace(
                classifier, head=LinearHead(KERNEL + sign * step * direction, BIAS)
            ),
            images,
        )
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(
        np.sum(in_head.head.kernel * direction), (moved[0] - moved[1]) / (2 * step), rtol=1e-6
    )


def test_functions_need_no_hash():
    class Unhashable:
        __hash__ = None

        def __call__(self, images):
            return relu_features(images)

    classifier = from_callables(Unhashable(), (KERNEL, BIAS), IMAGES)
    np.testing.assert_array_equal(jax.jit(classifier)(IMAGES), CLASSIFIER(IMAGES))


def test_parameters_in_a_partial_stay_visible():
    features = jax.tree_util.Partial(lambda weights, x: jnp.reshape(x, (-1, 12)) @ weights, WEIGHTS)
    classifier = from_callables(features, (KERNEL, BIAS), IMAGES)
    shapes = [leaf.shape for leaf in jax.tree.leaves(classifier)]
    assert sorted(shapes) == sorted([WEIGHTS.shape, KERNEL.shape, BIAS.shape])


@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), ("float64", "float32"), ("bfloat16", "float32")]
)
def test_the_head_computes_in_the_wider_type(dtypes):
    features = jnp.asarray(RNG.normal(size=(4, 5)), dtypes[0])
    head = LinearHead(jnp.asarray(KERNEL, dtypes[1]), jnp.asarray(BIAS, dtypes[1]))
    logits = head(features)
    assert logits.dtype == max(dtypes, key=lambda name: jnp.finfo(name).bits)
    expected = np.asarray(features, np.float64) @ np.asarray(KERNEL, np.float64) + BIAS
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_float64_arrays_keep_their_type_without_the_global_flag():
    kernel, features = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 5))
    with jax.enable_x64(False):
        logits = from_arrays(kernel)(features)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, features @ kernel, rtol=1e-14)


def test_plain_arrays_are_a_classifier_of_features():
    features = RNG.normal(size=(4, 5)).astype(np.float32)
    classifier = from_arrays(KERNEL, BIAS)
    np.testing.assert_array_equal(classifier.features(features), features)
    np.testing.assert_allclose(classifier(features), features @ KERNEL + BIAS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "bias", "message"),
    [
        (KERNEL[0], BIAS, r"kernel.shape to be \(dim, num_classes\), got kernel.shape=\(3,\)"),
        (KERNEL, BIAS[:2], r"bias.shape to be \(num_classes,\) = \(3,\), got bias.shape=\(2,\)"),
        (KERNEL.astype(int), BIAS, "kernel.dtype to be floating point"),
        (KERNEL[:, :1], BIAS[:1], "at least two columns"),
        (KERNEL * np.where(np.eye(5, 3) > 0, np.nan, 1), BIAS, r"kernel\[0, 0\] to be finite"),
        (KERNEL, BIAS * np.inf, r"bias\[0\] to be finite"),
        (KERNEL[:0], BIAS, "kernel.shape to be"),
    ],
)
def test_heads_that_are_none(kernel, bias, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(kernel, bias)


@pytest.mark.parametrize(
    ("features", "head", "images", "message"),
    [
        (relu_features, (KERNEL[:4], BIAS), IMAGES, r"kernel.shape to be \(5, num_classes\)"),
        (relu_features, (KERNEL,), IMAGES, "head to be a pair"),
        (relu_features, 3, IMAGES, "head to be a pair .* got head='int'"),
        (lambda x: x, (KERNEL, BIAS), IMAGES, r"features\(images\).shape to be \(n, dim\)"),
        (lambda x: x, affine, IMAGES, r"features\(images\).shape to be \(n, dim\)"),
        (relu_features, (KERNEL, BIAS), IMAGES[:0], "at least one image"),
        (relu_features, (KERNEL, BIAS), IMAGES[0, 0, 0], r"images.shape to be \(n, \*image\)"),
        (relu_features, (KERNEL, BIAS), IMAGES.astype(np.uint8), "Divide by 255"),
        (relu_features, (KERNEL, BIAS), IMAGES * np.float32(np.nan), "to be finite"),
        (relu_features, (KERNEL, BIAS), [1.0], "images to be an array"),
        (relu_features, lambda f: jax.nn.softmax(affine(f)), IMAGES, "it ends in a softmax"),
        (relu_features, lambda f: jax.nn.log_softmax(affine(f)), IMAGES, "outputs differ"),
        (relu_features, lambda f: jax.nn.relu(affine(f)), IMAGES, "outputs differ"),
        (relu_features, lambda f: affine(f)[:, 0], IMAGES, "kernel.shape"),
    ],
)
def test_parts_that_make_no_classifier(features, head, images, message):
    with pytest.raises(ValueError, match=message):
        from_callables(features, head, images)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum),
    batch_size=st.sampled_from([1, 4, 8]),
    split=st.booleans(),
)
def test_extraction_equals_one_pass(sizes, batch_size, split):
    images = np.random.default_rng(sum(sizes)).random((sum(sizes), 2, 2, 3)).astype(np.float32)
    chunks = np.split(images, np.cumsum(sizes)[:-1])
    devices = jax.devices() if split else None
    for source in (images, iter(chunks), jnp.asarray(images)):
        found = extract_features(CLASSIFIER, source, batch_size=batch_size, devices=devices)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, numpy_features(images), rtol=1e-5, atol=1e-5)


def test_extraction_compiles_once():
    traced = []

    def features(images):
        traced.append(images.shape)
        return relu_features(images)

    classifier = from_callables(features, (KERNEL, BIAS), IMAGES)
    traced.clear()
    for count in (7, 3, 5):
        extract_features(classifier, IMAGES[:count], batch_size=4)
    assert traced == [(4, 2, 2, 3)]


def test_extraction_reads_an_iterator_as_it_goes(classifier):
    seen = []

    def batches():
        for number in range(50):
            seen.append(number)
            assert len(seen) <= extracted[0] + 3
            yield IMAGES[:4]

    extracted = [0]
    counting = dataclasses.replace(
        classifier, features=jax.tree_util.Partial(_Counting(classifier.features, extracted))
    )
    with jax.disable_jit():
        found = extract_features(counting, batches(), batch_size=4)
    assert found.shape == (200, 5)


class _Counting:
    def __init__(self, features, count):
        self.features, self.count = features, count

    def __call__(self, images):
        self.count[0] += 1
        return self.features(images)


def test_a_nan_image_spoils_only_its_own_features(classifier):
    images = IMAGES.copy()
    images[3, 0, 0, 0] = np.nan
    found = extract_features(classifier, images, batch_size=4)
    assert np.isnan(found[3]).all()
    rest = np.delete(np.arange(7), 3)
    np.testing.assert_allclose(found[rest], numpy_features(images[rest]), rtol=1e-5, atol=1e-5)


def test_progress_is_shown_on_request(classifier, capsys):
    extract_features(classifier, IMAGES, batch_size=4)
    assert capsys.readouterr().err == ""
    extract_features(classifier, IMAGES, batch_size=4, progress=True)
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES[:0], {}, "at least one image"),
        ([], {}, "at least one image"),
        ([IMAGES[:0]], {}, "at least one image"),
        (3.0, {}, "an iterable of them"),
        ([[1.0]], {}, "images to be an array"),
        ((IMAGES * 255).astype(np.uint8), {}, "Divide by 255"),
        (IMAGES[0], {}, r"images.shape to have 1 \+ 3 axes"),
        (IMAGES, {"batch_size": 0}, "batch_size to be an integer >= 1"),
        (IMAGES, {"devices": []}, "devices to hold at least one device"),
    ],
)
def test_images_that_cannot_be_read(classifier, images, options, message):
    with pytest.raises(ValueError, match=message):
        extract_features(classifier, images, **options)
