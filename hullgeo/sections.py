"""What an analysis tells: one section per subject, from saved data to sentences and figures.

Every figure comes with what is seen in *this* data, with its numbers, and how certain that is.
Findings and certificates of all sections are gathered at the top of the report. To tell of a new
stage, write its section and put it into `SECTIONS` with the stages it reads.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hullgeo import _plane, plots, plots_pixels
from hullgeo.plots import percent, power_of_ten
from hullgeo.result import Membership, Status

Data = dict[str, dict[str, Any]]
_UNIT = "of the diameter"


class Figure(NamedTuple):
    """Drawings under one another, what is seen in them, and how certain that is."""

    pictures: Sequence[dict[str, str]]
    alt: str
    seen: str
    certain: str


class Card(NamedTuple):
    """Pictures with their captions, a title, and lines of numbers."""

    pictures: Sequence[tuple[str, str]]
    title: str
    lines: Sequence[str]
    color: str
    wrong: bool = False


class Gallery(NamedTuple):
    """Cards under a sentence that says what they show and how certain it is."""

    cards: Sequence[Card]
    seen: str
    certain: str
    layout: str = "small"


class Certificate(NamedTuple):
    """One row of the table of certificates."""

    question: str
    proved: str
    widest: str
    open: str


class Section(NamedTuple):
    """One chapter of the report, and what it adds to the top and to the summary."""

    name: str
    label: str
    title: str
    lead: str
    blocks: Sequence[Figure | Gallery]
    findings: Sequence[str] = ()
    certificates: Sequence[Certificate] = ()
    summary: dict[str, Any] = {}  # noqa: RUF012


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
    drawing = partial(
        plots.plane, found, predicted, near["test_distance"], names,
        data["about"]["options"]["bounds"],
    )  # fmt: skip
    figure = Figure(
        [plots.render(drawing)],
        "Class cells on a plane through the features of three images, with test images near it",
        f"The plane through the features of three test images: {trio}. In this view it cuts the "
        f"cells of {_listed(cells)}.{dots}",
        "Cells: exact, the half-planes of the linear head clipped one by one, no grid. The dashed "
        "disc around each of the three images is proved to have one class. Dots: the colour is "
        "certain, the place is a projection; a dot on another colour lies off the plane, in its "
        "own cell.",
    )
    return Section(
        "plane",
        "Plane",
        "A look into the feature space",
        "The network turns an image into a point. Its last layer cuts the space of these points "
        "into convex cells, one per class. This is a flat cut through three images.",
        [figure],
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
        [Certificate("Diameter of the training hull", "bracket", _width((high - low) / high), "-")],
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
    total, (distance, lower) = len(labels), _bracket(found)
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
            f" Those outside are {percent(median)} {_UNIT} away (median), the farthest "
            f"{percent(distance[far] / unit)}: image {far}, a “{names[labels[far]]}”. For "
            f"comparison, the nearest training image is {percent(closest)} away (median)."
        )
        if order is not None:
            seen += (
                f" In {percent(order)} of all pairs of a wrongly and a correctly classified image "
                f"the wrong one is farther outside."
            )
        certain += (
            f"Every distance is bracketed; the widest bracket is {_width(widest)} of its distance, "
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
                f"{_width(widest)} of the distance",
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
    (distance, lower), rows = _bracket(found), np.arange(len(labels))
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
        f"Median distances in percent {_UNIT}. Test images are {percent(own)} away from the hull "
        f"of their own class (median). Giving each image the class of its nearest hull is right "
        f"for {of(right, total, 'images')}, and agrees with the network on {of(agree, total)}.",
        f"Which hull is nearest is proved for {of(proved, total, 'images')}: the bracket of its "
        f"distance ends below all others. The widest bracket is {_width(widest)} of its distance.",
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
                f"{_width(widest)} of the distance",
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
    medians = [_median(relative[usable & mask]) for mask in (correct | True, correct, ~correct)]
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
            f"The nearest boundary is {percent(medians[0])} {_UNIT} away (median). The most "
            f"ambiguous image, {nearest}, is {percent(relative[nearest])} away from being "
            f"“{names[found['test_rival'][nearest]]}”.{contrast}",
            f"Proved for {of(proved, total, 'images')}: a closed form of the linear head in "
            f"float64, rounded down, so that the ball of this radius has one class. The balls are "
            f"in feature space; what they mean in pixels is not proved.",
        )
    ]
    if "hull" in data:
        outside = _bracket(data["hull"])[0] / unit
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
    finding = f"Half of the test images are closer than {percent(medians[0])} {_UNIT} to a boundary"
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


def gallery(data: Data) -> Section:
    """The images at the extremes."""
    found = data["gallery"]
    card = partial(_image_card, data)
    blocks = []
    if len(found["extrapolated"]):
        weights = data["hull"]["weights"][found["extrapolated"]]
        parents = [
            list(zip(images, shares, strict=True))
            for images, shares in zip(found["parent_images"], weights, strict=True)
        ]
        blocks.append(
            Gallery(
                list(map(card, found["extrapolated"], found["extrapolated_images"], parents)),
                "The most extrapolated images: farthest outside the hull of the training features. "
                "Beside each, the training images that make up most of the nearest point of the "
                "hull, with their shares.",
                "Ordered by the proved lower bound of the distance. The shares belong to the point "
                "found, which is as near as the bracket says, and need not be unique.",
                "parents",
            )
        )
    blocks.append(
        Gallery(
            list(map(card, found["ambiguous"], found["ambiguous_images"])),
            "The most ambiguous images: nearest to a decision boundary.",
            "Exact distances in feature space, rounded down.",
        )
    )
    if len(found["wrong"]):
        blocks.append(
            Gallery(
                list(map(card, found["wrong"], found["wrong_images"])),
                "The most confident mistakes: classified wrongly, and farthest from a boundary.",
                "Exact distances in feature space; the true class is the data set's label.",
            )
        )
    return Section(
        "gallery",
        "Images",
        "The images themselves",
        f"Titles give the true class. Percentages are {_UNIT} of the training hull: “outside” is "
        f"the distance to the hull, “boundary” the distance to the nearest other class, which is "
        f"the rival.",
        blocks,
        summary={name: found[name].tolist() for name in ("ambiguous", "extrapolated", "wrong")},
    )


def _image_card(
    data: Data, row: int, image: np.ndarray, parents: Sequence[tuple[np.ndarray, float]] = ()
) -> Card:
    names, bounds = data["about"]["class_names"], data["about"]["options"]["bounds"]
    unit, true = data["statistics"]["diameter_lower"], data["labels"]["test_labels"][row]
    guess = data["accuracy"]["test_predicted"][row]
    distance = percent(float(data["hull"]["distance"][row]) / unit, 3)
    unknown = np.isnan(data["hull"]["distance"][row])
    where = {
        Membership.OUTSIDE: f"outside {distance}",
        Membership.INSIDE: "inside the hull",
        Membership.UNDECIDED: "hull unknown" if unknown else f"outside ≤\u00a0{distance}",
    }[Membership(int(data["hull"]["verdict"][row]))]
    near = percent(float(data["boundary"]["test_distance"][row]) / unit, 3)
    pictures = [(plots.picture(image, bounds), f"image {row}")]
    pictures += [
        (plots.picture(parent, bounds), percent(float(weight)))
        for parent, weight in parents
        if weight > 0.01
    ]
    return Card(
        pictures,
        f"“{names[true]}”" if guess == true else f"“{names[true]}” taken for “{names[guess]}”",
        [where, f"boundary {near}", f"rival “{names[data['boundary']['test_rival'][row]]}”"],
        plots.class_colors(len(names))[guess],
        bool(guess != true),
    )


def inversion(data: Data) -> Section:
    """Nearest boundary points taken back to pixels."""
    found, names = data["inversion"], data["about"]["class_names"]
    bounds, unit = data["about"]["options"]["bounds"], data["statistics"]["diameter_lower"]
    palette, count = plots.class_colors(len(names)), len(found["rows"])
    if count == 0:
        title = "Boundary points as images"
        return Section("inversion", "Inversion", title, "No image was moved to a boundary.", [])
    change = found["after"].astype(np.float64) - found["before"]
    scale = float(np.abs(change.mean(axis=-1)).max(initial=0.0)) or 1.0
    matched = int((found["status"] == Status.CONVERGED).sum())
    cards = [
        Card(
            [
                (plots.picture(found["before"][i], bounds), f"image {found['rows'][i]}"),
                (plots.picture(found["after"][i], bounds), "moved"),
                (plots.difference_picture(found["before"][i], found["after"][i], scale), "change"),
            ],
            f"from “{names[found['label'][i]]}” towards “{names[found['rival'][i]]}”",
            [
                f"way to the boundary {percent(found['feature_distance'][i] / unit, 3)}",
                f"logit gap closed {percent(float(found['gap_closed'][i]))}",
                f"target missed by {percent(float(found['residual'][i]))}",
                f"pixels changed by {found['pixel_distance'][i]:.3g}",
            ],
            palette[found["label"][i]],
        )
        for i in range(count)
    ]
    low, high = float(found["pixel_distance"].min()), float(found["pixel_distance"].max())
    worst, closed = float(found["residual"].max()), float(found["gap_closed"].min())
    steps = int(found["num_gradients"].max())
    block = Gallery(
        cards,
        f"{count} correctly classified images, from near a boundary to far from one. Each was "
        f"changed in pixels by {low:.2g} to {high:.2g} (Euclidean length, pixels between "
        f"{bounds[0]:g} and {bounds[1]:g}), which closed at least {percent(closed)} of the logit "
        f"gap between its class and the rival. Change: red brighter, blue darker, full colour at "
        f"{scale:.2g}.",
        f"Evaluated, not proved: a local search of up to {steps} gradient steps. It matched the "
        f"boundary point's features to 0.1 % of their length for {of(matched, count)}; the worst "
        f"missed by {percent(worst)}. Where missed, a smaller change or a closer match may exist.",
        "wide",
    )
    return Section(
        "inversion",
        "Inversion",
        "Boundary points as images",
        "The nearest point of a decision boundary is a point of feature space. What image has "
        "these features? Each image below was moved in pixels towards that point.",
        [block],
        [
            f"Moving {count} images towards their nearest boundary point changed their pixels by "
            f"{low:.2g} to {high:.2g} and closed at least {percent(closed)} of the logit gap; the "
            f"point was matched to 0.1 % for {of(matched, count)}."
        ],
        [
            Certificate(
                "Boundary points as images",
                f"not proved; matched {of(matched, count)}",
                f"missed by {percent(worst)}",
                str(count - matched),
            )
        ],
        {
            "num_tried": count,
            "num_matched": matched,
            "residuals": found["residual"].tolist(),
            "gap_closed": found["gap_closed"].tolist(),
            "pixel_distances": found["pixel_distance"].tolist(),
        },
    )


def flips(data: Data) -> Section:
    """The nearest images of another class that were found."""
    found, names = data["flips"], data["about"]["class_names"]
    title, count = "Nearest images of another class", len(found["rows"])
    if count == 0:
        return Section("flips", "Flips", title, "No image was tried.", [])
    bounds = tuple(data["about"]["options"]["bounds"])
    flipped = np.isfinite(found["distance"])
    sure = int((found["status"] == Status.CONVERGED).sum())
    if flipped.any():
        low, high = (float(edge(found["distance"][flipped])) for edge in (np.min, np.max))
        length = f"by {low:.3g} to {high:.3g} in pixels"
    else:
        length = "not at all"
    drawing = partial(
        plots_pixels.flips, found["before"], found["image"], found["distance"], found["label"],
        found["rival"], names, bounds=bounds,
    )  # fmt: skip
    figure = Figure(
        [plots.render(drawing)],
        "Images, the nearest flips found, and the differences",
        f"{of(int(flipped.sum()), count)} changed class when moved {length} (Euclidean length). "
        f"Below each flip its difference, amplified by the factor written there.",
        f"Both sides of the boundary are evaluated, alone and in a batch, beyond rounding, for "
        f"{of(sure, count)}. A flip is an upper bound of the distance to the boundary: a local "
        f"search of {int(found['num_gradients'].max())} gradients found it, and a nearer one may "
        f"exist.",
    )
    return Section(
        "flips",
        "Flips",
        title,
        "How little must an image change until the network calls it something else?",
        [figure],
        [f"Changes of pixels {length} flipped {of(int(flipped.sum()), count)} images tried."],
        [
            Certificate(
                "Nearest images of another class",
                f"upper bounds of {of(sure, count)}",
                "no lower bound",
                str(count - sure),
            )
        ],
        {
            "num_tried": count,
            "num_flipped": int(flipped.sum()),
            "num_confirmed": sure,
            "distances": found["distance"].tolist(),
        },
    )


SECTIONS: tuple[tuple[Callable[[Data], Section], tuple[str, ...]], ...] = (
    (accuracy, ("accuracy",)),
    (plane, ("plane", "accuracy", "boundary", "statistics")),
    (statistics, ("statistics",)),
    (hull, ("hull", "accuracy", "statistics")),
    (class_hulls, ("class_hulls", "accuracy", "statistics")),
    (boundary, ("boundary", "accuracy", "statistics")),
    (gallery, ("gallery", "hull", "boundary", "accuracy", "statistics")),
    (inversion, ("inversion", "statistics")),
    (flips, ("flips",)),
)


def of(count: int, total: int, noun: str = "") -> str:
    """A count with its share: '352 of 360 images (97.8 %)', 'all 360 images'."""
    noun = f" {noun}" if noun else ""
    if total and count == total:
        return f"all {total:,}{noun}"
    if count == 0:
        return f"none of {total:,}{noun}"
    return f"{count:,} of {total:,}{noun} ({percent(count / total, 3)})"


def sentence(text: str) -> str:
    """With a capital letter at the start."""
    return text[:1].upper() + text[1:]


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    z, share = 1.959964, count / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def rank_probability(left: np.ndarray, right: np.ndarray) -> float | None:
    """Share of pairs in which the left value is larger, ties half; None without pairs."""
    if len(left) == 0 or len(right) == 0:
        return None
    ordered = np.sort(right)
    below = np.searchsorted(ordered, left, side="left")
    above = np.searchsorted(ordered, left, side="right")
    return float(np.mean(below + above) / (2 * len(right)))


def _bracket(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower bounds of distances; infinity and 0 where a query failed."""
    upper, lower = (np.asarray(found[name], np.float64) for name in ("distance", "lower"))
    return np.where(np.isnan(upper), np.inf, upper), np.where(np.isnan(lower), 0.0, lower)


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _width(relative: float) -> str:
    """A relative width, rounded up to one digit: '0.06 %', '3e-7' with a superscript."""
    if relative <= 0:
        return "0"
    exponent = math.floor(math.log10(relative))
    upward = math.ceil(relative / 10.0**exponent) * 10.0**exponent
    return percent(upward, 1) if exponent >= -5 else power_of_ten(upward)


def _axes(count: int) -> str:
    return "1 axis" if count == 1 else f"{count} axes"


def _listed(names: Sequence[str]) -> str:
    """'“3”, “5” and “9”'."""
    quoted = [f"“{name}”" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
