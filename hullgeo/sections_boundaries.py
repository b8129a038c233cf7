"""What an analysis tells of cells, boundaries and regions: from saved data to sentences."""

from functools import partial
from typing import Any

import numpy as np

from hullgeo import plots, plots_boundaries
from hullgeo.plots import percent
from hullgeo.result import Membership, Status
from hullgeo.telling import (
    UNIT,
    Certificate,
    Data,
    Figure,
    Section,
    bracket,
    median,
    of,
    sentence,
    width,
)

_DOMAINS = {
    "space": "all of feature space",
    "orthant": "where no feature is negative",
    "box": "the training range",
    "hull": "the training hull",
}
_IN = {name: where if name == "orthant" else f"in {where}" for name, where in _DOMAINS.items()}


def cells(data: Data) -> Section:
    """Which cells there are in each domain, and which of them share a facet."""
    found, names = data["cells"], data["about"]["class_names"]
    num_classes = len(names)
    total = num_classes * (num_classes - 1) // 2
    pairs = np.triu_indices(num_classes, 1)
    table: dict[str, dict[str, int]] = {}
    for name in found["domains"]:
        facet, status = found[f"{name}_facet"], found[f"{name}_status"]
        table[name] = {
            "nonempty": int(found[f"{name}_nonempty"].sum()),
            "bounded": int((found[f"{name}_bounded"] & found[f"{name}_nonempty"]).sum()),
            "facets": int(facet[pairs].sum()),
            "undecided": int((status[pairs] != Status.CONVERGED).sum()),
        }
    titles = [
        f"{_DOMAINS[name]}\n{row['nonempty']} cells, {row['bounded']} bounded; "
        f"{row['facets']} of {total} meet"
        for name, row in table.items()
    ]
    facets = [found[f"{name}_facet"] for name in table]
    open_pairs = [found[f"{name}_status"] != Status.CONVERGED for name in table]
    drawing = partial(plots_boundaries.adjacency, titles, facets, open_pairs, names)
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, row in table.items():
        alike.setdefault((row["nonempty"], row["bounded"], row["facets"]), []).append(_IN[name])
    told = "; ".join(
        f"{' and '.join(places)} {of(nonempty, num_classes)} cells have points, "
        f"{bounded} of them are bounded and {of(meeting, total)} pairs meet"
        for (nonempty, bounded, meeting), places in alike.items()
    )
    left = sum(row["undecided"] for row in table.values())
    figure = Figure(
        [plots.render(drawing)],
        "Graphs of the classes whose cells share a facet, one for each domain",
        f"A line joins two classes whose cells share a facet, so that one can go from one to the "
        f"other without a third between them: {told}.",
        f"Proved: each line by a point on the facet, clear of all other cells; each missing line "
        f"by multipliers that exclude a common point, rounding included. "
        f"{sentence(of(left, total * len(table), 'pairs'))} are undecided.",
    )
    last = list(table)[-1]
    return Section(
        "cells",
        "Cells",
        "Which classes are neighbours",
        "The last layer cuts feature space into one convex cell per class. Which cells are there, "
        "and which of them touch?",
        [figure],
        [
            f"Within {_DOMAINS[last]}, {of(table[last]['facets'], total, 'pairs of classes')} "
            f"share a facet."
        ],
        [
            Certificate(
                "Cells and common facets",
                f"{of(total * len(table) - left, total * len(table))} pairs, in "
                f"{len(table)} domains",
                "exact up to rounding",
                str(left),
            )
        ],
        {"num_pairs": total, "domains": table},
    )


def nearest(data: Data) -> Section:
    """How much farther boundaries are for features that cannot be negative."""
    found, unit = data["nearest"], data["statistics"]["diameter_lower"]
    upper, lower = bracket(found)
    free = np.asarray(data["boundary"]["test_distance"], np.float64)
    total, proved = len(upper), int((found["status"] == Status.CONVERGED).sum())
    other = int((found["rival"] != data["boundary"]["test_rival"]).sum())
    reachable = np.isfinite(upper)
    wide = float(
        np.max((upper - lower)[reachable] / np.maximum(upper[reachable], 1e-300), initial=0)
    )
    where = "nowhere negative" if found["orthant"] else "of any sign"
    drawing = partial(
        plots_boundaries.curves, [upper / unit, free / unit],
        [f"boundary points {where}", "of any sign"],
        xlabel="distance to the nearest boundary, in hull diameters",
    )  # fmt: skip
    figure = Figure(
        [plots.render(drawing)],
        "Share of the test images within a distance of a boundary, two curves",
        f"Half of the test images lie within {percent(median(upper) / unit, 3)} {UNIT} of the "
        f"nearest boundary point {where}; among points of any sign it is "
        f"{percent(median(free) / unit, 3)}. The sign changes the nearest rival "
        f"of {of(other, total, 'images')}.",
        f"Proved: a bracket of the distance for {of(proved, total, 'images')}, at most "
        f"{width(wide)} wide; rivals that were not solved are proved to be farther.",
    )
    return Section(
        "nearest",
        "Nearest boundary",
        "Boundaries that features can reach",
        "Features after a ReLU are never negative, so the nearest point of a boundary may be out "
        "of their reach. Here is the nearest that is not.",
        [figure],
        certificates=[
            Certificate(
                "Nearest boundary within reach",
                of(proved, total),
                f"{width(wide)} relative",
                str(total - proved),
            )
        ],
        summary={
            "orthant": bool(found["orthant"]),
            "median_distance": median(upper),
            "num_proved": proved,
            "num_other_rival": other,
        },
    )


def tie_map(data: Data) -> Section:
    """Which sets of classes tie at all."""
    found, unit = data["tie_map"], data["statistics"]["diameter_lower"]
    title, total = "Where several classes tie", len(found["sets"])
    if total == 0:
        few = "All sets of classes are looked at where there are 2 to 11 classes."
        return Section("tie_map", "Ties", title, few, [])
    distance = np.asarray(found["domain_distance"], np.float64)
    ties, boxed = np.isfinite(distance), np.isfinite(found["box_distance"])
    decided = _decided(found["domain_status"])
    never = int((~ties & decided).sum())
    whole = found["sets"].sum(axis=1).argmax()
    drawing = partial(plots_boundaries.tie_lattice, found["sets"], distance / unit, boxed, decided)
    near = (
        f" All classes at once tie at a distance of {percent(distance[whole] / unit, 3)} {UNIT}."
        if ties[whole]
        else ""
    )
    where = "among features that are nowhere negative" if found["orthant"] else "in feature space"
    proved = f"Proved: {of(never, total, 'sets')} never tie. " if never else ""
    left = int((~decided).sum() + (~_decided(found["box_status"])).sum())
    figure = Figure(
        [plots.render(drawing)],
        "Every set of classes by its size and the distance of its nearest tie",
        f"A dot is a set of classes, placed at the distance from the mean training feature to the "
        f"nearest point where all of the set tie and no other class exceeds them. "
        f"{sentence(of(int(ties.sum()), total, 'sets'))} tie {where}, and "
        f"{of(int(boxed.sum()), total)} within the range of the training features.{near}",
        f"{proved}Ties are points found, each checked to rounding, and as near as a two-sided "
        f"bracket says. "
        f"{sentence(of(left, 2 * total, 'questions'))} are undecided.",
    )
    return Section(
        "tie_map",
        "Ties",
        title,
        "Where two cells meet, two classes tie; where more meet, so do more classes. Which sets of "
        "classes meet anywhere?",
        [figure],
        certificates=[
            Certificate(
                "Sets of classes that tie",
                of(2 * total - left, 2 * total),
                "exact up to rounding",
                str(left),
            )
        ],
        summary={
            "num_sets": total,
            "num_tied": int(ties.sum()),
            "num_tied_in_box": int(boxed.sum()),
            "num_never": never,
        },
    )


def _decided(status: np.ndarray) -> np.ndarray:
    return (status == Status.CONVERGED) | (status == Status.INFEASIBLE)


def regions(data: Data) -> Section:
    """Regions whose class is certain, and how far those of different classes are apart."""
    found, names = data["regions"], data["about"]["class_names"]
    unit, total = data["statistics"]["diameter_lower"], len(data["regions"]["label"])
    kinds = {"balls": "ball", "class hulls": "hull", "balls joined": "joined"}
    inside = [int((found[kind] == Membership.INSIDE).sum()) for kind in kinds.values()]
    undecided = [int((found[kind] == Membership.UNDECIDED).sum()) for kind in kinds.values()]
    right = found["label"] == data["labels"]["test_labels"]
    held = found["joined"] == Membership.INSIDE
    wrong = int((held & ~right).sum())
    mistakes = f"{wrong} are" if wrong > 1 else "one is" if wrong else "none is"
    drawing = partial(
        plots_boundaries.coverage, [sentence(kind) for kind in kinds], inside, undecided, total
    )
    blocks = [
        Figure(
            [plots.render(drawing)],
            "Share of the test images inside each kind of region of certain class",
            f"{sentence(of(inside[0], total, 'test images'))} lie in a ball around a training "
            f"feature that reaches to its nearest boundary, {of(inside[1], total)} in the hull of "
            f"the training features of one class, and {of(inside[2], total)} in the hull of these "
            f"balls, where the class is certain too. Of the latter, {mistakes} classified "
            f"wrongly: what is certain is the network's class, not the true one.",
            f"Proved, rounding included. {sentence(of(sum(undecided), 3 * total, 'verdicts'))} are "
            f"undecided.",
        )
    ]
    apart: dict[str, Any] = {}
    if np.isfinite(found["between_distance"]).any():
        blocks.append(_between(found, names, unit, apart))
    return Section(
        "regions",
        "Regions",
        "Regions whose class is certain",
        "Cells are convex, so what training features of one class span is certain to be classified "
        "alike. How much of the test set does that cover?",
        blocks,
        [f"The class of {of(inside[2], total, 'test images')} follows from training images alone."],
        [
            Certificate(
                "Regions of certain class",
                of(3 * total - sum(undecided), 3 * total),
                "inside or outside",
                str(sum(undecided)),
            )
        ],
        {
            "num_inside": dict(zip(kinds.values(), inside, strict=True)),
            "num_undecided": dict(zip(kinds.values(), undecided, strict=True)),
            "num_inside_wrong": wrong,
            **apart,
        },
    )


def _between(found: dict[str, Any], names: list[str], unit: float, apart: dict) -> Figure:
    """The heat map of the distances between the hulls of the classes."""
    upper = np.asarray(found["between_distance"], np.float64)
    lower = np.asarray(found["between_lower"], np.float64)
    pairs = np.argwhere(np.triu(np.isfinite(upper), 1))
    total, separate = len(pairs), int((lower[tuple(pairs.T)] > 0).sum())
    meeting = int((found["between_overlap"][tuple(pairs.T)] > 0).sum())
    least = np.unravel_index(int(np.nanargmin(upper)), upper.shape)
    most = np.unravel_index(int(np.nanargmax(upper)), upper.shape)
    wide = float(np.nanmax((upper - lower) / np.where(upper > 0, upper, 1.0)))
    apart.update(num_pairs=total, num_separate=separate, num_meeting=meeting)
    drawing = partial(
        plots.matrix, upper, names, "hull of the training features of class", "hull of class",
        plots_boundaries.in_diameters(unit),
    )  # fmt: skip
    return Figure(
        [plots.render(drawing)],
        "Distances between the hulls of the classes, a table of classes by classes",
        f"The hulls of the training features of two classes, as the network gives them, are apart "
        f"for {of(separate, total, 'pairs')}. Numbers are percent {UNIT} of the hull of all: "
        f"nearest are “{names[least[0]]}” and “{names[least[1]]}” "
        f"({percent(float(upper[least]) / unit, 3)}), farthest “{names[most[0]]}” and "
        f"“{names[most[1]]}” ({percent(float(upper[most]) / unit, 3)}).",
        f"Proved: a hyperplane between the two hulls for each pair that is apart, brackets of the "
        f"distance at most {width(wide)} wide; {of(meeting, total, 'pairs')} share a ball.",
    )


BOUNDARY_SECTIONS = (
    (cells, ("cells",)),
    (nearest, ("nearest", "boundary", "statistics")),
    (tie_map, ("tie_map", "statistics")),
    (regions, ("regions", "statistics")),
)
