"""Figures of an analysis, drawn from its saved arrays alone.

Every function draws one figure, at a width that stays readable on a phone, in the ink of a theme;
`render` turns it into one SVG for light and one for dark surroundings. Classes keep one colour in
all figures (`class_colors`).
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

from hullgeo import _plane

_CLASS_COLORS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#3fa7a1",
    "#9d6cb3", "#d4a91c", "#9d755d", "#ea7d9b", "#7f8793",
)  # fmt: skip


_GRID = np.array([[x, y] for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])
_CIRCLE = np.stack([np.cos(np.arange(48) * np.pi / 24), np.sin(np.arange(48) * np.pi / 24)], axis=1)


class Theme(NamedTuple):
    """The inks of a figure on a light or dark surface."""

    ink: str
    muted: str
    grid: str
    paper: str
    right: str
    wrong: str
    outside: str
    inside: str
    ramp: tuple[str, str]


LIGHT = Theme(
    "#1d2733", "#5f6b7a", "#e3e7ec", "#ffffff", "#3d6690", "#c8364a", "#d58a1f", "#2f8f83",
    ("#f2f5f9", "#27527d"),
)  # fmt: skip
DARK = Theme(
    "#e8ebef", "#9aa6b4", "#333c48", "#1b222b", "#7fb0de", "#ff6f7f", "#e9a33f", "#4fb5a7",
    ("#222b36", "#8cc0f0"),
)  # fmt: skip


def class_colors(num_classes: int) -> list[str]:
    """One colour a class, the same in every figure; ten distinct ones, then a wheel."""
    if num_classes <= len(_CLASS_COLORS):
        return list(_CLASS_COLORS[:num_classes])
    hue = (np.arange(num_classes) * 0.61803398875) % 1.0
    value = np.where(np.arange(num_classes) % 2, 0.85, 0.65)
    wheel = colors.hsv_to_rgb(np.stack([hue, np.full(num_classes, 0.6), value], axis=1))
    return [colors.to_hex(color) for color in wheel]


def render(draw: Callable[[Theme], Figure]) -> dict[str, str]:
    """A figure as base64 SVG for light and dark surroundings.

    Args:
      draw: from a theme to a figure.

    Returns:
      the two images under "light" and "dark".
    """
    images = {}
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        style: dict[Any, Any] = {
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10.5,
            "axes.edgecolor": theme.muted,
            "axes.labelcolor": theme.ink,
            "axes.labelsize": 10.5,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": theme.grid,
            "grid.linewidth": 0.8,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "svg.fonttype": "path",
            "svg.hashsalt": "hullgeo",
            "text.color": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
        }
        with matplotlib.rc_context(style):
            figure = draw(theme)
            buffer = io.BytesIO()
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        images[name] = base64.b64encode(buffer.getvalue()).decode()
    return images


def picture(image: np.ndarray, bounds: tuple[float, float], *, size: int = 96) -> str:
    """One image as base64 PNG, small ones enlarged without smoothing."""
    pixels = _as_rgb(image, bounds)
    pixels = np.repeat(np.repeat(pixels, factor := max(1, size // len(pixels)), 0), factor, 1)
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def difference_picture(before: np.ndarray, after: np.ndarray, scale: float) -> str:
    """The change between two images as base64 PNG: red where brighter, blue where darker."""
    change = np.mean(np.asarray(after, np.float64) - before, axis=-1) / scale
    rgb = matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * np.clip(change, -1, 1))[..., :3]
    return picture(rgb, (0.0, 1.0))


def _as_rgb(image: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    lower, upper = bounds
    pixels = np.clip((np.asarray(image, np.float64) - lower) / (upper - lower), 0.0, 1.0)
    if pixels.shape[-1] != 3:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    return pixels


@ticker.FuncFormatter
def percent_ticks(value: float, position: int | None) -> str:
    """A share as percent, for an axis."""
    return f"{100 * value:.4g}\u00a0%"


def _new(width: float = 4.9, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    return figure, axes


def verdicts(counts: Sequence[int], theme: Theme) -> Figure:
    """One bar: how many images are proved outside, proved inside, undecided."""
    figure, axes = _new(4.9, 0.75)
    axes.set_axis_off()
    left = 0
    parts = (("outside", theme.outside), ("inside", theme.inside), ("undecided", theme.muted))
    for (name, color), count in zip(parts, counts, strict=True):
        axes.barh(0, count, left=left, height=0.8, color=color)
        axes.plot([], [], "s", color=color, label=f"{name}: {count:,}")
        left += count
    axes.set_xlim(0, sum(counts))
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.5)
    return figure


def distances(
    values: np.ndarray, correct: np.ndarray, label: str, theme: Theme, *, bins: int = 32
) -> Figure:
    """Histogram of one distance per image, correct and wrong ones apart, the median marked."""
    figure, axes = _new(4.9, 3.1)
    edges = np.linspace(0.0, float(values.max()) * 1.0001 or 1.0, bins + 1)
    axes.hist(
        [values[correct], values[~correct]],
        bins=edges,  # type: ignore[arg-type]
        stacked=True,
        color=[theme.right, theme.wrong],
        label=[
            f"classified correctly: {correct.sum():,}",
            f"classified wrongly: {(~correct).sum():,}",
        ],
    )
    median = float(np.median(values))
    axes.set_xlim(0, None)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.axvline(median, color=theme.ink, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"median {percent(median)}", (median, 1.0), xycoords=("data", "axes fraction"),
        xytext=(5, -1), textcoords="offset points", va="top",
        path_effects=[withStroke(linewidth=3, foreground=theme.paper)],
    )  # fmt: skip
    axes.xaxis.set_major_formatter(percent_ticks)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("test images")
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2, handlelength=1.0)
    return figure


def landscape(
    hull: np.ndarray,
    boundary: np.ndarray,
    classes: np.ndarray,
    correct: np.ndarray,
    names: Sequence[str],
    theme: Theme,
) -> Figure:
    """Every test image by its distance to the hull and to the nearest boundary; mistakes ringed."""
    figure, axes = _new(4.9, 3.9)
    palette = np.array(class_colors(len(names)))
    order = np.random.default_rng(0).permutation(len(hull))  # no class covers the others
    few = len(hull) <= 3000
    axes.scatter(
        hull[order], boundary[order], s=14 if few else 5, c=palette[classes[order]], alpha=0.85,
        linewidths=0,
    )  # fmt: skip
    axes.scatter(
        hull[~correct], boundary[~correct], s=75 if few else 16, facecolors="none",
        edgecolors=theme.ink, linewidths=1.1 if few else 0.6,
    )  # fmt: skip
    if len(names) <= 12:
        for name, color in zip(names, palette, strict=True):
            axes.scatter([], [], s=34, color=color, label=name)
        columns = max(1, min(len(names), 52 // (4 + max(map(len, names)))))
        figure.legend(loc="outside upper left", ncols=columns, handletextpad=0.0, columnspacing=0.7)
    axes.xaxis.set_major_formatter(percent_ticks)
    axes.yaxis.set_major_formatter(percent_ticks)
    axes.set_xlabel("distance outside the hull, in hull diameters")
    axes.set_ylabel("distance to the boundary")
    axes.set_xlim(-0.02 * max(float(hull.max()), 1e-12), None)
    axes.set_ylim(0, None)
    axes.grid()
    return figure


def matrix(
    values: np.ndarray,
    names: Sequence[str],
    rows: str,
    columns: str,
    text: Callable[[float], str],
    theme: Theme,
    *,
    mistakes: bool = False,
) -> Figure:
    """A table of classes by classes as shades, with its numbers where there is room.

    With `mistakes`, what is off the diagonal stands out.
    """
    size = len(names)
    figure, axes = _new(4.9, 4.4)
    ramp = colors.LinearSegmentedColormap.from_list("ramp", theme.ramp)
    finite = np.where(np.isfinite(values), values, np.nan)
    axes.imshow(finite, cmap=ramp, aspect="auto")
    top = np.nanmax(finite) or 1.0
    shade = np.zeros(values.shape)
    if mistakes:
        wrong = np.where(np.eye(size, dtype=bool), 0.0, np.nan_to_num(finite))
        shade = np.where(wrong > 0, 0.25 + 0.75 * wrong / (wrong.max() or 1.0), 0.0)
        red = np.broadcast_to(colors.to_rgb(theme.wrong), (*shade.shape, 3))
        axes.imshow(np.concatenate([red, shade[..., None]], axis=-1), aspect="auto")
    if size <= 12:
        for row, column in np.ndindex(values.shape):
            value = float(values[row, column])
            if np.isfinite(value) and text(value):
                light = theme.paper == LIGHT.paper
                dark = (value / top > 0.55) == light
                if mistakes and row != column:
                    dark = shade[row, column] > 0.6 or not light
                axes.text(
                    column, row, text(value), ha="center", va="center", fontsize=9,
                    color="white" if dark else "#10161d",
                )  # fmt: skip
        axes.set_xticks(range(size), names, rotation=0 if max(map(len, names)) < 4 else 45,
                        ha="center" if max(map(len, names)) < 4 else "right")  # fmt: skip
        axes.set_yticks(range(size), names)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set_ylabel(rows)
    axes.set_xlabel(columns)
    return figure


def spectrum(share: np.ndarray, marks: Sequence[tuple[int, str]], theme: Theme) -> Figure:
    """Share of the variance in the first principal axes, with the marked numbers of axes."""
    figure, axes = _new(4.9, 3.1)
    total = np.concatenate([[0.0], np.cumsum(share)])
    axes.fill_between(np.arange(len(total)), total, color=theme.right, alpha=0.15, linewidth=0)
    axes.plot(np.arange(len(total)), total, color=theme.right, linewidth=1.8)
    for level, (count, text) in zip((0.5, 0.32), marks, strict=False):
        axes.plot([count, count, 0], [0, total[count], total[count]], color=theme.muted,
                  linewidth=0.8, linestyle=(0, (3, 2)))  # fmt: skip
        axes.plot(count, total[count], "o", color=theme.ink, markersize=5)
        right = count < 0.7 * len(share)
        axes.annotate(
            text, (count, level), xytext=(6 if right else -6, 0), textcoords="offset points",
            ha="left" if right else "right", va="center",
            path_effects=[withStroke(linewidth=3, foreground=theme.paper)],
        )  # fmt: skip
    axes.set_xlim(0, len(share))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(percent_ticks)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.set_xlabel("principal axes")
    axes.set_ylabel("share of the variance")
    axes.grid()
    return figure


def activity(share: np.ndarray, theme: Theme) -> Figure:
    """How often each unit of the last hidden layer is active, sorted."""
    figure, axes = _new(4.9, 3.1)
    ordered = np.sort(share)[::-1]
    axes.bar(np.arange(1, len(share) + 1), ordered, width=0.86, color=theme.right)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0.3, len(share) + 0.7)
    axes.yaxis.set_major_formatter(percent_ticks)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.set_xlabel("units, most often active first")
    axes.set_ylabel("active on")
    axes.grid(axis="y")
    return figure


def plane(
    data: dict[str, Any],
    inside: np.ndarray,
    predicted: np.ndarray,
    radius: np.ndarray,
    names: Sequence[str],
    bounds: tuple[float, float],
    theme: Theme,
) -> Figure:
    """The exact class cells on a plane through three images, and the images near it.

    Hatched where points of a grid over the view, `inside`, are in the training features' hull.
    """
    figure, axes = _new(4.9, 4.9)
    palette = class_colors(len(names))
    (left, bottom), (right, _) = data["view"]
    pieces = np.split(data["polygon_vertices"], data["polygon_starts"][1:-1])
    faces = [colors.to_rgba(palette[label], 0.3) for label in data["polygon_classes"]]
    axes.add_collection(
        PolyCollection(pieces, facecolors=faces, edgecolors=theme.ink, linewidths=0.9)
    )
    if inside.any():
        ticks = np.linspace(data["view"][0], data["view"][1], len(inside)).T
        with matplotlib.rc_context({"hatch.linewidth": 0.6, "hatch.color": theme.muted}):
            axes.contourf(*ticks, inside, levels=[0.5, 1.5], colors="none", hatches=["////"])
        axes.contour(*ticks, inside, levels=[0.5], colors=[theme.muted], linewidths=0.9)
    halo = [withStroke(linewidth=3, foreground=theme.paper)]
    span = right - left
    pictures = data["corners"][:, None] + 0.06 * span * _GRID[None]
    discs = data["corners"][:, None] + radius[data["anchors"], None, None] * _CIRCLE[None]
    scale = np.array([left + 0.15 * span, bottom + 0.06 * span]) + 0.12 * span * _GRID * [1, 0.2]
    least = np.concatenate([pictures.reshape(-1, 2), scale])
    taken = np.concatenate([least, discs.reshape(-1, 2), data["near_coordinates"]])
    for piece, label in zip(pieces, data["polygon_classes"], strict=True):
        half = np.array([0.022 * len(names[label]) + 0.01, 0.035]) * span
        spot = _plane.open_spot(piece, taken, half)
        spot = _plane.open_spot(piece, least, half) if spot is None else spot
        if spot is not None:
            axes.text(
                spot[0], spot[1], str(names[label]), ha="center", va="center", fontsize=15,
                fontweight="bold", color=palette[label], path_effects=halo, zorder=4,
            )  # fmt: skip
    order = np.argsort(-data["near_off_plane"], kind="stable")  # the nearest on top
    where, rows, off = (
        data[name][order] for name in ("near_coordinates", "near_rows", "near_off_plane")
    )
    closeness = 1.0 - off / max(float(off.max(initial=0.0)), 1e-300)
    closeness = closeness / max(float(closeness.max(initial=0.0)), 1e-300)
    axes.scatter(
        where[:, 0], where[:, 1], s=8 + 34 * closeness**2, alpha=0.45 + 0.55 * closeness,
        c=[palette[label] for label in predicted[rows]], edgecolors=theme.paper, linewidths=0.4,
        zorder=3,
    )  # fmt: skip
    for anchor, corner, image in zip(
        data["anchors"], data["corners"], data["anchor_images"], strict=True
    ):
        color = palette[predicted[anchor]]
        axes.add_patch(
            Circle(tuple(corner), float(radius[anchor]), fill=False, linewidth=1.3,
                   edgecolor=color, linestyle=(0, (3, 2)), zorder=4)
        )  # fmt: skip
        pin_image(axes, image, corner, color, bounds, theme)
    only_the_view(axes, data["view"])
    bar = _round_length(0.25 * span)
    corner = np.array([left + 0.03 * span, bottom + 0.035 * span])
    axes.plot([corner[0], corner[0] + bar], [corner[1]] * 2, color=theme.ink, linewidth=2.2)
    axes.text(corner[0], corner[1] + 0.012 * span, f"{bar:g} feature units", fontsize=9,
              va="bottom", path_effects=halo)  # fmt: skip
    return figure


def pin_image(
    axes: Axes,
    image: np.ndarray,
    where: np.ndarray,
    color: str,
    bounds: tuple[float, float],
    theme: Theme,
) -> None:
    """An image, framed in the colour of its class, at its place on a plane."""
    zoom = 34.0 / max(image.shape[:2])
    box = AnnotationBbox(
        OffsetImage(_as_rgb(image, bounds), zoom=zoom, interpolation="nearest"),
        tuple(where), frameon=True, pad=0.15,
        bboxprops={"edgecolor": color, "linewidth": 1.8, "facecolor": theme.paper},
    )  # fmt: skip
    box.set_zorder(5)
    axes.add_artist(box)


def only_the_view(axes: Axes, view: np.ndarray) -> None:
    """A square without ticks and spines."""
    (left, bottom), (right, top) = view
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten below a length."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(power * max(step for step in (1, 2, 5) if step * power <= length))


def percent(value: float, digits: int = 2) -> str:
    """A share as percent with a few significant digits, never as an exponent."""
    scaled = 100.0 * value
    if not np.isfinite(scaled):
        return str(scaled)
    if scaled == 0:
        return "0\u00a0%"
    if abs(scaled) < 1e-4:
        return f"{power_of_ten(scaled)}\u00a0%"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(scaled)))))
    while scaled < 100 and float(f"{scaled:.{decimals}f}") >= 100 and decimals < 9:
        decimals += 1  # nothing short of all is called 100 %
    return f"{scaled:.{decimals}f}\u00a0%"


def power_of_ten(value: float) -> str:
    """A positive number as one digit times a power of ten, with a superscript."""
    digit, exponent = f"{value:.0e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digit}\u00a0\u00d7\u00a010{power}"
