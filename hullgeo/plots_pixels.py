"""Figures of flips, morphs and inversions, drawn from saved arrays alone; see `plots.py`.

Each function draws one figure in the ink of a theme; `plots.render` turns it into pictures.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.ndimage import distance_transform_edt

from hullgeo.plots import Theme, class_colors, only_the_view, pin_image

_CELL = 1.05  # inches per picture


def flips(
    images: np.ndarray,
    flipped: np.ndarray,
    distance: np.ndarray,
    label: np.ndarray,
    rival: np.ndarray,
    class_names: Sequence[str],
    theme: Theme,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """One column an image: it, its nearest flip, and the amplified difference between them.

    Args:
      images: originals, `(n, height, width, channels)`.
      flipped: nearest flips found, likewise.
      distance: Euclidean distances, `(n,)`; infinite where no flip was found.
      label: classes left, `(n,)`.
      rival: classes reached, `(n,)`.
      class_names: one a class.
      theme: the inks.
      bounds: smallest and largest pixel value.

    Returns:
      a figure; each difference is amplified to the full range, its factor written below.
    """
    figure, axes, size = _grid(3, len(images), theme)
    for column, change in enumerate(flipped.astype(np.float64) - images):
        largest = float(np.abs(change).max())
        factor = (bounds[1] - bounds[0]) / 2 / largest if largest > 0 else 1.0
        middle = (bounds[0] + bounds[1]) / 2
        _show(axes[0][column], images[column], bounds)
        _show(axes[1][column], flipped[column], bounds)
        _show(axes[2][column], middle + factor * change, bounds)
        axes[0][column].set_title(class_names[label[column]], fontsize=size, color=theme.ink)
        found = np.isfinite(distance[column])
        title = class_names[rival[column]] if found else "no flip found"
        axes[1][column].set_title(title, fontsize=size, color=theme.wrong)
        below = f"{distance[column]:.3g}\n\u00d7{factor:.3g}" if found else ""
        axes[2][column].set_xlabel(below, fontsize=size, color=theme.muted)
    for row, name in enumerate(("image", "nearest flip", "difference")):
        axes[row][0].set_ylabel(name, fontsize=size, color=theme.muted)
    return figure


def morphs(
    strips: np.ndarray,
    labels: np.ndarray,
    residual: np.ndarray,
    class_names: Sequence[str],
    theme: Theme,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    rows: Sequence[str] = (),
) -> Figure:
    """One row a morph: its frames, their classes, and how far each is from its target features.

    Args:
      strips: frames, `(rows, num_frames, height, width, channels)`.
      labels: class of each frame, `(rows, num_frames)`.
      residual: relative residual of each frame's features, `(rows, num_frames)`.
      class_names: one a class.
      theme: the inks.
      bounds: smallest and largest pixel value.
      rows: what each strip is, written at its left; nothing if empty.

    Returns:
      a figure; a class in the colour of change differs from the frame before.
    """
    figure, axes, size = _grid(strips.shape[0], strips.shape[1], theme)
    for row, frames in enumerate(strips):
        for column, frame in enumerate(frames):
            _show(axes[row][column], frame, bounds)
            changed = column > 0 and labels[row, column] != labels[row, column - 1]
            axes[row][column].set_title(
                class_names[labels[row, column]],
                fontsize=size,
                color=theme.wrong if changed else theme.ink,
            )
            axes[row][column].set_xlabel(
                f"{100 * residual[row, column]:.2g}\u00a0%", fontsize=size, color=theme.muted
            )
    for row, name in enumerate(rows):
        axes[row][0].set_ylabel(name, fontsize=size, color=theme.muted)
    return figure


def inversions(
    before: np.ndarray,
    after: np.ndarray,
    residual: np.ndarray,
    pixel_distance: np.ndarray,
    theme: Theme,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """One column an image: before, after its features were moved, and the numbers.

    Args:
      before: starts, `(n, height, width, channels)`.
      after: images whose features were moved to their targets, likewise.
      residual: relative residuals, `(n,)`.
      pixel_distance: Euclidean distances, `(n,)`.
      theme: the inks.
      bounds: smallest and largest pixel value.

    Returns:
      a figure.
    """
    figure, axes, size = _grid(2, len(before), theme)
    for column in range(len(before)):
        _show(axes[0][column], before[column], bounds)
        _show(axes[1][column], after[column], bounds)
        text = f"{pixel_distance[column]:.3g}\n{100 * residual[column]:.2g}\u00a0%"
        axes[1][column].set_xlabel(text, fontsize=size, color=theme.muted)
    axes[0][0].set_ylabel("before", fontsize=size, color=theme.muted)
    axes[1][0].set_ylabel("after", fontsize=size, color=theme.muted)
    return figure


def ties(
    before: np.ndarray,
    after: np.ndarray,
    classes: np.ndarray,
    distance: np.ndarray,
    tied: np.ndarray,
    class_names: Sequence[str],
    theme: Theme,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """One row an image: it, and the images near it at which 2, 3, ... of its classes tie.

    Args:
      before: originals, `(n, height, width, channels)`.
      after: images with tied classes, `(n, ties, height, width, channels)`.
      classes: likeliest classes first, `(n, ties + 1)`; column i ties the first i + 2.
      distance: Euclidean distances, `(n, ties)`.
      tied: where the tie was reached, `(n, ties)`.
      class_names: one a class.
      theme: the inks.
      bounds: smallest and largest pixel value.

    Returns:
      a figure.
    """
    figure, axes, size = _grid(len(before), after.shape[1] + 1, theme)
    for row, image in enumerate(before):
        names = [class_names[index] for index in classes[row]]
        _show(axes[row][0], image, bounds)
        axes[row][0].set_title(names[0], fontsize=size, color=theme.ink)
        for column, moved in enumerate(after[row]):
            cell = axes[row][column + 1]
            _show(cell, moved, bounds)
            cell.set_title(f"= {names[column + 1]}", fontsize=size, color=theme.wrong)
            reached = tied[row, column]
            cell.set_xlabel(
                f"{distance[row, column]:.3g}" if reached else "not reached",
                fontsize=size,
                color=theme.muted,
            )
    return figure


def robustness(distances: Sequence[np.ndarray], names: Sequence[str], theme: Theme) -> Figure:
    """The share of images not flipped within a distance, one curve a search with its budget.

    Args:
      distances: for each search, distances to the nearest flips found, `(n,)`, infinite without.
      names: of the searches, with their budgets.
      theme: the inks.

    Returns:
      a figure. Each curve is an upper bound of the true share, since flips may have been missed.
    """
    figure = Figure(figsize=(4.9, 3.2), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len(names)))
    for values, name, color in zip(distances, names, shades, strict=True):
        ordered = np.sort(values[np.isfinite(values)])
        share = 1 - np.arange(len(ordered) + 1) / len(values)
        axes.step(np.concatenate([[0], ordered]), share, where="post", label=name, color=color)
    axes.set_xlabel("distance to the nearest flip found")
    axes.set_ylabel("share of images not flipped")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.grid(color=theme.grid)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8)
    return figure


def plane(
    data: dict[str, np.ndarray],
    images: np.ndarray,
    class_names: Sequence[str],
    theme: Theme,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Classes on a plane through three images, pale where pixels would leave their bounds.

    Args:
      data: `classes` and `within`, `(rows, columns)` over the square `view`, `(2, 2)`; the
        coordinates of the images, `corners`, `(3, 2)`, and their classes, `corner_classes`.
      images: the three, `(3, height, width, channels)`.
      class_names: one a class.
      theme: the inks.
      bounds: smallest and largest pixel value.

    Returns:
      a figure.
    """
    figure = Figure(figsize=(4.9, 4.9), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    palette = class_colors(len(class_names))
    classes, within = data["classes"], data["within"]
    (left, bottom), (right, top) = view = data["view"]
    faces = np.array([colors.to_rgb(color) for color in palette])[classes]
    faces = np.concatenate([faces, np.where(within, 0.45, 0.12)[..., None]], axis=-1)
    half = (right - left) / (len(classes) - 1) / 2  # the grid reaches from border to border
    extent = (left - half, right + half, bottom - half, top + half)
    axes.imshow(faces, origin="lower", extent=extent, interpolation="nearest")
    ticks = [np.linspace(low, high, size) for (low, high), size in zip(view.T, classes.shape[::-1],
                                                                       strict=True)]  # fmt: skip
    halo = [withStroke(linewidth=3, foreground=theme.paper)]
    free = np.ones(classes.shape, bool)
    reach = 0.07 * (right - left)  # of a pinned image
    for corner in data["corners"]:
        near = [np.abs(axis - place) < reach for axis, place in zip(ticks, corner, strict=True)]
        free &= ~(near[1][:, None] & near[0][None])
    for label in np.unique(classes):
        axes.contour(*ticks, classes == label, levels=[0.5], colors=[theme.ink], linewidths=0.7)
        name = str(class_names[label])
        half = np.array([0.035, 0.022 * len(name) + 0.01]) * len(classes)  # of the text, in cells
        own = (classes == label) & free
        # How many times its size a name may have: where pixels keep their bounds, if it fits there.
        room = [
            np.asarray(distance_transform_edt(np.pad(place, 1), 1 / half))
            for place in (own & within, own)
        ]
        roomy = room[0] if room[0].max() >= 1 else room[1]
        row, column = np.unravel_index(roomy.argmax(), roomy.shape)
        if roomy.max() > 0.4:
            axes.text(
                ticks[0][column - 1], ticks[1][row - 1], name, ha="center", va="center",
                fontsize=15, fontweight="bold", color=palette[label], path_effects=halo, zorder=4,
            )  # fmt: skip
    for image, corner, label in zip(images, data["corners"], data["corner_classes"], strict=True):
        pin_image(axes, image, corner, palette[label], bounds, theme)
    only_the_view(axes, view)
    return figure


def _grid(rows: int, columns: int, theme: Theme) -> tuple[Figure, np.ndarray, float]:
    """Cells for pictures, and a size of text that stays legible where many columns are shrunk."""
    figure = Figure(figsize=(_CELL * columns + 0.3, _CELL * rows + 0.5), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots(rows, columns, squeeze=False)
    for cell in axes.flat:
        cell.set_xticks([])
        cell.set_yticks([])
        for spine in cell.spines.values():
            spine.set_color(theme.grid)
    return figure, axes, min(12, max(8, 1.6 * columns))


def _show(axes: Axes, image: np.ndarray, bounds: tuple[float, float]) -> None:
    pixels = (np.asarray(image, np.float64) - bounds[0]) / (bounds[1] - bounds[0])
    pixels = np.clip(np.nan_to_num(pixels), 0, 1)
    if pixels.shape[-1] != 3:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    axes.imshow(pixels, interpolation="nearest")
