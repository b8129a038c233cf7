"""The stages of an analysis that return images, each from saved data to saved data."""

import numpy as np

from hullgeo.features import LinearHead
from hullgeo.flip import nearest_flip
from hullgeo.inversion import invert_features
from hullgeo.result import Membership
from hullgeo.staging import Inputs, Values, head_of


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
    """A few nearest boundary points taken back to pixels, from easy to hard."""
    head, classifier = head_of(inputs), inputs.data["network"]["classifier"]
    images, near = inputs.data["test"]["images"], inputs.data["boundary"]
    rows = _from_easy_to_hard(inputs)
    if len(rows) == 0:
        return {"rows": rows}
    label, rival = near["test_label"][rows], near["test_rival"][rows]
    target = _boundary_points(inputs.data["features"]["test"][rows], label, rival, head)
    found = invert_features(
        classifier.features,
        target,
        images[rows],
        bounds=inputs.options["bounds"],
        max_steps=inputs.options["inversion_steps"],
    )
    logits = np.asarray(head(found.features), np.float64)
    before = np.asarray(head(inputs.data["features"]["test"][rows]), np.float64)
    index = np.arange(len(rows))
    gap_after = logits[index, label] - logits[index, rival]
    return {
        "rows": rows,
        "before": images[rows],
        "after": np.asarray(found.image),
        "target": target,
        "residual": np.asarray(found.residual),
        "pixel_distance": np.asarray(found.pixel_distance),
        "active": np.asarray(found.active),
        "num_gradients": np.asarray(found.num_gradients),
        "status": np.asarray(found.status),
        "label": label,
        "rival": rival,
        "label_after": logits.argmax(axis=1).astype(np.int32),
        "gap_closed": 1.0 - gap_after / (before[index, label] - before[index, rival]),
        "feature_distance": near["test_distance"][rows],
    }


def flips(inputs: Inputs) -> Values:
    """The nearest flips found of a few images, from easy to hard."""
    rows = _from_easy_to_hard(inputs)
    if len(rows) == 0:
        return {"rows": rows}
    images = inputs.data["test"]["images"][rows]
    classifier, bounds = inputs.data["network"]["classifier"], inputs.options["bounds"]
    found = nearest_flip(classifier, images, bounds=bounds)
    return {"rows": rows, "before": images} | {
        name: np.asarray(value) for name, value in found._asdict().items()
    }


def _from_easy_to_hard(inputs: Inputs) -> np.ndarray:
    """Rows of correctly classified test images, evenly by their distance to the boundary."""
    near = inputs.data["boundary"]
    correct = inputs.data["accuracy"]["test_predicted"] == inputs.data["test"]["labels"]
    usable = np.flatnonzero(correct & np.isfinite(near["test_distance"]))
    order = usable[np.argsort(near["test_distance"][usable], kind="stable")]
    count = min(inputs.options["num_inversions"], len(order))
    return order[np.rint(np.linspace(0.05, 0.95, count) * (len(order) - 1)).astype(int)]


def _boundary_points(
    points: np.ndarray, label: np.ndarray, rival: np.ndarray, head: LinearHead
) -> np.ndarray:
    """The foot of each point on the plane where its class and its rival tie."""
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    wide = np.asarray(points, np.float64)
    normal = (kernel[:, label] - kernel[:, rival]).T
    gap = np.sum(wide * normal, axis=1) + bias[label] - bias[rival]
    return (wide - (gap / np.sum(normal**2, axis=1))[:, None] * normal).astype(points.dtype)
