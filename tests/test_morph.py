"""Morphs and ambiguous images: ends kept, paths followed, ties reached, rows on their own."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.optimize import linprog, minimize

import hullgeo
from hullgeo import Status, ambiguous_image, morph

SHAPE = (4, 3, 1)


def features_of(parameters, images):
    weights, slope = parameters
    flat = images.reshape(*images.shape[:-3], -1)
    reached = jnp.matmul(flat, weights, precision="highest")
    return jnp.where(reached > 0, reached, slope * reached)


def network(slope=0.0, seed=0, dtype=np.float32):
    """Two layers; a slope of 0 makes ReLU, whose units die, and a positive one keeps them alive."""
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(12, 5)), dtype)
    head = hullgeo.LinearHead(
        jnp.asarray(rng.normal(size=(5, 3)), dtype), jnp.asarray(0.1 * rng.normal(size=3), dtype)
    )
    return hullgeo.Classifier(Partial(features_of, (weights, jnp.asarray(slope, dtype))), head)


def attainable(classifier, target):
    """Whether some image within [0, 1] has these features, by scipy's linear programming."""
    weights, slope = (np.asarray(part, np.float64) for part in classifier.features.args[0])
    before = np.where(target > 0, target, target / slope)
    found = linprog(np.zeros(12), A_eq=weights.T, b_eq=before, bounds=(0, 1))
    return found.status == 0


def linear(parameters, images):
    kernel, bias = parameters
    return images.reshape(images.shape[0], -1) @ kernel + bias[None]


def images(seed, count=4, dtype=np.float32):
    return np.random.default_rng(seed).uniform(0.05, 0.95, (count, *SHAPE)).astype(dtype)


@pytest.mark.parametrize("path", ["features", "pixels", "boundary"])
def test_morphs_keep_their_ends_and_follow_their_path(path):
    classifier, first, last = network(slope=0.3), images(0), images(1)
    result = morph(classifier, first, last, num_frames=7, path=path)
    assert result.images.shape == (4, 7, *SHAPE)
    np.testing.assert_array_equal(result.images[:, 0], first)
    np.testing.assert_array_equal(result.images[:, -1], last)
    assert (result.images >= 0).all()
    assert (result.images <= 1).all()
    np.testing.assert_allclose(classifier.features(result.images), result.features, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(classifier(result.images)).argmax(-1), result.labels)
    if path == "pixels":
        np.testing.assert_allclose(result.images[:, 2], (2 * first + last) / 3, atol=1e-6)
    else:
        possible = np.array(
            [[attainable(classifier, t) for t in row] for row in np.float64(result.targets)]
        )
        reached = np.asarray(result.status) == Status.CONVERGED
        assert possible.mean() > 0.5
        assert reached[possible].all()
        error = np.linalg.norm(result.features - result.targets, axis=-1)
        size = np.linalg.norm(result.targets, axis=-1)
        assert (error <= 1.01e-2 * size)[reached].all()
    if path == "features":
        ends = np.asarray(classifier.features(np.stack([first, last])))
        np.testing.assert_allclose(result.targets[:, 3], (ends[0] + ends[1]) / 2, atol=1e-5)
    changed = np.asarray(result.labels[:, 1:] != result.labels[:, :-1])
    crossed = np.asarray(result.crossings.status) != Status.NO_CROSSING
    np.testing.assert_array_equal(changed, crossed)


@pytest.mark.parametrize("path", ["features", "boundary"])
def test_only_dead_units_keep_frames_from_their_targets(path):
    classifier, first, last = network(), images(0), images(1)
    result = morph(classifier, first, last, num_frames=7, path=path)
    missed = np.asarray(result.status) == Status.STEP_LIMIT
    dead = ((np.asarray(result.features) == 0) & (np.asarray(result.targets) > 0)).any(-1)
    assert not missed.all()
    assert dead[missed].all()


def test_the_boundary_path_lies_on_the_boundary_in_the_middle():
    classifier, first, last = network(), images(0), images(1)
    result = morph(classifier, first, last, num_frames=7, path="boundary")
    label_a, label_b = np.asarray(result.labels[:, 0]), np.asarray(result.labels[:, -1])
    logits = np.asarray(classifier.head(result.targets))
    rows = np.arange(4)
    for frame in (2, 4):
        gap = np.abs(logits[rows, frame, label_a] - logits[rows, frame, label_b])
        outside = np.asarray(result.targets[:, frame] == 0).any(-1)
        assert (gap[(label_a != label_b) & ~outside] < 1e-4).all()


def exact_tie(parameters, image, classes):
    """The nearest tie of linear logits within the box, by scipy."""
    kernel, bias = (np.asarray(a, np.float64) for a in parameters)
    others = [k for k in range(kernel.shape[1]) if k not in classes]
    constraints = [
        {"type": "eq", "fun": lambda x, a=a: x @ (kernel[:, a] - kernel[:, classes[0]])
         + bias[a] - bias[classes[0]]}
        for a in classes[1:]
    ] + [
        {"type": "ineq", "fun": lambda x, a=a: x @ (kernel[:, classes[0]] - kernel[:, a])
         + bias[classes[0]] - bias[a]}
        for a in others
    ]  # fmt: skip
    answer = minimize(
        lambda x: ((x - image) ** 2).sum(), image, jac=lambda x: 2 * (x - image),
        bounds=[(0, 1)] * len(image), constraints=constraints, method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 300},
    )  # fmt: skip
    return np.sqrt(answer.fun) if answer.success else np.nan


@pytest.mark.parametrize("classes", [(0, 1), (2, 0, 1)])
def test_ties_of_linear_logits_are_the_nearest(classes):
    rng = np.random.default_rng(2)
    kernel = rng.normal(size=(12, 4)).astype(np.float32)
    parameters = (kernel, -kernel.sum(0) / 2)
    start = images(3, 6)
    result = ambiguous_image(Partial(linear, parameters), start, classes, atol=1e-4)
    assert ((result.image >= 0) & (result.image <= 1)).all()
    exact = np.array(
        [exact_tie(parameters, row.reshape(-1).astype(float), classes) for row in start]
    )
    usable = np.isfinite(exact) & (np.asarray(result.status) == Status.CONVERGED)
    assert usable.sum() >= 4
    np.testing.assert_allclose(result.distance[usable], exact[usable], rtol=2e-2, atol=1e-3)
    chosen = np.asarray(result.logits)[:, list(classes)]
    np.testing.assert_allclose(np.ptp(chosen, axis=-1), result.tie_gap, atol=1e-5)
    assert (result.tie_gap[usable] <= 2e-4).all()


def test_an_ambiguous_nan_row_leaves_the_others_right():
    rng = np.random.default_rng(2)
    kernel = rng.normal(size=(12, 4)).astype(np.float32)
    classifier, start = Partial(linear, (kernel, -kernel.sum(0) / 2)), images(3, 6)
    clean = ambiguous_image(classifier, start, (0, 1))
    start[1, 0, 0, 0] = np.nan
    result = ambiguous_image(classifier, start, (0, 1))
    assert result.status[1] == Status.NONFINITE
    kept = [np.delete(np.asarray(out.image), 1, axis=0) for out in (result, clean)]
    np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (morph, {"num_frames": 1}, "num_frames"),
        (morph, {"path": "line"}, "path"),
        (morph, {"rtol": -1.0}, "rtol"),
        (morph, {"image_b": images(0, 3)}, "image_b.shape"),
        (morph, {"image_a": np.zeros((4, *SHAPE), int)}, "image_a.dtype"),
        (ambiguous_image, {"classes": (0,)}, "classes.shape"),
        (ambiguous_image, {"classes": (0, 0)}, "classes"),
        (ambiguous_image, {"classes": (0, 3)}, "classes"),
        (ambiguous_image, {"atol": 0.0}, "atol"),
        (ambiguous_image, {"start": images(0, 2)}, "start.shape"),
    ],
)
def test_bad_input_is_named(function, options, message):
    defaults = (
        {"image_a": images(0), "image_b": images(1)}
        if function is morph
        else {"images": images(0), "classes": (0, 1)}
    )
    with pytest.raises(ValueError, match=message):
        function(network(), **defaults | options)
