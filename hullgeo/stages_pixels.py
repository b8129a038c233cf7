"""The stages of an analysis that return images, each from saved data to saved data."""

import jax
import numpy as np

from hullgeo.ambiguous import ambiguous_image
from hullgeo.flip import nearest_flip
from hullgeo.inversion import invert_features
from hullgeo.morph import morph
from hullgeo.nearest import nearest_boundary_point
from hullgeo.plane import plane_classes
from hullgeo.result import Membership
from hullgeo.staging import Inputs, Values, head_of

BUDGETS = (30, 100)  # gradients for each flip; the smaller shows how much the budget matters
_BLOCK = 50  # images whose flips are searched at once, and saved
_FEW = 10  # likewise for what needs Jacobians
_MOST_TIED = 4  # classes
_FRAMES = 9
_STEPS = 40  # of Gauss-Newton, for each of them
_MARGIN = 0.15  # around the three images of a plane, in units of their extent


def gallery(inputs: Inputs) -> Values:
    """The images worth looking at: most ambiguous, most extrapolated, most confidently wrong."""
    count = inputs.options["num_shown"]
    images, labels = inputs.data["test"]["images"], inputs.data["test"]["labels"]
    near = inputs.data["boundary"]["test_distance"]
    hull_data = inputs.data["hull"]
    wrong = np.flatnonzero(inputs.data["accuracy"]["test_predicted"] != labels)
    outside = np.flatnonzero(hull_data["verdict"] == Membership.OUTSIDE)
    extrapolated = outside[np.argsort(-hull_data["lower"][outside], kind="stable")[:count]]
    values = {
        "ambiguous": np.argsort(near, kind="stable")[:count],
        "extrapolated": extrapolated,
        "wrong": wrong[np.argsort(-near[wrong], kind="stable")[:count]],
    }
    shown = {f"{name}_images": images[rows] for name, rows in values.items()}
    parents = hull_data["support"][extrapolated]
    return {**values, **shown, "parent_images": inputs.data["train"]["images"][parents]}


def inversion(inputs: Inputs) -> Values:
    """Nearest boundary points taken back to pixels, from easy to hard.

    Where features are nonnegative, those that are exactly 0 stay so, if any boundary is met that
    way: a ReLU that is off passes no gradient, and no search that follows gradients switches it on.
    """
    head, classifier = head_of(inputs), inputs.data["network"]["classifier"]
    images, features = inputs.data["test"]["images"], inputs.data["features"]["test"]
    rows = _from_easy_to_hard(inputs, inputs.options["num_inversions"])
    if len(rows) == 0:
        return {"rows": rows}
    nonnegative = min(features.min(), inputs.data["features"]["train"].min()) >= 0
    lower = 0.0 if nonnegative else None

    @jax.jit
    @jax.vmap
    def nearest_within(features, upper):
        return nearest_boundary_point(features, head, lower=lower, upper=upper)

    def invert(block):
        start = features[block]
        nearest = nearest_boundary_point(start, head, lower=lower)
        off = nonnegative & (start == 0)
        near = nearest_within(start, np.where(off, 0.0, np.inf))
        met = np.isfinite(near.distance)
        near = jax.tree.map(
            lambda a, b: np.where(met.reshape(-1, *(1,) * (a.ndim - 1)), a, b), near, nearest
        )
        found = invert_features(
            classifier.features,
            near.point,
            images[block],
            bounds=inputs.options["bounds"],
            max_steps=inputs.options["inversion_steps"],
        )
        kept = ("residual", "pixel_distance", "active", "num_dead", "num_gradients", "status")
        return {
            "after": found.image,
            "after_features": found.features,
            "target": near.point,
            "label": near.label,
            "rival": near.rival,
            "feature_distance": near.distance,
            "num_off": np.where(met, off.sum(axis=1), 0),
            "nearest_distance": nearest.distance,
        } | {name: getattr(found, name) for name in kept}

    values = inputs.chunks(invert, rows, _FEW)
    before = np.asarray(head(features[rows]), np.float64)
    logits = np.asarray(head(values["after_features"]), np.float64)
    index, label, rival = np.arange(len(rows)), values["label"], values["rival"]
    gap, gap_after = (z[index, label] - z[index, rival] for z in (before, logits))
    return {
        "rows": rows,
        "before": images[rows],
        **values,
        "label_after": logits.argmax(axis=1).astype(np.int32),
        "gap_closed": 1.0 - gap_after / gap,
    }


def flips(inputs: Inputs) -> Values:
    """The nearest flips found, away from the labels, of images spread evenly over the test set."""
    images, labels = inputs.data["test"]["images"], inputs.data["test"]["labels"]
    classifier, bounds = inputs.data["network"]["classifier"], inputs.options["bounds"]
    count = min(inputs.options["num_flips"], len(images))
    rows = np.rint(np.linspace(0, len(images) - 1, count)).astype(int)
    if count == 0:
        return {"rows": rows}

    def search(block):
        few, most = (
            nearest_flip(
                classifier, images[block], labels=labels[block], bounds=bounds, budget=budget
            )
            for budget in BUDGETS
        )
        return most._asdict() | {
            "few_distance": few.distance,
            "few_num_gradients": few.num_gradients,
        }

    return {"rows": rows, "before": images[rows], **inputs.chunks(search, rows, _BLOCK)}


def morphs(inputs: Inputs) -> Values:
    """Morphs between random pairs of correctly classified images of different classes."""
    images, bounds = inputs.data["test"]["images"], inputs.options["bounds"]
    classifier = inputs.data["network"]["classifier"]
    predicted = inputs.data["accuracy"]["test_predicted"]
    correct = np.flatnonzero(predicted == inputs.data["test"]["labels"])
    order = np.random.default_rng(0).permutation(correct)
    half = len(order) // 2
    pairs = np.stack([order[:half], order[half : 2 * half]], axis=1)
    pairs = pairs[predicted[pairs[:, 0]] != predicted[pairs[:, 1]]][: inputs.options["num_morphs"]]
    if len(pairs) == 0:
        return {"pairs": pairs}

    def move(block):
        ends = images[block[:, 0]], images[block[:, 1]]
        options = {"num_frames": _FRAMES, "bounds": bounds}
        found = morph(classifier, *ends, max_steps=_STEPS, **options)
        blend = morph(classifier, *ends, path="pixels", **options)
        values = found._asdict()
        crossings = values.pop("crossings")
        return values | {
            "crossing_lower": crossings.lower,
            "crossing_upper": crossings.upper,
            "crossing_status": crossings.status,
            "blend_images": blend.images,
            "blend_labels": blend.labels,
            "blend_residual": blend.residual,
        }

    return {"pairs": pairs, **inputs.chunks(move, pairs, _FEW)}


def ties(inputs: Inputs) -> Values:
    """Images at which the two, three and four likeliest classes tie, from easy to hard."""
    images, classifier = inputs.data["test"]["images"], inputs.data["network"]["classifier"]
    head, bounds = head_of(inputs), inputs.options["bounds"]
    rows = _from_easy_to_hard(inputs, inputs.options["num_ties"])
    if len(rows) == 0:
        return {"rows": rows}
    logits = np.asarray(head(inputs.data["features"]["test"][rows]))
    order = np.argsort(-logits, axis=1, kind="stable").astype(np.int32)[:, :_MOST_TIED]

    def search(block):
        values: Values = {}
        start = images[rows[block]]
        for number in range(order.shape[1], 1, -1):  # a tie of many classes is one of fewer, too
            found = ambiguous_image(
                classifier, images[rows[block]], order[block, :number], start=start, bounds=bounds
            )
            values |= {f"tie{number}_{name}": array for name, array in found._asdict().items()}
            start = found.image
        return values

    found = inputs.chunks(search, np.arange(len(rows)), _FEW)
    return {"rows": rows, "before": images[rows], "classes": order, **found}


def pixel_plane(inputs: Inputs) -> Values:
    """Classes on the plane of pixels through the three images of the plane of features.

    `within` says at which points of the grid all pixels keep their bounds.
    """
    anchors = inputs.data["plane"]["anchors"]
    images = inputs.data["test"]["images"][anchors]
    lower, upper = inputs.options["bounds"]
    found = plane_classes(inputs.data["network"]["classifier"], images, margin=_MARGIN)
    across, up = np.linspace(found.view[0], found.view[1], len(found.classes)).T
    axes = found.axes.reshape(2, -1)
    column = found.origin.reshape(1, -1) + across[:, None] * axes[:1]
    slack = 1e-6 * (upper - lower)  # the images themselves may be off by rounding
    rows = [column + height * axes[1:] for height in up]
    within = [((row >= lower - slack) & (row <= upper + slack)).all(axis=1) for row in rows]
    return {
        "corners": found.corners,
        "corner_classes": inputs.data["accuracy"]["test_predicted"][anchors],
        "view": found.view,
        "classes": found.classes.astype(np.int16),
        "within": np.stack(within),
        "num_evaluations": found.num_evaluations,
        "status": found.status,
    }


def _from_easy_to_hard(inputs: Inputs, count: int) -> np.ndarray:
    """Rows of correctly classified test images, evenly by their distance to the boundary."""
    near = inputs.data["boundary"]
    correct = inputs.data["accuracy"]["test_predicted"] == inputs.data["test"]["labels"]
    usable = np.flatnonzero(correct & np.isfinite(near["test_distance"]))
    order = usable[np.argsort(near["test_distance"][usable], kind="stable")]
    count = min(count, len(order))
    return order[np.rint(np.linspace(0.05, 0.95, count) * (len(order) - 1)).astype(int)]
