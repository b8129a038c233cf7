"""Stages and sections about images, on a small network: right numbers, told with what is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hullgeo
from hullgeo import Status, sections_pixels, stages_pixels
from hullgeo.staging import Inputs, in_blocks

pytestmark = pytest.mark.slow  # minutes of compiling

NAMES = ["cat", "dog", "bird"]
COUNT = 12


def small_features(weights, images):
    flat = images.reshape(*images.shape[:-3], -1)
    return jax.nn.softplus(jnp.matmul(flat, weights, precision="highest"))


def shifted_relu(weights, images):
    flat = images.reshape(*images.shape[:-3], -1)
    return jax.nn.relu(jnp.matmul(flat, weights, precision="highest") - 0.2)


def far_shifted_relu(weights, images):
    return shifted_relu(weights, images) * 0.0


def example():
    """A network, images, and the stages that those of images read."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    features = jax.tree_util.Partial(small_features, weights)
    kernel = rng.normal(size=(4, 3)).astype(np.float32)
    images = rng.uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
    phi = np.asarray(features(images))
    head = hullgeo.LinearHead(kernel, -phi.mean(0) @ kernel)
    predicted = np.asarray(head(phi)).argmax(axis=1)
    labels = np.where(np.arange(COUNT) == 3, (predicted + 1) % 3, predicted)
    return {
        "network": {"classifier": hullgeo.Classifier(features, head)},
        "head": head._asdict(),
        "test": {"images": images, "labels": labels},
        "features": {"test": phi, "train": phi},
        "accuracy": {"test_predicted": predicted},
        "boundary": {"test_distance": np.sort(rng.uniform(size=COUNT))},
    }


def inputs(data, **counts):
    options = {
        "bounds": (0.0, 1.0), "inversion_steps": 30,
        "num_flips": 6, "num_inversions": 3, "num_morphs": 2, "num_ties": 3,
    }  # fmt: skip
    return Inputs(data, options | counts, in_blocks, 8, None, False)


def about(data, **stages):
    options = {"bounds": [0.0, 1.0]}
    return {
        "about": {"class_names": NAMES, "options": options},
        "statistics": {"diameter_lower": 1.0},
        **data,
        **stages,
    }


@pytest.fixture(scope="module")
def data():
    return example()


def words(section):
    return " ".join(
        [section.lead, *section.findings, *(b.seen + b.certain for b in section.blocks)]
    )


def assert_told(section, number_of_blocks):
    assert len(section.blocks) == number_of_blocks
    assert len(section.certificates) == 1
    assert "nan" not in words(section)
    assert all(block.seen.endswith(".") and block.certain.endswith(".") for block in section.blocks)


def test_flips_and_the_robustness_curve(data):
    found = stages_pixels.flips(inputs(data))
    classifier, labels = data["network"]["classifier"], data["test"]["labels"][found["rows"]]
    predicted = np.asarray(classifier(found["before"])).argmax(-1)
    wrong = predicted != labels
    assert (found["distance"][wrong] == 0).all()
    assert (found["distance"][~wrong] > 0).all()
    assert (np.asarray(classifier(found["image"])).argmax(-1) != labels).all()
    assert (found["few_num_gradients"] < found["num_gradients"]).all()
    section = sections_pixels.flips(about(data, flips=found))
    assert_told(section, 2)
    assert section.summary["num_right"] == (~wrong).sum()
    assert section.summary["num_flipped"] == (~wrong).sum()
    expected = np.median(found["distance"][~wrong])
    assert section.summary["median_distance"] == pytest.approx(expected)
    distance = np.where(wrong, 0, np.inf)
    none = found | {"distance": distance, "few_distance": distance}
    none["status"] = np.full(6, Status.STALLED)
    section = sections_pixels.flips(about(data, flips=none))
    assert_told(section, 1)
    assert section.certificates[0].open == "6"


def test_inversion_targets_are_nearest_boundary_points(data):
    found = stages_pixels.inversion(inputs(data))
    head, rows = data["network"]["classifier"].head, np.arange(3)
    logits = np.asarray(head(found["target"]))
    gap = logits[rows, found["label"]] - logits[rows, found["rival"]]
    np.testing.assert_allclose(gap, 0, atol=1e-4)
    phi = data["features"]["test"][found["rows"]]
    distance = np.linalg.norm(found["target"] - phi, axis=1)
    np.testing.assert_allclose(distance, found["feature_distance"], rtol=1e-3)
    exact = np.asarray(hullgeo.boundary_distance(phi, head).distance)
    assert (distance >= exact * (1 - 1e-4)).all()  # which may leave the features' range
    reached = found["status"] == Status.CONVERGED
    assert reached.any()
    np.testing.assert_allclose(found["gap_closed"][reached], 1, atol=0.05)
    section = sections_pixels.inversion(about(data, inversion=found))
    assert_told(section, 1)
    assert section.summary["num_matched"] == reached.sum()


def test_units_that_are_off_stay_off_in_targets(data):
    weights = data["network"]["classifier"].features.args[0]
    features = jax.tree_util.Partial(shifted_relu, weights)
    phi = np.asarray(features(data["test"]["images"]))
    assert (phi == 0).any(axis=1).any()
    classifier = hullgeo.Classifier(features, data["network"]["classifier"].head)
    predicted = np.asarray(classifier(data["test"]["images"])).argmax(axis=1)
    changed = {
        "network": {"classifier": classifier},
        "features": {"test": phi, "train": phi},
        "accuracy": {"test_predicted": predicted},
        "test": {"images": data["test"]["images"], "labels": predicted},
    }
    found = stages_pixels.inversion(inputs(data | changed, num_inversions=6))
    start = phi[found["rows"]]
    assert (found["target"][start == 0] == 0).all()
    np.testing.assert_array_equal(found["num_off"], (start == 0).sum(axis=1))
    assert (found["feature_distance"] >= found["nearest_distance"] * (1 - 1e-6)).all()
    section = sections_pixels.inversion(about(data | changed, inversion=found))
    assert_told(section, 1)
    assert "off in its target" in section.blocks[0].seen


def test_where_all_units_are_off_the_nearest_boundary_point_is_the_target(data):
    weights = data["network"]["classifier"].features.args[0]
    features = jax.tree_util.Partial(far_shifted_relu, weights)
    images = data["test"]["images"]
    phi = np.asarray(features(images))
    assert (phi == 0).all()
    kernel = data["network"]["classifier"].head.kernel
    classifier = hullgeo.Classifier(features, hullgeo.LinearHead(kernel, np.float32([0.3, 0.1, 0])))
    predicted = np.zeros(len(images), int)
    changed = {
        "network": {"classifier": classifier},
        "features": {"test": phi, "train": phi},
        "accuracy": {"test_predicted": predicted},
        "test": {"images": images, "labels": predicted},
    }
    found = stages_pixels.inversion(inputs(data | changed))
    assert (found["num_off"] == 0).all()
    assert np.isfinite(found["target"]).all()
    np.testing.assert_array_equal(found["feature_distance"], found["nearest_distance"])
    assert (found["num_dead"] > 0).all()
    section = sections_pixels.inversion(about(data | changed, inversion=found))
    assert_told(section, 1)
    assert "off in its target" not in section.blocks[0].seen


def test_morphs_join_images_of_different_classes(data):
    found = stages_pixels.morphs(inputs(data))
    predicted, pairs = data["accuracy"]["test_predicted"], found["pairs"]
    assert (predicted[pairs[:, 0]] != predicted[pairs[:, 1]]).all()
    assert 3 not in pairs  # classified wrongly
    for name in ("images", "blend_images"):
        ends = found[name][:, [0, -1]]
        np.testing.assert_array_equal(ends, data["test"]["images"][pairs])
    section = sections_pixels.morphs(about(data, morphs=found))
    assert_told(section, 1)
    inner = found["residual"][:, 1:-1]
    assert section.summary["num_reached"] == (inner <= 1e-2).sum()
    assert section.summary["worst_residual"] == pytest.approx(inner.max())


def test_ties_of_more_classes_are_farther(data):
    found = stages_pixels.ties(inputs(data))
    assert found["classes"].shape == (3, 3)
    for number in (2, 3):
        logits = np.asarray(data["network"]["classifier"](found[f"tie{number}_image"]))
        tied = np.take_along_axis(logits, found["classes"][:, :number], axis=1)
        reached = found[f"tie{number}_status"] == Status.CONVERGED
        assert reached.any()
        assert (np.ptp(tied, axis=1)[reached] <= 2e-3).all()
    both = found["tie3_status"] == Status.CONVERGED
    assert (found["tie2_distance"][both] <= found["tie3_distance"][both] * (1 + 1e-5)).all()
    section = sections_pixels.ties(about(data, ties=found))
    assert_told(section, 1)
    assert section.summary["num_tied"][1] == both.sum()
    none = found | {f"tie{k}_status": np.full(3, Status.STALLED) for k in (2, 3)}
    section = sections_pixels.ties(about(data, ties=none))
    assert_told(section, 1)
    assert section.certificates[0].open == "6"


def test_the_plane_of_pixels_is_the_networks(data):
    anchors = np.array([0, 5, 9])
    data = data | {"plane": {"anchors": anchors, "anchor_images": data["test"]["images"][anchors]}}
    found = stages_pixels.pixel_plane(inputs(data))
    images = data["test"]["images"][anchors].astype(np.float64)
    (first, second), size = found["view"], len(found["classes"])
    places = np.linspace(first, second, size)  # (x, y) of columns and rows
    weights = np.linalg.inv(np.column_stack([found["corners"], np.ones(3)]))
    for row, column in ((0, 0), (70, 180), (size // 2, size // 2), (size - 1, 3)):
        mixture = np.array([places[column, 0], places[row, 1], 1]) @ weights
        image = np.einsum("i,i...->...", mixture, images)
        logits = np.asarray(data["network"]["classifier"](image[None].astype(np.float32)))[0]
        assert logits.max() - logits[found["classes"][row, column]] <= 1e-4
        assert found["within"][row, column] == (image.min() >= 0 and image.max() <= 1)
    figure = sections_pixels.pixel_plane(about(data, pixel_plane=found))
    share = np.mean(found["classes"][found["within"]] == found["corner_classes"][0])
    assert f"“{NAMES[found['corner_classes'][0]]}” {100 * share:.2g}" in figure.seen
    assert f"{int(found['num_evaluations']):,} of {size**2:,} points" in figure.certain


@pytest.mark.parametrize("name", ["flips", "inversion", "morphs", "ties"])
def test_nothing_asked_for_is_told(data, name):
    counts = dict.fromkeys(("num_flips", "num_inversions", "num_morphs", "num_ties"), 0)
    found = getattr(stages_pixels, name)(inputs(data, **counts))
    section = getattr(sections_pixels, name)(about(data, **{name: found}))
    assert not section.blocks
    assert section.lead.startswith("No ")
