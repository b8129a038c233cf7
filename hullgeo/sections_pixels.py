"""What an analysis tells of images: one section per subject, from saved data to sentences."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from hullgeo import plots, plots_pixels
from hullgeo.plots import percent
from hullgeo.result import Membership, Status
from hullgeo.telling import (
    UNIT,
    Card,
    Certificate,
    Data,
    Figure,
    Gallery,
    Section,
    listed,
    median,
    of,
    sentence,
    times,
    wilson,
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


def pixel_plane(data: Data) -> Figure:
    """The plane of pixels through the three images, to stand beside that of their features."""
    found, names = data["pixel_plane"], data["about"]["class_names"]
    classes, within, bounds = found["classes"], found["within"], data["about"]["options"]["bounds"]
    counts = np.bincount(classes[within], minlength=len(names))
    order = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    shares = ", ".join(f"“{names[label]}” {percent(counts[label] / max(within.sum(), 1), 2)}"
                       for label in order)  # fmt: skip
    outside = [names[label] for label in np.unique(classes) if not counts[label]]
    beyond = f" Only where it is pale: {listed(outside)}." if outside else ""
    drawing = partial(plots_pixels.plane, found, data["plane"]["anchor_images"], names,
                      bounds=bounds)  # fmt: skip
    return Figure(
        [plots.render(drawing)],
        "Classes on the plane of pixels through the same three images",
        "The plane through the same three images themselves, in pixels: every point is a mixture "
        "of the three. Where no pixel leaves its bounds (full colour), the classes take: "
        f"{shares}.{beyond} The network bends this plane into a curved surface of the feature "
        "space: borders are curved here, and the classes are not those of the flat cut.",
        f"A picture, no proof: the network was evaluated at {int(found['num_evaluations']):,} of "
        f"{classes.size:,} points of a grid, densely along the borders. Every square without a "
        "border was probed at its corners and its centre, which agree.",
    )


def inversion(data: Data) -> Section:
    """Nearest boundary points taken back to pixels."""
    found, names = data["inversion"], data["about"]["class_names"]
    bounds, unit = data["about"]["options"]["bounds"], data["statistics"]["diameter_lower"]
    palette, count = plots.class_colors(len(names)), len(found["rows"])
    if count == 0:
        title = "Boundary points as images"
        return Section("inversion", "Inversion", title, "No image was moved to a boundary.", [])
    shown = np.unique(np.linspace(0, count - 1, min(count, 6)).round().astype(int))
    change = (found["after"].astype(np.float64) - found["before"])[shown]
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
        for i in shown
    ]
    low, high = float(found["pixel_distance"].min()), float(found["pixel_distance"].max())
    worst = float(found["residual"].max())
    least, most = (percent(round(float(end(found["gap_closed"])), 3)) for end in (np.min, np.max))
    steps = int(found["num_gradients"].max())
    off = found["num_off"] > 0
    kept_off = ""
    if off.any():
        farther = median(found["feature_distance"][off] / found["nearest_distance"][off]) - 1
        kept_off = (
            f"Units of the last hidden layer that are off for an image "
            f"({median(found['num_off']):g} of {found['target'].shape[1]} in the median) are left "
            f"off in its target, since no gradient switches them on; the target is farther than "
            f"the nearest boundary point of all by {percent(max(farther, 0.0))} in the median. "
        )
    block = Gallery(
        cards,
        f"{count} correctly classified images, from near a boundary to far from one, of which "
        f"{len(shown)} are shown. Each was "
        f"changed in pixels by {low:.2g} to {high:.2g} (Euclidean length, pixels between "
        f"{bounds[0]:g} and {bounds[1]:g}), which closed between {least} and {most} of the logit "
        f"gap between its class and the rival. "
        f"{kept_off}Change: red brighter, blue darker, full colour at {scale:.2g}.",
        f"Evaluated, not proved: a local search of up to {steps} gradients. It matched the "
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
            f"{low:.2g} to {high:.2g} and closed between {least} and {most} of the logit gap; the "
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
    """The nearest images of another class that were found, and the robustness curve."""
    found, names = data["flips"], data["about"]["class_names"]
    title, count = "Nearest images of another class", len(found["rows"])
    if count == 0:
        return Section("flips", "Flips", title, "No image was tried.", [])
    bounds = tuple(data["about"]["options"]["bounds"])
    distance, few = (np.asarray(found[name], np.float64) for name in ("distance", "few_distance"))
    sure = int((found["status"] == Status.CONVERGED).sum())
    right = distance > 0
    flipped = np.flatnonzero(right & np.isfinite(distance))
    order = flipped[np.argsort(distance[flipped], kind="stable")]
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(6, len(order))).round().astype(int))]
    blocks, half, findings = [], np.nan, []
    if len(shown):
        low, high = distance[order[0]], distance[order[-1]]
        drawing = partial(
            plots_pixels.flips, found["before"][shown], found["image"][shown], distance[shown],
            found["label"][shown], found["rival"][shown], names, bounds=bounds,
        )  # fmt: skip
        blocks.append(
            Figure(
                [plots.render(drawing)],
                "Images, the nearest flips found, and the differences",
                f"{sentence(of(len(flipped), int(right.sum()), 'correctly classified images'))} "
                f"changed class when moved by {low:.3g} to {high:.3g} in pixels (Euclidean length, "
                f"{np.median(distance[flipped]):.3g} in the median); shown are {len(shown)}, from "
                f"the nearest to the farthest. Below each flip its difference, amplified by the "
                f"factor written there.",
                f"Both sides of the boundary were evaluated, alone and in a batch, and differ by "
                f"more than rounding, for {of(sure, count)}. A flip is an upper bound of the "
                f"distance to the boundary: a local search of "
                f"{int(found['num_gradients'].max())} gradients found it, and a nearer one may "
                f"exist.",
            )
        )
        half = float(np.median(np.where(np.isfinite(distance[right]), distance[right], np.inf)))
        findings.append(
            f"A change of {half:.3g} in pixels is enough to flip half of the {int(right.sum())} "
            f"correctly classified images tried."
        )
    blocks.append(_robustness(found, distance, few))
    return Section(
        "flips",
        "Flips",
        title,
        "How little must an image change until the network calls it something else?",
        blocks,
        findings,
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
            "num_right": int(right.sum()),
            "num_flipped": len(flipped),
            "num_confirmed": sure,
            "median_distance": half,
            "num_gradients": int(found["num_gradients"].max()),
        },
    )


def _robustness(found: dict[str, np.ndarray], distance: np.ndarray, few: np.ndarray) -> Figure:
    """The share of images that keep their label within a distance."""
    count, right = len(distance), int((distance > 0).sum())
    budgets = [int(found[name].max()) for name in ("few_num_gradients", "num_gradients")]
    curves = [f"{budgets[0]} gradients", f"{budgets[1]} gradients"]
    drawing = partial(plots_pixels.robustness, [few, distance], curves)
    low, high = wilson(right, count)
    both = np.isfinite(few) & (distance > 0)
    gain = ""
    if both.any():
        nearer = percent(max(1 - median(distance[both] / few[both]), 0.0))
        gain = (
            f" With {budgets[1]} gradients instead of {budgets[0]} the flips are nearer by "
            f"{nearer} in the median."
        )
    half = np.quantile(distance, 0.5, method="lower")
    return Figure(
        [plots.render(drawing)],
        "Share of images that keep their label, by the size of the change",
        f"Of {count} images spread evenly over the test set {percent(right / count)} are "
        f"classified right to begin with; a change of {half:.3g} leaves at most half of all "
        f"right.{gain}",
        f"Every flip was evaluated, so that the curves are upper bounds of the share for these "
        f"images: flips may have been missed, the fewer the larger the budget. For all images of "
        f"the kind, the share at 0 lies between {percent(low)} and {percent(high)} with 95 % "
        f"confidence.",
    )


def morphs(data: Data) -> Section:
    """Images between images, along the line between their features."""
    found, names = data["morphs"], data["about"]["class_names"]
    title, count = "Between two images", len(found["pairs"])
    if count == 0:
        return Section("morphs", "Morphs", title, "No pair of images was tried.", [])
    bounds = tuple(data["about"]["options"]["bounds"])
    frames = found["residual"].shape[1]
    inner, stray = found["residual"][:, 1:-1], found["blend_residual"][:, 1:-1].max(axis=1)
    reached = int((found["status"][:, 1:-1] == Status.CONVERGED).sum())
    changes, blended = (
        (np.diff(found[name], axis=1) != 0).sum(axis=1) for name in ("labels", "blend_labels")
    )
    missing = (found["targets"] - found["features"]).astype(np.float64)[:, 1:-1]
    off = (found["features"][:, 1:-1] == 0) & (missing > 0)
    share = float((missing[off] ** 2).sum() / max((missing**2).sum(), np.finfo(float).tiny))
    where = ""
    if share > 0.5:
        where = (
            f" Of the squares of what is missed {percent(share)} lie in units that are off, which "
            f"no gradient switches on."
        )
    shown = min(count, 3)
    strips = (
        np.concatenate([found[f"blend_{name}"][:1], found[name][:shown]])
        for name in ("images", "labels", "residual")
    )
    drawing = partial(
        plots_pixels.morphs, *strips, names, bounds=bounds, rows=["blend", *["morph"] * shown]
    )
    figure = Figure(
        [plots.render(drawing)],
        "Frames from one image to another: a plain blend, and morphs along a line of features",
        f"{count} pairs of images of different classes, {frames} frames each. Every frame of a "
        f"morph is an image near the blend of the two whose features should lie on the straight "
        f"line between theirs. The class changes {times(changes)} on the way. The first row is the "
        f"plain blend of the first pair: the features of blends leave the line by up to "
        f"{percent(float(stray.max()))} of their length, and their class changes {times(blended)}. "
        f"Above each frame its class, in colour where it changes; below, by how much its features "
        f"miss the line, relative to their length.",
        f"Evaluated, not proved: {of(reached, inner.size, 'inner frames')} of morphs lie on the "
        f"line to 1 %, the worst misses it by {percent(float(inner.max()))}.{where} What happens "
        f"between two frames was not examined beyond one change of class.",
    )
    return Section(
        "morphs",
        "Morphs",
        title,
        "What lies between two images for the network? A line in feature space, taken back to "
        "pixels frame by frame.",
        [figure],
        [
            f"{sentence(of(reached, inner.size, 'frames'))} of morphs follow the line between two "
            f"images' features to 1 %; the frames of plain blends leave it by up to "
            f"{percent(float(stray.max()))}."
        ],
        [
            Certificate(
                "Images between two images",
                f"not proved; matched {of(reached, inner.size, 'frames')}",
                f"missed by {percent(float(inner.max()))}",
                str(inner.size - reached),
            )
        ],
        {
            "num_pairs": count,
            "num_frames": inner.size,
            "num_reached": reached,
            "worst_residual": float(inner.max()),
            "worst_residual_of_blends": float(stray.max()),
        },
    )


def ties(data: Data) -> Section:
    """Images at which several classes tie."""
    found, names = data["ties"], data["about"]["class_names"]
    title, count = "Ambiguous images", len(found["rows"])
    if count == 0:
        return Section("ties", "Ambiguous", title, "No image was tried.", [])
    bounds = tuple(data["about"]["options"]["bounds"])
    numbers = range(2, found["classes"].shape[1] + 1)
    after, distance, gap, status = (
        np.stack([found[f"tie{number}_{name}"] for number in numbers], axis=1)
        for name in ("image", "distance", "tie_gap", "status")
    )
    tied = status == Status.CONVERGED
    shown = np.unique(np.linspace(0, count - 1, min(count, 4)).round().astype(int))
    drawing = partial(
        plots_pixels.ties, found["before"][shown], after[shown], found["classes"][shown],
        distance[shown], tied[shown], names, bounds=bounds,
    )  # fmt: skip
    medians = [median(distance[tied[:, column], column]) for column in range(len(numbers))]
    reached = [
        f"{number} classes tie for {of(int(tied[:, column].sum()), count, 'images')}"
        + (f" ({medians[column]:.3g} away in the median)" if tied[:, column].any() else "")
        for column, number in enumerate(numbers)
    ]
    total = int(tied.sum())
    worst = float(gap[tied].max()) if total else np.nan
    return Section(
        "ties",
        "Ambiguous",
        title,
        "Images that the network cannot tell apart from several classes at once: its likeliest "
        "two, three, ... classes have the same logit, and no other class a larger one.",
        [
            Figure(
                [plots.render(drawing)],
                "Images, and images near them at which classes tie",
                sentence("; ".join(reached)) + ". Each column adds one class to the tie; below, "
                "the Euclidean distance in pixels from the image on the left.",
                (f"Evaluated: the tied logits differ by {worst:.1g} at most. " if total else "")
                + "The distances are upper bounds: a local search found these images, and nearer "
                "ones may exist.",
            )
        ],
        [
            sentence(of(total, tied.size, "ties"))
            + f" of {numbers[0]} to {numbers[-1]} classes were reached."
        ],
        [
            Certificate(
                "Images with tied classes",
                f"upper bounds of {of(total, tied.size)}",
                "no lower bound",
                str(tied.size - total),
            )
        ],
        {
            "num_images": count,
            "num_tied": tied.sum(axis=0).tolist(),
            "median_distances": medians,
            "largest_gap": worst,
        },
    )
