"""Cells, ties and regions of a small head: as stages, as sentences and as figures."""

import numpy as np
import pytest
import scipy.optimize

from hullgeo import (
    LinearHead,
    Membership,
    Status,
    boundary_distance,
    hull_to_hull,
    plots,
    plots_boundaries,
)
from hullgeo import sections_boundaries as sections
from hullgeo import stages_boundaries as stages
from hullgeo.staging import Inputs, apply_padded, join
from hullgeo.telling import Figure

pytestmark = pytest.mark.slow  # minutes of compiling

RNG = np.random.default_rng(0)
NAMES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def data():
    """Three classes in three dimensions, and what earlier stages would have saved."""
    kernel = np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]], np.float32)
    head = {"kernel": kernel, "bias": np.zeros(3, np.float32)}
    train = np.abs(RNG.normal(0.2, 0.6, size=(40, 3))).astype(np.float32)
    test = np.abs(RNG.normal(0.2, 0.6, size=(12, 3))).astype(np.float32)
    predicted = (train @ kernel).argmax(axis=1).astype(np.int32)
    near = boundary_distance(test, LinearHead(**head))
    given = {
        "head": head,
        "features": {"train": train, "test": test},
        "statistics": {
            "nonnegative": True,
            "mean": train.mean(axis=0),
            "diameter_lower": float(np.ptp(train, axis=0).max()),
        },
        "accuracy": {"train_predicted": predicted},
        "boundary": {
            "test_distance": np.asarray(near.distance),
            "test_rival": np.asarray(near.rival),
        },
        "about": {"class_names": NAMES},
        "labels": {"test_labels": (test @ kernel).argmax(axis=1)},
    }

    def chunks(function, rows, size):
        return join([apply_padded(function, rows, size, len(rows))])

    for stage in stages.BOUNDARY_STAGES:
        inputs = Inputs({name: given[name] for name in stage.needs}, {}, chunks, 8, None, False)
        given[stage.name] = stage.compute(inputs)
    return given


def test_cells_of_a_symmetric_head(data):
    found = data["cells"]
    assert found["domains"] == ["space", "orthant", "box", "hull"]
    for name in found["domains"]:
        assert found[f"{name}_nonempty"].all()
        np.testing.assert_array_equal(found[f"{name}_facet"], ~np.eye(3, dtype=bool))
        np.testing.assert_array_equal(found[f"{name}_bounded"], name in ("box", "hull"))


def test_nearest_points_respect_the_sign(data):
    found, test = data["nearest"], data["features"]["test"].astype(np.float64)
    kernel = data["head"]["kernel"].astype(np.float64)
    for row in range(3):
        label, rival = found["label"][row], found["rival"][row]
        normal = kernel[:, rival] - kernel[:, label]
        reference = scipy.optimize.minimize(
            lambda x, row=row: np.sum((x - test[row]) ** 2), test[row], method="SLSQP",
            bounds=[(0, None)] * 3, options={"ftol": 1e-14},
            constraints={"type": "ineq", "fun": lambda x, n=normal: n @ x},
        )  # fmt: skip
        np.testing.assert_allclose(found["distance"][row], np.sqrt(reference.fun), rtol=1e-4)
    assert (found["distance"] >= data["boundary"]["test_distance"]).all()


def test_every_set_of_three_classes_ties(data):
    found = data["tie_map"]
    np.testing.assert_array_equal(found["sets"].sum(axis=1), [2, 2, 2, 3])
    middle = data["statistics"]["mean"].astype(np.float64)
    # The nearest point with three equal coordinates.
    expected = np.linalg.norm(middle - middle.mean())
    np.testing.assert_allclose(found["domain_distance"][3], expected, rtol=1e-5)
    assert (found["box_distance"] >= found["domain_lower"]).all()
    np.testing.assert_array_equal(found["domain_status"], Status.CONVERGED)


def test_many_classes_are_not_mapped(data):
    kernel = np.eye(3, 12, dtype=np.float32)
    many = {**data, "head": {"kernel": kernel, "bias": np.zeros(12, np.float32)}}
    found = stages.tie_map(Inputs(many, {}, lambda *_: {}, 8, None, False))
    assert found["sets"].shape == (0, 12)


def test_regions_and_what_lies_between(data):
    found, train = data["regions"], data["features"]["train"]
    predicted = data["accuracy"]["train_predicted"]
    assert (found["joined"][found["ball"] == Membership.INSIDE] == Membership.INSIDE).all()
    pair = hull_to_hull(train[predicted == 0], train[predicted == 2])
    np.testing.assert_allclose(found["between_distance"][0, 2], pair.distance, rtol=1e-5)
    assert np.isnan(np.diag(found["between_distance"])).all()
    assert (found["between_lower"][0, 1:] > 0).all()


def test_sections_say_what_the_arrays_say(data):
    written = {tell.__name__: tell(data) for tell, _ in sections.BOUNDARY_SECTIONS}
    assert set(written) == {stage.name for stage in stages.BOUNDARY_STAGES}
    for section in written.values():
        assert section.blocks
        for block in section.blocks:
            assert isinstance(block, Figure)
            assert set(block.pictures[0]) == {"light", "dark"}
            assert "nan" not in (block.seen + block.certain).lower()
    inside = int((data["regions"]["joined"] == Membership.INSIDE).sum())
    assert written["regions"].summary["num_inside"]["joined"] == inside
    assert f"{inside} of 12" in written["regions"].blocks[0].seen or inside in (0, 12)
    assert "all 3 pairs" in written["cells"].blocks[0].seen
    assert written["tie_map"].summary["num_sets"] == 4


def test_too_many_classes_for_ties_is_said(data):
    none = {"sets": np.zeros((0, 30), bool), "orthant": True}
    section = sections.tie_map({**data, "tie_map": none})
    assert not section.blocks
    assert "2 to 11 classes" in section.lead


def test_figures_show_what_is_open():
    facet = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    figure = plots_boundaries.adjacency(["one"], [facet], [facet[::-1, ::-1]], NAMES, plots.LIGHT)
    lines = figure.axes[0].get_lines()
    assert sorted(line.get_linestyle() for line in lines) == ["-", ":"]
    sets = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    distance = np.array([0.1, 0.2, np.inf, np.inf])
    figure = plots_boundaries.tie_lattice(
        sets, distance, np.array([True, False, False, False]),
        np.array([True, True, True, False]), plots.LIGHT,
    )  # fmt: skip
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert [label[-1] for label in labels] == ["1"] * 4
    figure = plots_boundaries.coverage(["a", "b"], [3, 0], [1, 0], 10, plots.LIGHT)
    widths = sorted(np.ptp(bar.get_extents().intervalx) for bar in figure.axes[0].patches)
    np.testing.assert_allclose(np.divide(widths, widths[-1]), [0, 0, 0.1, 0.3, 0.6, 1])
