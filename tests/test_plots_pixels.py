"""Figures of flips, morphs and inversions are drawn from arrays, also from incomplete ones."""

import numpy as np
import pytest

from hullgeo import plots, plots_pixels

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(3, 6, 5, 1))
NAMES = ["a", "b", "c"]
CASES = {
    "flips": lambda theme: plots_pixels.flips(
        IMAGES, IMAGES[::-1], np.array([0.5, np.inf, 1.0]), np.arange(3), np.arange(3)[::-1],
        NAMES, theme,
    ),
    "morphs": lambda theme: plots_pixels.morphs(
        RNG.uniform(size=(2, 4, 6, 5, 3)), np.zeros((2, 4), int), np.zeros((2, 4)), NAMES, theme
    ),
    "inversions": lambda theme: plots_pixels.inversions(
        IMAGES, IMAGES, np.full(3, 1e-3), np.array([0.1, np.nan, 1.0]), theme
    ),
    "ties": lambda theme: plots_pixels.ties(
        IMAGES, np.stack([IMAGES, IMAGES], axis=1), np.tile(np.arange(3), (3, 1)),
        np.full((3, 2), 0.5), np.array([[True, False]] * 3), NAMES, theme,
    ),
    "plane": lambda theme: plots_pixels.plane(
        {
            "classes": np.repeat(np.arange(3), 11)[:, None] + np.zeros((33, 33), int),
            "within": np.tri(33, dtype=bool),
            "view": np.array([[0.0, 0.0], [2.0, 2.0]]),
            "corners": np.array([[0.5, 0.5], [1.5, 0.5], [1.0, 1.5]]),
            "corner_classes": np.array([0, 0, 2]),
        },
        IMAGES, NAMES, theme,
    ),
    "robustness": lambda theme: plots_pixels.robustness(
        [np.array([0.1, 0.2, np.inf]), np.array([0.05, 0.2, 0.3])], ["100", "300"], theme
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_figures_are_drawn(name):
    pictures = plots.render(CASES[name])
    assert set(pictures) == {"light", "dark"}
    assert len(pictures["light"]) > 1000


def test_the_robustness_curve_counts_images():
    figure = CASES["robustness"](plots.LIGHT)
    lines = figure.axes[0].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), [1, 2 / 3, 1 / 3])
    np.testing.assert_allclose(lines[1].get_xdata(), [0, 0.05, 0.2, 0.3])


def test_the_plane_is_drawn_where_its_classes_are():
    axes = CASES["plane"](plots.LIGHT).axes[0]
    assert {text.get_text() for text in axes.texts} == set(NAMES)
    drawn = axes.get_images()[0]
    assert drawn.origin == "lower"
    np.testing.assert_allclose(drawn.get_extent(), [-1 / 32, 2 + 1 / 32, -1 / 32, 2 + 1 / 32])
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert height["a"] < 2 / 3 < height["b"] < 4 / 3 < height["c"]
