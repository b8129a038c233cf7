"""Figures show what the arrays say, for few and many classes, and in both themes."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.image import imread
from matplotlib.patches import Circle

from hullgeo import _plane, plots

RNG = np.random.default_rng(0)
NAMES = ["cat", "dog & co", "<b>"]
VALUES, CORRECT = RNG.uniform(0.01, 0.3, size=80), RNG.uniform(size=80) < 0.9
CLASSES = RNG.integers(0, 3, size=80)


def plane_data():
    logits, slopes = np.zeros(3), np.array([[1.0, -1, 0], [0, 0, 1]])
    view = np.array([[-1.0, -1.0], [1.0, 1.0]])
    vertices, starts, classes = _plane.cell_polygons(logits, slopes, view)
    return {
        "anchors": np.array([0, 1, 2]), "corners": np.array([[0.5, 0], [-0.5, 0], [0, 0.6]]),
        "anchor_images": np.linspace(0, 1, 192).reshape(3, 8, 8, 1), "view": view,
        "polygon_vertices": vertices, "polygon_starts": starts, "polygon_classes": classes,
        "near_rows": np.array([3, 4]), "near_coordinates": np.array([[0.2, 0.1], [-0.3, 0.2]]),
        "near_off_plane": np.array([0.5, 0.1]),
    }  # fmt: skip


DRAWINGS = {
    "verdicts": lambda theme: plots.verdicts([3, 0, 1], theme),
    "distances": lambda theme: plots.distances(VALUES, CORRECT, "distance", theme),
    "one_distance": lambda theme: plots.distances(np.zeros(1), np.ones(1, bool), "zero", theme),
    "landscape": lambda theme: plots.landscape(VALUES, VALUES, CLASSES, CORRECT, NAMES, theme),
    "many_classes": lambda theme: plots.landscape(
        VALUES, VALUES, CLASSES, CORRECT, [str(i) for i in range(40)], theme
    ),
    "matrix": lambda theme: plots.matrix(
        np.array([[1.0, 2, np.nan], [0, np.inf, 3], [4, 5, 6]]), NAMES, "rows", "columns",
        lambda value: f"{value:g}", theme, mistakes=True,
    ),
    "large_matrix": lambda theme: plots.matrix(
        np.eye(100), [str(i) for i in range(100)], "rows", "columns", str, theme
    ),
    "spectrum": lambda theme: plots.spectrum(np.array([0.7, 0.2, 0.1]), [(2, "two")], theme),
    "activity": lambda theme: plots.activity(np.array([0.0, 1.0, 0.5]), theme),
    "plane": lambda theme: plots.plane(
        plane_data(), np.eye(5, dtype=bool), CLASSES, VALUES, NAMES, (0.0, 1.0), theme
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_draws_in_both_themes(name):
    images = plots.render(DRAWINGS[name])
    light, dark = (base64.b64decode(images[theme]).decode() for theme in ("light", "dark"))
    for svg in (light, dark):
        assert svg.lstrip().startswith("<?xml")
        assert "</svg>" in svg
    assert plots.LIGHT.ink in light or plots.LIGHT.muted in light or name == "verdicts"
    assert plots.LIGHT.ink not in dark
    assert images == plots.render(DRAWINGS[name]), "the same data give the same bytes"


@pytest.mark.parametrize("name", DRAWINGS)
def test_nothing_leaves_the_figure(name):
    figure = DRAWINGS[name](plots.LIGHT)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        extent = axes.get_tightbbox(canvas.get_renderer())
        assert extent.x0 >= -1
        assert extent.y0 >= -1
        assert extent.x1 <= figure.bbox.x1 + 1
        assert extent.y1 <= figure.bbox.y1 + 1


def test_histogram_counts_every_image():
    figure = plots.distances(VALUES, CORRECT, "distance", plots.LIGHT)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(heights) == len(VALUES)


def test_plane_draws_the_cells_and_discs_of_the_data():
    data = plane_data()
    outside = np.zeros((5, 5), bool)
    axes = plots.plane(data, outside, CLASSES, VALUES, NAMES, (0.0, 1.0), plots.LIGHT).axes[0]
    (cells,) = (item for item in axes.collections if isinstance(item, PolyCollection))
    pieces = np.split(data["polygon_vertices"], data["polygon_starts"][1:-1])
    for path, piece in zip(cells.get_paths(), pieces, strict=True):
        np.testing.assert_allclose(path.vertices[:-1], piece)
    radii = [patch.radius for patch in axes.patches if isinstance(patch, Circle)]
    np.testing.assert_allclose(radii, VALUES[:3])


@pytest.mark.parametrize("count", [2, 10, 11, 100])
def test_class_colors_differ(count):
    found = plots.class_colors(count)
    assert len(set(found)) == count
    assert all(colors.is_color_like(color) for color in found)
    assert plots.class_colors(10)[: min(count, 10)] == found[:10] or count > 10


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_picture_keeps_pixels(channels):
    image = RNG.integers(0, 256, size=(4, 5, channels)) / 255.0
    decoded = imread(io.BytesIO(base64.b64decode(plots.picture(2 * image - 1, (-1.0, 1.0)))))
    assert decoded.shape[:2] == (96, 120)
    expected = image if channels == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    np.testing.assert_allclose(decoded[::24, ::24, :3], expected, atol=1 / 255)


def test_difference_is_red_where_brighter():
    before, after = np.full((2, 1, 1), 0.5), np.array([[[0.9]], [[0.1]]])
    decoded = imread(io.BytesIO(base64.b64decode(plots.difference_picture(before, after, 0.4))))
    top, bottom = decoded[0, 0], decoded[-1, 0]
    assert top[0] > top[2]
    assert bottom[2] > bottom[0]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"), (0.5, "50"), (0.98333, "98"), (0.0123, "1.2"), (1.0, "100"), (2.5, "250"),
        (0.9999, "99.99"), (3.4e-6, "0.00034"), (3.4e-8, "3\u00a0\u00d7\u00a010⁻⁶"),
        (-0.123, "-12"), (np.inf, "inf"),
    ],
)  # fmt: skip
def test_percent(share, text):
    assert re.sub(r"\u00a0%$", "", plots.percent(share)) == text
