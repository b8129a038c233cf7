"""Nearest flips: exact on linear and two-layer networks, bounds to the bit, rows on their own.

Compiling takes most of the time: calls share shapes, and `everything` gives every array, so that
labels, masks, subspaces and starts share one program.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog
from jax.tree_util import Partial

import hullgeo
from hullgeo import Status

SHAPE = (2, 2, 1)
ROWS = 12


def nearest_flip(*args, **options):
    return jax.tree.map(np.asarray, hullgeo.nearest_flip(*args, **options))


def everything(classifier, images, **changes):
    """A search that is given every array; what is not named in `changes` restricts nothing."""
    options = {
        "labels": np.asarray(classifier(images)).argmax(-1),
        "mask": np.ones(SHAPE, bool),
        "subspace": np.eye(4, dtype=np.float32).reshape(4, *SHAPE),
        "start": images,
    }
    return nearest_flip(classifier, images, **options | changes)


def linear(parameters, images):
    kernel, bias = parameters
    return images.reshape(images.shape[0], -1) @ kernel + bias[None]


def two_layer(parameters, images):
    first, shift, kernel, bias = parameters
    hidden = jnp.maximum(images.reshape(images.shape[0], -1) @ first + shift[None], 0)
    return hidden @ kernel + bias[None]


def flat(images):
    return np.asarray(images, np.float64).reshape(len(images), -1)


def random_linear(seed, classes=3, dtype=np.float32):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(4, classes)).astype(dtype)
    center = np.full(4, 0.5, dtype)
    return (kernel, -(center @ kernel) + rng.normal(size=classes).astype(dtype) * 0.1)


def random_two_layer(seed, hidden=4, classes=3):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(4, hidden))
    kernel = rng.normal(size=(hidden, classes))
    arrays = (
        first,
        -first.sum(0) / 2 + 0.2 * rng.normal(size=hidden),
        kernel,
        0.3 * rng.normal(size=classes),
    )
    return tuple(a.astype(np.float32) for a in arrays)


def nearest_in_polyhedron(point, normals, offsets):
    """min |x - point| with normals @ x >= offsets, by quadprog; infinite where there is none."""
    keep = np.linalg.norm(normals, axis=1) > 0
    if (offsets[~keep] > 0).any():
        return np.inf
    try:
        answer = quadprog.solve_qp(np.eye(len(point)), point, normals[keep].T, offsets[keep])[0]
    except ValueError:
        return np.inf
    return float(np.linalg.norm(answer - point))


def exact_distance(parameters, image, label, classes):
    """The nearest point of `classes` by enumeration of the activation patterns, one QP each."""
    first, shift, kernel, bias = (np.asarray(a, np.float64) for a in parameters)
    pixels, hidden = first.shape
    box = np.concatenate([np.eye(pixels), -np.eye(pixels)])
    box_offsets = np.concatenate([np.zeros(pixels), -np.ones(pixels)])
    best = np.inf
    for pattern in itertools.product([0.0, 1.0], repeat=hidden):
        sign = 2 * np.array(pattern) - 1
        effective = first * np.array(pattern) @ kernel
        constant = shift * np.array(pattern) @ kernel + bias
        for rival in classes:
            normals = np.concatenate(
                [box, (first * sign).T, [effective[:, rival] - effective[:, label]]]
            )
            offsets = np.concatenate(
                [box_offsets, -shift * sign, [constant[label] - constant[rival]]]
            )
            best = min(best, nearest_in_polyhedron(image, normals, offsets))
    return best


def images_for(classifier, number=ROWS, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    images = rng.uniform(0.05, 0.95, (number, *SHAPE)).astype(dtype)
    return images, np.asarray(classifier(images)).argmax(-1)


def assert_flipped(classifier, images, flip, lower=0.0, upper=1.0):
    """The answer's own claims, checked on the returned arrays alone and in the batch."""
    after, before = np.asarray(classifier(flip.image)), np.asarray(classifier(flip.image_before))
    single = np.stack([np.asarray(classifier(image[None]))[0] for image in flip.image])
    for logits in (after, single):
        assert (logits.argmax(-1) != flip.label).all()
    assert (after.argmax(-1) == flip.rival).all()
    assert (before.argmax(-1) == flip.label).all()
    for picture in (flip.image, flip.image_before):
        assert (picture >= lower).all()
        assert (picture <= upper).all()
    distance = np.linalg.norm(flat(flip.image) - flat(images), axis=-1)
    np.testing.assert_allclose(distance, flip.distance, rtol=1e-5)
    assert (flip.distance_before <= flip.distance).all()


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_linear_flips_are_the_exact_ones(dtype):
    parameters = random_linear(0, dtype=dtype)
    classifier = Partial(linear, parameters)
    images, labels = images_for(classifier, dtype=dtype)
    flip = nearest_flip(classifier, images)
    assert flip.distance.dtype == dtype
    kernel, bias = (np.asarray(a, np.float64) for a in parameters)
    box, offsets = (
        np.concatenate([np.eye(4), -np.eye(4)]),
        np.concatenate([np.zeros(4), -np.ones(4)]),
    )
    for row, (image, label) in enumerate(zip(flat(images), labels, strict=True)):
        exact = min(
            nearest_in_polyhedron(
                image,
                np.concatenate([box, [kernel[:, rival] - kernel[:, label]]]),
                np.append(offsets, bias[label] - bias[rival]),
            )
            for rival in range(3)
            if rival != label
        )
        if np.isfinite(exact):
            np.testing.assert_allclose(flip.distance[row], exact, rtol=2e-4, atol=2e-5)
    reached = np.isfinite(flip.distance)
    assert reached.sum() >= 10
    kept = jax.tree.map(lambda a: a[reached], flip)
    assert_flipped(classifier, images[reached], kept)
    assert (kept.kkt_residual < 1e-2).all()


@pytest.mark.parametrize("seed", [0, 2, 4])
@pytest.mark.slow
def test_two_layer_flips_are_never_below_the_exact_ones_and_mostly_equal(seed):
    parameters = random_two_layer(seed)
    classifier = Partial(two_layer, parameters)
    images, labels = images_for(classifier, 8)
    flip = nearest_flip(classifier, images, budget=600, num_starts=8)
    exact = np.array(
        [
            exact_distance(parameters, image, label, [c for c in range(3) if c != label])
            for image, label in zip(flat(images), labels, strict=True)
        ]
    )
    reachable = np.isfinite(exact)
    assert reachable.any()
    assert (flip.distance >= exact * (1 - 1e-4) - 1e-5).all()
    assert (flip.status[~reachable] == Status.STALLED).all()
    equal = np.abs(flip.distance - exact)[reachable] <= 1e-4 + 1e-3 * exact[reachable]
    assert equal.mean() >= 0.85  # a local search
    assert_flipped(classifier, images[reachable], jax.tree.map(lambda a: a[reachable], flip))


@pytest.mark.slow
def test_a_target_class_is_reached_where_it_is_the_largest():
    classifier = Partial(linear, random_linear(0))
    images, labels = images_for(classifier)
    target = (labels + 1) % 3
    flip = nearest_flip(classifier, images, target=target)
    found = flip.status == Status.CONVERGED
    assert found.sum() >= 8
    after = np.asarray(classifier(flip.image)).argmax(-1)
    assert (after[found] == target[found]).all()
    free = nearest_flip(classifier, images)
    assert (flip.distance >= free.distance * (1 - 1e-3)).all()
    present = nearest_flip(classifier, images, target=labels)
    assert (present.distance == 0).all()
    assert (present.status == Status.CONVERGED).all()


@pytest.mark.slow
def test_misclassified_images_are_at_distance_zero_of_their_label():
    classifier = Partial(linear, random_linear(0))
    images, predicted = images_for(classifier)
    labels = predicted.copy()
    labels[:2] = (labels[:2] + 1) % 3
    flip = everything(classifier, images, labels=labels)
    assert (flip.distance[:2] == 0).all()
    assert (flip.label == labels).all()
    assert (flip.rival[:2] == predicted[:2]).all()
    asked = nearest_flip(classifier, images)
    assert (asked.label == predicted).all()
    assert (asked.distance > 0).all()
    np.testing.assert_allclose(flip.distance[2:], asked.distance[2:], rtol=1e-3)


def test_bounds_mask_and_subspace():
    classifier = Partial(linear, random_linear(0))
    images, _ = images_for(classifier)
    images = np.clip(images, 0.2, 0.7)
    narrow = nearest_flip(classifier, images, bounds=(0.2, 0.7))
    assert ((narrow.image >= np.float32(0.2)) & (narrow.image <= np.float32(0.7))).all()
    outside = nearest_flip(classifier, images, bounds=(0.3, 0.6))  # clipped into the bounds first
    assert ((outside.image >= np.float32(0.3)) & (outside.image <= np.float32(0.6))).all()
    found = np.isfinite(outside.distance)
    moved = np.linalg.norm(flat(outside.image) - flat(images), axis=-1)
    np.testing.assert_allclose(outside.distance[found], moved[found], rtol=1e-5)
    mask = np.array([[True, False], [True, True]])[..., None]
    masked = everything(classifier, images, mask=mask)
    changed = masked.image != images
    assert changed.any()
    assert not changed[:, ~mask].any()
    assert (masked.distance >= nearest_flip(classifier, images).distance * (1 - 1e-4)).all()
    basis = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    basis = np.concatenate([basis, basis])  # dependent directions add nothing
    spanned = everything(classifier, images, subspace=basis, bounds=(-5.0, 5.0))
    reached = np.isfinite(spanned.distance)
    assert reached.any()
    moved = (flat(spanned.image) - flat(images))[reached]
    directions = basis[:2].reshape(2, -1).T
    rest = moved - moved @ np.linalg.pinv(directions).T @ directions.T
    assert (np.linalg.norm(rest, axis=-1) <= 1e-4 * np.linalg.norm(moved, axis=-1)).all()


@pytest.mark.slow
def test_a_former_result_is_continued():
    classifier = Partial(linear, random_linear(0))
    images, _ = images_for(classifier)
    found = nearest_flip(classifier, images)
    reached = np.isfinite(found.distance)
    again = everything(classifier, images, start=found.image, budget=12)
    assert (again.distance[reached] <= found.distance[reached] * (1 + 1e-4)).all()


def test_statuses_of_rows_without_a_flip():
    classifier = Partial(linear, random_linear(0))
    images, _ = images_for(classifier)
    constant = Partial(linear, (np.zeros((4, 3), np.float32), np.arange(3, dtype=np.float32)))
    flip = nearest_flip(constant, images)
    assert (flip.status == Status.NO_GRADIENT).all()
    assert np.isinf(flip.distance).all()
    assert (flip.rival == flip.label).all()
    np.testing.assert_array_equal(flip.image, images)
    out_of_reach = Partial(linear, (random_linear(0)[0], np.array([100, 0, 0], np.float32)))
    flip = nearest_flip(out_of_reach, images)
    assert (flip.status == Status.STALLED).all()
    nothing_free = everything(classifier, images, mask=np.zeros(SHAPE, bool))
    assert (nothing_free.status == Status.NO_GRADIENT).all()


@pytest.mark.slow
def test_ties_at_the_start():
    kernel = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    classifier = Partial(linear, (kernel, np.array([0, 0, -9], np.float32)))
    images = np.full((ROWS, *SHAPE), 0.5, np.float32)
    flip = nearest_flip(classifier, images)
    assert (flip.label == 0).all()
    assert (flip.rival == 1).all()
    assert (flip.distance < 1e-4).all()


def test_a_nan_row_leaves_the_others_right():
    classifier = Partial(linear, random_linear(0))
    images, _ = images_for(classifier)
    clean = nearest_flip(classifier, images)
    images[1, 0, 0, 0] = np.nan
    flip = nearest_flip(classifier, images)
    assert flip.status[1] == Status.NONFINITE
    assert np.isnan(flip.distance[1])
    for field in ("distance", "image"):
        got, expected = (np.delete(getattr(out, field), 1, axis=0) for out in (flip, clean))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    classifier = Partial(linear, random_linear(0))
    images, _ = images_for(classifier)
    order = np.random.default_rng(0).permutation(ROWS)
    flip, other = (nearest_flip(classifier, rows) for rows in (images, images[order]))
    np.testing.assert_array_equal(flip.image[order], other.image)


@pytest.mark.slow
def test_batch_pmap_and_vectors_agree():
    kernel, bias = random_linear(0)
    classifier = Partial(linear, (kernel, bias))
    images, _ = images_for(classifier)
    flip = nearest_flip(classifier, images)
    grid = nearest_flip(classifier, images.reshape(3, 4, *SHAPE))
    vectors = hullgeo.from_arrays(kernel, bias)
    split = jax.pmap(lambda rows: hullgeo.nearest_flip(vectors, rows))(images.reshape(4, 3, -1))
    assert grid.distance.shape == (3, 4)
    np.testing.assert_array_equal(np.ravel(grid.distance), flip.distance)
    np.testing.assert_allclose(np.ravel(split.distance), flip.distance, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 2, 2, 1), int)}, "images.dtype"),
        ({"images": np.zeros((2, 1), np.float32)}, "images.shape"),
        ({"target": 3}, "target"),
        ({"target": 0.5}, "target.dtype"),
        ({"labels": np.zeros(3, int)}, "labels.shape"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"mask": np.ones(SHAPE)}, "mask.dtype"),
        ({"subspace": np.ones(SHAPE)}, "subspace.shape"),
        ({"start": np.ones(SHAPE, np.float32)}, "start.shape"),
        ({"budget": 3}, "budget"),
        ({"num_rivals": 0}, "num_rivals"),
        ({"num_starts": 0}, "num_starts"),
    ],
)
def test_bad_input_is_named(change, message):
    classifier = Partial(linear, random_linear(0))
    images, _ = images_for(classifier, 4)
    options = {"images": images} | change
    with pytest.raises(ValueError, match=message):
        nearest_flip(classifier, **options)


def saturated(first, amount, images):
    """A network whose units are steps but for smoothing: gradients underflow to exactly zero."""
    pixels = images.reshape(images.shape[0], -1)
    steepness = 1e4 / (1 + 2e3 * amount)
    hidden = jnp.tanh(steepness * (pixels @ first - 0.1))
    return jnp.stack([-hidden.sum(-1), hidden.sum(-1)], axis=-1)


@pytest.mark.slow
def test_a_saturated_network_is_flipped_nearer_by_homotopy():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(64, 3)).astype(np.float32) / 8
    first -= first.mean(0)
    smoothed = Partial(saturated, first)
    classifier = Partial(smoothed, np.float32(0))
    images = np.full((4, 8, 8, 1), 0.5, np.float32)
    images += 0.01 * rng.normal(size=images.shape).astype(np.float32)
    labels = np.asarray(classifier(images)).argmax(-1)
    assert (labels == 0).all()
    plain = nearest_flip(classifier, images, num_starts=4)
    start = hullgeo.smoothed_start(smoothed, images, labels, amounts=(10.0, 1.0, 0.1, 0.01))
    flip = nearest_flip(classifier, images, start=start)
    assert (np.asarray(classifier(flip.image)).argmax(-1) == 1).all()
    assert np.median(flip.distance) < 0.75 * np.median(plain.distance)


def rescaled(parameters, images):
    scale, inner = parameters
    return two_layer(inner, images / scale) * 1e6


def test_pixels_and_logits_of_any_scale_give_the_same_flips():
    rng = np.random.default_rng(8)
    images = rng.uniform(size=(ROWS, *SHAPE)).astype(np.float32)
    parameters = random_two_layer(3)
    plain = nearest_flip(Partial(two_layer, parameters), images)
    assert (plain.status == Status.CONVERGED).all()
    scale = np.float32(256)  # a power of two changes no rounding of the pixels
    classifier = Partial(rescaled, (scale, parameters))
    large = nearest_flip(classifier, images * scale, bounds=(0, 256))
    np.testing.assert_allclose(large.distance / scale, plain.distance, rtol=1e-3)
    np.testing.assert_array_equal(large.rival, plain.rival)
