"""Figures of cells, ties and regions, drawn from saved arrays alone; see `plots.py`.

Each function draws one figure in the ink of a theme; `plots.render` turns it into pictures.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from hullgeo.plots import Theme, class_colors, percent, percent_ticks

_MOST_NAMED = 24  # nodes of a graph that still have room for names


def adjacency(
    titles: Sequence[str],
    facets: Sequence[np.ndarray],
    open_pairs: Sequence[np.ndarray],
    names: Sequence[str],
    theme: Theme,
) -> Figure:
    """One graph a domain: classes on a circle, a line between two cells that share a facet.

    Args:
      titles: of the domains.
      facets: for each, whether two cells share a facet, `(classes, classes)`.
      open_pairs: for each, the pairs that are undecided, likewise.
      names: of the classes.
      theme: the inks.

    Returns:
      a figure; pairs proved to share none have no line, undecided ones a dotted line.
    """
    columns = 2 if len(titles) > 1 else 1
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.75 * rows), layout="constrained")
    figure.patch.set_alpha(0.0)
    angle = np.pi / 2 - 2 * np.pi * np.arange(len(names)) / len(names)
    place = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    palette = class_colors(len(names))
    width = 1.1 if len(names) <= 12 else 0.5
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for panel in panels:
        panel.set_axis_off()
    for panel, title, facet, undecided in zip(panels, titles, facets, open_pairs, strict=False):
        for one, two in zip(*np.triu_indices(len(names), 1), strict=True):
            if facet[one, two] or undecided[one, two]:
                line, color = ("-", theme.right) if facet[one, two] else (":", theme.muted)
                panel.plot(*place[[one, two]].T, line, color=color, linewidth=width, alpha=0.75)
        panel.scatter(*place.T, s=150 if len(names) <= _MOST_NAMED else 25, c=palette, zorder=3)
        if len(names) <= _MOST_NAMED:
            for name, (x, y) in zip(names, 1.3 * place, strict=True):
                panel.text(x, y, name, ha="center", va="center", fontsize=8, color=theme.ink)
        panel.set(xlim=(-1.6, 1.6), ylim=(-1.5, 1.5), aspect="equal")
        panel.set_title(title, fontsize=8, color=theme.ink)
    return figure


def curves(
    distances: Sequence[np.ndarray], labels: Sequence[str], theme: Theme, *, xlabel: str
) -> Figure:
    """The share of test images within each distance, one curve a kind of distance.

    Args:
      distances: one array a curve; infinite where there is nothing to reach.
      labels: one a curve.
      theme: the inks.
      xlabel: what the distance is.

    Returns:
      a figure.
    """
    figure = Figure(figsize=(4.9, 3.2), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    styles = ((theme.right, "-", 2.6), (theme.outside, "--", 1.6))
    for values, label, (color, line, width) in zip(distances, labels, styles, strict=False):
        ordered = np.sort(values[np.isfinite(values)])
        share = np.arange(1, len(ordered) + 1) / max(len(values), 1)
        axes.step(np.append(0.0, ordered), np.append(0.0, share), line, where="post", color=color,
                  linewidth=width, label=label)  # fmt: skip
    axes.xaxis.set_major_formatter(percent_ticks)
    axes.yaxis.set_major_formatter(percent_ticks)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.set(xlim=(0, None), ylim=(0, 1.02), xlabel=xlabel, ylabel="of the test images")
    axes.grid()
    figure.legend(loc="outside upper left", ncols=2, handlelength=1.6)
    return figure


def tie_lattice(
    sets: np.ndarray,
    distance: np.ndarray,
    in_box: np.ndarray,
    status_ok: np.ndarray,
    theme: Theme,
) -> Figure:
    """One row a size of set: every set by the distance of its nearest tie.

    Args:
      sets: the sets of classes, `(sets, classes)` bool.
      distance: of the nearest tie, infinite where there is none.
      in_box: whether the set also ties within the range of the training features.
      status_ok: whether the set is decided.
      theme: the inks.

    Returns:
      a figure; sets proved never to tie stand in a column of crosses at the right.
    """
    sizes = sets.sum(axis=1)
    rows = np.arange(sizes.min(), sizes.max() + 1)
    figure = Figure(figsize=(4.9, 0.75 + 0.36 * len(rows)), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    ties = np.isfinite(distance)
    never = ~ties & status_ok
    right = 1.08 * (float(distance[ties].max()) if ties.any() else 1.0)
    jitter = np.random.default_rng(0).uniform(-0.28, 0.28, size=len(sets))
    near, far = ties & in_box, ties & ~in_box
    kinds = [
        (near, theme.inside, "o", "tie within the training range"),
        (far, theme.outside, "o", "tie only outside of it"),
        (never, theme.wrong, "x", "proved never to tie"),
        (~ties & ~status_ok, theme.muted, "s", "undecided"),
    ]
    for chosen, color, marker, label in kinds:
        if chosen.any():
            at = np.where(ties, distance, right)[chosen]
            axes.scatter(at, sizes[chosen] + jitter[chosen], s=11, marker=marker, color=color,
                         alpha=0.7, linewidths=1.0 if marker == "x" else 0,
                         label=f"{label}: {chosen.sum():,}")  # fmt: skip
    axes.set_yticks(rows, [f"{size} classes" for size in rows])
    axes.set_ylim(rows[-1] + 0.6, rows[0] - 0.6)
    axes.set_xlim(0, 1.05 * right)
    axes.xaxis.set_major_formatter(percent_ticks)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.set_xlabel("distance of the nearest tie, in hull diameters")
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)
    return figure


def coverage(
    kinds: Sequence[str],
    inside: Sequence[int],
    undecided: Sequence[int],
    total: int,
    theme: Theme,
) -> Figure:
    """One bar a kind of region: the test images proved inside, undecided, proved outside.

    Args:
      kinds: names of the regions.
      inside: images proved inside each.
      undecided: images left open.
      total: images in all.
      theme: the inks.

    Returns:
      a figure.
    """
    figure = Figure(figsize=(4.9, 0.5 + 0.55 * len(kinds)), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    row = np.arange(len(kinds))
    first, second = np.asarray(inside), np.asarray(undecided)
    parts = (
        (first, 0 * first, theme.inside, "proved inside"),
        (second, first, theme.muted, "undecided"),
        (total - first - second, first + second, theme.grid, "proved outside"),
    )
    for size, left, color, label in parts:
        if size.any():
            axes.barh(row, size, left=left, height=0.62, color=color, label=label)
    named = [
        f"{kind}\n{count:,} ({percent(count / total, 3)})"
        for kind, count in zip(kinds, inside, strict=True)
    ]
    axes.set_yticks(row, named)
    axes.invert_yaxis()
    axes.set_xlim(0, total)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.0)
    return figure


def in_diameters(unit: float) -> Callable[[float], str]:
    """Numbers of a table as a share of a length, in percent without its sign."""
    return lambda value: f"{100 * value / unit:.2g}"
