"""What an analysis tells: one section per subject, from saved data to sentences and figures.

Findings and certificates of all sections are gathered at the top of the report. To tell of a new
stage, write its section and put it into `SECTIONS` with the stages it reads.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from hullgeo import _plane, plots
from hullgeo.plots import percent
from hullgeo.result import Membership, Status
from hullgeo.sections_boundaries import BOUNDARY_SECTIONS
from hullgeo.sections_pixels import flips, gallery, inversion, morphs, pixel_plane, ties
from hullgeo.telling import (
    UNIT,
    Certificate,
    Data,
    Figure,
    Section,
    bracket,
    listed,
    median,
    of,
    rank_probability,
    sentence,
    width,
    wilson,
)


def accuracy(data: Data) -> Section:
    """How often the network is right, and what it mistakes for what."""
    found, names = data["accuracy"], data["about"]["class_names"]
    total, right = len(data["labels"]["test_labels"]), found["test_correct"]
    low, high = wilson(right, total)
    mistakes = found["confusion"] - np.diag(np.diag(found["confusion"]))
    seen = f"{sentence(of(right, total, 'test images'))} are on the diagonal."
    if mistakes.any():
        true, guess = np.unravel_index(int(np.argmax(mistakes)), mistakes.shape)
        often = int(mistakes[true, guess])
        seen += (
            f" The most frequent mistake is “{names[true]}” taken for “{names[guess]}”, "
            f"{often} times."
            if often > 1
            else f" The {total - right} mistakes are all different."
            if total - right > 1
            else f" The one mistake is “{names[true]}” taken for “{names[guess]}”."
        )
    drawing = partial(
        plots.matrix, found["confusion"], names, "true class", "class given by the network",
        lambda value: f"{value:.0f}" if value else "", mistakes=True,
    )  # fmt: skip
    figure = Figure(
        [plots.render(drawing)],
        "Confusion matrix of the test images",
        seen,
        f"Counts of this test set, exact. On other images of the same source the accuracy lies "
        f"between {percent(low, 3)} and {percent(high, 3)} (95 % Wilson interval).",
    )
    return Section(
        "accuracy",
        "Accuracy",
        "What the network gets right",
        f"The network gives the right class to {percent(found['train_accuracy'], 4)} of its "
        f"training images and to {percent(found['test_accuracy'], 4)} of the test images.",
        [figure],
        [f"The network gives the right class to {of(right, total, 'test images')}."],
        summary={
            "test_accuracy": found["test_accuracy"],
            "train_accuracy": found["train_accuracy"],
            "test_correct": right,
            "num_test": total,
        },
    )


def plane(data: Data) -> Section:
    """A flat cut through the cells of the classes."""
    found, names = data["plane"], data["about"]["class_names"]
    predicted, near = data["accuracy"]["test_predicted"], data["boundary"]
    off = found["near_off_plane"] / data["statistics"]["diameter_lower"]
    cells = [names[label] for label in found["polygon_classes"]]
    trio = ", ".join(f"“{names[predicted[row]]}” (image {row})" for row in found["anchors"])
    under = _plane.cells_at(
        found["near_coordinates"], found["polygon_vertices"], found["polygon_starts"],
        found["polygon_classes"],
    )  # fmt: skip
    matching = int((under == predicted[found["near_rows"]]).sum())
    dots = (
        f" The dots are the {len(off)} test images nearest to the plane within the view, dropped "
        f"onto it, in the colour of the class that the network gives them; the larger, the nearer. "
        f"The nearest is {percent(off.min())} of the hull's diameter off the plane, the farthest "
        f"{percent(off.max())}; {of(matching, len(off))} fall onto a cell of their own colour."
        if len(off)
        else ""
    )
    inside = data["plane_hull"]["verdict"] == Membership.INSIDE
    undecided = int((data["plane_hull"]["verdict"] == Membership.UNDECIDED).sum())
    cut = (
        f"cuts the plane where it is hatched, {percent(inside.mean(), 2)} of the view"
        if inside.any()
        else f"holds none of {inside.size:,} points tried in this view"
    )
    drawing = partial(
        plots.plane, found, inside, predicted, near["test_distance"], names,
        data["about"]["options"]["bounds"],
    )  # fmt: skip
    figure = Figure(
        [plots.render(drawing)],
        "Class cells on a plane through the features of three images, with test images near it",
        f"The plane through the features of three test images: {trio}. In this view it cuts the "
        f"cells of {listed(cells)}. The hull of the training features {cut}.{dots}",
        "Cells: exact, the half-planes of the linear head clipped one by one, no grid. The dashed "
        "disc around each of the three images is proved to have one class. Dots: the colour is "
        "certain, the place is a projection; a dot on another colour lies off the plane, in its "
        f"own cell. The hull: proved inside or outside at {inside.size - undecided:,} of "
        f"{inside.size:,} points of a grid, and drawn between them.",
    )
    return Section(
        "plane",
        "Plane",
        "A look into the feature space",
        "The network turns an image into a point. Its last layer cuts the space of these points "
        "into convex cells, one per class. This is a flat cut through three images, beside the "
        "plane of the same three in pixels.",
        [figure, pixel_plane(data)],
        summary={"anchors": found["anchors"].tolist(), "classes_in_view": cells},
    )


def statistics(data: Data) -> Section:
    """How many dimensions the features really use, and the unit of length."""
    found = data["statistics"]
    dim, low, high = found["num_features"], found["diameter_lower"], found["diameter_upper"]
    estimate, error = found["intrinsic_dimension"], found["intrinsic_standard_error"]
    share = found["unit_active_share"]
    marks = [(found["components_90"], f"90 %: {_axes(found['components_90'])}")]
    if found["components_99"] > found["components_90"]:
        marks.append((found["components_99"], f"99 %: {_axes(found['components_99'])}"))
    blocks = [
        Figure(
            [plots.render(partial(plots.spectrum, found["variance_share"], marks))],
            "Cumulative variance of the training features over principal axes",
            f"Of {dim} directions, {found['components_90']} hold 90 % of the variance of the "
            f"training features and {found['components_99']} hold 99 %. Seen from neighbour to "
            f"neighbour, the points spread in about {estimate:.1f} dimensions.",
            f"Spectrum: computed from all {found['num_train']:,} images in float64. Dimension "
            f"between neighbours: a statistical estimate (TwoNN) from "
            f"{found['intrinsic_points']:,} images, {estimate:.1f}\u00a0±\u00a0{2 * error:.1f} "
            f"(two standard errors), if the points are locally uniform.",
        )
    ]
    if found["nonnegative"]:
        blocks.append(
            Figure(
                [plots.render(partial(plots.activity, share))],
                "Share of training images on which each unit is active",
                f"An image activates {found['mean_active_units']:.1f} of the {dim} units on "
                f"average. Active on more than 99 % of the images: {int((share > 0.99).sum())} "
                f"units; on none: {int((share == 0).sum())}.",
                "Counts of the training images, exact.",
            )
        )
    return Section(
        "statistics",
        "Features",
        "The space of features",
        f"Distances below are in percent of the diameter of the training features' convex hull, "
        f"the largest distance between two of its points: {low:.6g} in the features' own units.",
        blocks,
        [
            f"It sees an image as {dim} numbers, but from one image to its neighbours only about "
            f"{estimate:.0f} dimensions vary ({estimate:.1f}\u00a0±\u00a0{2 * error:.1f})."
        ],
        [Certificate("Diameter of the training hull", "bracket", width((high - low) / high), "-")],
        {name: value for name, value in found.items() if not isinstance(value, np.ndarray)},
    )


def hull(data: Data) -> Section:
    """Which test images lie outside the hull of the training features, and how far."""
    found, names = data["hull"], data["about"]["class_names"]
    unit, unit_upper = (data["statistics"][f"diameter_{end}"] for end in ("lower", "upper"))
    labels = data["labels"]["test_labels"]
    correct = data["accuracy"]["test_predicted"] == labels
    outside, inside = (found["verdict"] == code for code in (Membership.OUTSIDE, Membership.INSIDE))
    undecided = ~outside & ~inside
    counts = [int(mask.sum()) for mask in (outside, inside, undecided)]
    total, (distance, lower) = len(labels), bracket(found)
    failed = np.isinf(distance)
    widest = float(np.max((distance - lower)[outside] / distance[outside], initial=0.0))
    residue = float(distance[undecided & ~failed].max(initial=0.0)) / unit
    converged = int((found["status"] == Status.CONVERGED).sum())
    order = rank_probability(distance[~correct & ~failed], distance[correct & ~failed])
    train = f"{data['statistics']['num_train']:,}"
    pictures = [plots.render(partial(plots.verdicts, counts))]
    seen = (
        f"{sentence(of(counts[0], total, 'test images'))} lie outside the convex hull of the "
        f"{train} training images' features"
        + (f", {counts[1]:,} inside" if counts[1] else "")
        + (f", {counts[2]:,} undecided." if counts[2] else ".")
    )
    certain = (
        "Outside means: a separating plane is proved. Inside means: a ball around the point is "
        "proved to lie in the hull. " + ("" if counts[2] else "No image is undecided. ")
    )
    if counts[2] > failed.sum():
        certain += f"The undecided ones are at most {percent(residue)} of the diameter away. "
    if failed.any():
        certain += f"For {failed.sum():,} images nothing is known; their status is listed below. "
    findings = [f"No test image is proved to lie outside the hull of the {train} training images."]
    median, closest = None, float(np.median(found["nearest_distance"])) / unit
    if counts[0]:
        far = int(np.argmax(np.where(outside, lower, 0.0)))
        median = float(np.median(distance[outside])) / unit
        label = "distance outside the hull, in hull diameters"
        pictures.append(
            plots.render(
                partial(plots.distances, distance[outside] / unit, correct[outside], label)
            )
        )
        seen += (
            f" Those outside are {percent(median)} {UNIT} away (median), the farthest "
            f"{percent(distance[far] / unit)}: image {far}, a “{names[labels[far]]}”. For "
            f"comparison, the nearest training image is {percent(closest)} away (median)."
        )
        if order is not None:
            seen += (
                f" In {percent(order)} of all pairs of a wrongly and a correctly classified image "
                f"the wrong one is farther outside."
            )
        certain += (
            f"Every distance is bracketed; the widest bracket is {width(widest)} of its distance, "
            f"and {of(converged, total)} reached the requested tolerance."
        )
        findings = [
            f"{sentence(of(counts[0], total, 'test images'))} lie provably outside the convex hull "
            f"of the training images' features: to classify them is to extrapolate. The step "
            f"outside is {percent(median)} of the hull's diameter (median), at most "
            f"{percent(distance[far] / unit)}."
        ]
    figure = Figure(pictures, "Test images outside and inside the training hull", seen, certain)
    return Section(
        "hull",
        "Hull",
        "Inside or outside the training data",
        "A point inside the convex hull is a mixture of training points: the network interpolates. "
        "Outside it has to extrapolate, the more the farther out.",
        [figure],
        findings,
        [
            Certificate(
                "Inside or outside the training hull",
                of(total - counts[2], total),
                f"{width(widest)} of the distance",
                str(counts[2]),
            )
        ],
        {
            "num_outside": counts[0],
            "num_inside": counts[1],
            "num_undecided": counts[2],
            "num_converged": converged,
            "median_outside_over_diameter": median,
            "max_over_diameter_at_least": float(lower.max()) / unit_upper,
            "max_over_diameter_at_most": float(distance.max()) / unit,
            "max_undecided_over_diameter": residue,
            "widest_relative_bracket": widest,
            "median_nearest_train_over_diameter": closest,
            "probability_wrong_is_farther": order,
        },
    )


def class_hulls(data: Data) -> Section:
    """How far each test image is from the hull of every class."""
    found, names = data["class_hulls"], data["about"]["class_names"]
    unit, labels = data["statistics"]["diameter_lower"], data["labels"]["test_labels"]
    (distance, lower), rows = bracket(found), np.arange(len(labels))
    nearest = distance.argmin(axis=1)
    rest = np.where(np.arange(distance.shape[1]) == nearest[:, None], np.inf, lower)
    proved = int((distance[rows, nearest] < rest.min(axis=1)).sum())
    right, total = int((nearest == labels).sum()), len(labels)
    agree = int((nearest == data["accuracy"]["test_predicted"]).sum())
    table = np.full((len(names), len(names)), np.nan)
    for label in np.unique(labels):
        table[label] = np.median(distance[labels == label], axis=0) / unit
    own = float(np.median(distance[rows, labels])) / unit
    clear = np.isfinite(distance) & (lower > 0)
    widest = float(np.max(1 - lower[clear] / distance[clear], initial=0.0))
    drawing = partial(
        plots.matrix, table, names, "test images of class", "training hull of class",
        lambda value: f"{100 * value:.2g}",
    )  # fmt: skip
    figure = Figure(
        [plots.render(drawing)],
        "Median distance of each class's test images to each class's training hull",
        f"Median distances in percent {UNIT}. Test images are {percent(own)} away from the hull "
        f"of their own class (median). Giving each image the class of its nearest hull is right "
        f"for {of(right, total, 'images')}, and agrees with the network on {of(agree, total)}.",
        f"Which hull is nearest is proved for {of(proved, total, 'images')}: the bracket of its "
        f"distance ends below all others. The widest bracket is {width(widest)} of its distance.",
    )
    return Section(
        "class_hulls",
        "Class hulls",
        "Distance to each class",
        "The same question for each class apart: how far is an image from all mixtures of that "
        "class's training images?",
        [figure],
        [
            f"The nearest class hull alone gives the right class to "
            f"{of(right, total, 'test images')}; the network to "
            f"{percent(data['accuracy']['test_accuracy'], 3)}."
        ],
        [
            Certificate(
                "Which class hull is nearest",
                of(proved, total),
                f"{width(widest)} of the distance",
                str(total - proved),
            )
        ],
        {
            "nearest_hull_accuracy": right / total,
            "num_proved": proved,
            "median_own_over_diameter": own,
            "widest_relative_bracket": widest,
        },
    )


def boundary(data: Data) -> Section:
    """How far the nearest other answer is."""
    found, names = data["boundary"], data["about"]["class_names"]
    unit, labels = data["statistics"]["diameter_lower"], data["labels"]["test_labels"]
    predicted = data["accuracy"]["test_predicted"]
    usable = np.isfinite(found["test_distance"])
    correct, relative = predicted == labels, np.asarray(found["test_distance"], np.float64) / unit
    proved, total = int((found["test_status"] == Status.CONVERGED).sum()), len(labels)
    order = rank_probability(-relative[usable & ~correct], -relative[usable & correct])
    medians = [median(relative[usable & mask]) for mask in (correct | True, correct, ~correct)]
    nearest = int(np.argmin(np.where(usable, relative, np.inf)))
    contrast = ""
    if order is not None:
        contrast = (
            f" Wrongly classified images are {percent(medians[2])} away, correct ones "
            f"{percent(medians[1])} (medians); in {percent(order)} of all pairs the wrong one is "
            f"nearer to a boundary."
        )
    label = "distance to the nearest boundary, in hull diameters"
    blocks = [
        Figure(
            [plots.render(partial(plots.distances, relative[usable], correct[usable], label))],
            "Histogram of the distances to the nearest decision boundary",
            f"The nearest boundary is {percent(medians[0])} {UNIT} away (median). The most "
            f"ambiguous image, {nearest}, is {percent(relative[nearest])} away from being "
            f"“{names[found['test_rival'][nearest]]}”.{contrast}",
            f"Proved for {of(proved, total, 'images')}: a closed form of the linear head in "
            f"float64, rounded down, so that the ball of this radius has one class. The balls are "
            f"in feature space; what they mean in pixels is not proved.",
        )
    ]
    if "hull" in data:
        outside = bracket(data["hull"])[0] / unit
        drawn = usable & np.isfinite(outside)
        risky = drawn & (outside > np.median(outside)) & (relative < medians[0])
        risk = float(np.mean(~correct[risky])) if risky.any() else 0.0
        drawing = partial(
            plots.landscape, outside[drawn], relative[drawn], predicted[drawn],
            correct[drawn], names,
        )  # fmt: skip
        blocks.append(
            Figure(
                [plots.render(drawing)],
                "Every test image by distance to the hull and distance to the boundary",
                f"Every test image by both distances, in the colour of the class the network gives "
                f"it; mistakes are ringed. {risky.sum():,} images are both farther outside and "
                f"nearer to a boundary than the median: {percent(risk)} of them are classified "
                f"wrongly, of all images {percent(float(np.mean(~correct)))}.",
                "Both distances as certified in their own figures.",
            )
        )
    finding = f"Half of the test images are closer than {percent(medians[0])} {UNIT} to a boundary"
    finding += (
        f"; mistakes sit at {percent(medians[2])}, correct answers at {percent(medians[1])} "
        f"(medians)."
        if order is not None
        else "."
    )
    return Section(
        "boundary",
        "Boundaries",
        "How close to another answer",
        "Around every point is a ball in which the network's answer cannot change. Its radius is "
        "the distance to the nearest decision boundary.",
        blocks,
        [finding],
        [
            Certificate(
                "Ball around each image with one class",
                of(proved, total),
                "exact, rounded down",
                str(total - proved),
            )
        ],
        {
            "median_over_diameter": medians[0],
            "median_correct_over_diameter": medians[1],
            "median_wrong_over_diameter": medians[2],
            "probability_wrong_is_nearer": order,
            "num_proved": proved,
        },
    )


SECTIONS: tuple[tuple[Callable[[Data], Section], tuple[str, ...]], ...] = (
    (accuracy, ("accuracy",)),
    (plane, ("plane", "plane_hull", "pixel_plane", "accuracy", "boundary", "statistics")),
    (statistics, ("statistics",)),
    (hull, ("hull", "accuracy", "statistics")),
    (class_hulls, ("class_hulls", "accuracy", "statistics")),
    (boundary, ("boundary", "accuracy", "statistics")),
    *BOUNDARY_SECTIONS,
    (gallery, ("gallery", "hull", "boundary", "accuracy", "statistics")),
    (inversion, ("inversion", "statistics")),
    (flips, ("flips",)),
    (morphs, ("morphs",)),
    (ties, ("ties",)),
)


def _axes(count: int) -> str:
    return "1 axis" if count == 1 else f"{count} axes"
