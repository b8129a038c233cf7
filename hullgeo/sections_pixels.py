"""What an analysis tells of images: one section per subject, from saved data to sentences."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from hullgeo import plots, plots_pixels
from hullgeo.plots import percent
from hullgeo.result import Membership, Status
from hullgeo.telling import UNIT, Card, Certificate, Data, Figure, Gallery, Section, of


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
        f"Titles give the true class. Percentages are {UNIT} of the training hull: “outside” is "
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
