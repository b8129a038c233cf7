"""The stages of an analysis about cells, boundaries and regions, from saved data to saved data.

All of them are exact geometry of the head: they see features, never images.
"""

from itertools import combinations
from typing import Any

import numpy as np

from hullgeo import ties
from hullgeo.guarantee import hull_guarantee, region_membership
from hullgeo.hull_pairs import hull_to_hull
from hullgeo.nearest import nearest_boundary_point
from hullgeo.partition import partition
from hullgeo.staging import Inputs, Stage, Values, head_of

_ROWS = 2048
_MOST_TIES = 11  # classes whose sets are all looked at: 2,036 sets of two or more
_MOST_CELLS = 64  # classes for which the cells within the hull of all training features are settled
_PARTITION = (
    "nonempty",
    "bounded",
    "radius",
    "facet",
    "margin",
    "evidence",
    "cell_status",
    "status",
)


def cells(inputs: Inputs) -> Values:
    """Cells and facets in all of feature space, the orthant, a box and the hull of training data.

    The box reaches from the least to the greatest value of each unit on the training images. The
    orthant is left out where features can be negative, the hull where there are many classes.
    """
    head, train = head_of(inputs), inputs.data["features"]["train"]
    domains: dict[str, dict[str, Any]] = {"space": {}}
    if inputs.data["statistics"]["nonnegative"]:
        domains["orthant"] = {"lower": 0.0}
    domains["box"] = {"lower": train.min(axis=0), "upper": train.max(axis=0)}
    if head.kernel.shape[1] <= _MOST_CELLS:
        domains["hull"] = {"hull": train}
    values: Values = {"domains": list(domains)}
    for name, options in domains.items():
        found = partition(head, **options, progress=inputs.progress)
        values.update(
            {f"{name}_{field}": np.asarray(getattr(found, field)) for field in _PARTITION}
        )
        values[f"{name}_counts"] = found.counts
    return values


def nearest(inputs: Inputs) -> Values:
    """Nearest boundary points of the test features that respect the sign of the features."""
    head, rows = head_of(inputs), inputs.data["features"]["test"]
    lower = 0.0 if inputs.data["statistics"]["nonnegative"] else None

    def solve(block: np.ndarray) -> Values:
        found = nearest_boundary_point(block, head, lower=lower)
        return {
            "distance": found.distance,
            "lower": found.distance_lower_bound,
            "label": found.label,
            "rival": found.rival,
            "kkt_residual": found.kkt_residual,
            "status": found.status,
        }

    return {**inputs.chunks(solve, rows, _ROWS), "orthant": lower is not None}


def tie_map(inputs: Inputs) -> Values:
    """For every set of classes, whether all of it can tie without being exceeded, and how near.

    The distance is that from the mean of the training features, in the space or orthant that the
    features live in and in the box of their ranges.
    """
    head = head_of(inputs)
    num_classes = head.kernel.shape[1]
    middle = inputs.data["statistics"]["mean"].astype(inputs.data["features"]["train"].dtype)
    lower = 0.0 if inputs.data["statistics"]["nonnegative"] else None
    values: Values = {"sets": np.zeros((0, num_classes), bool), "orthant": lower is not None}
    if not 2 <= num_classes <= _MOST_TIES:
        return values
    train = inputs.data["features"]["train"]
    free = np.full(len(middle), np.inf, middle.dtype)
    sides = {
        "domain": (-free if lower is None else 0 * middle, free),
        "box": (train.min(axis=0), train.max(axis=0)),
    }
    for name, (low, high) in sides.items():
        found = ties.tie_map(head, query=middle, lower=low, upper=high)
        values["sets"] = np.asarray(found.classes)
        values[f"{name}_distance"] = np.asarray(found.tie.distance)
        values[f"{name}_lower"] = np.asarray(found.tie.distance_lower_bound)
        values[f"{name}_status"] = np.asarray(found.status)
    return values


def regions(inputs: Inputs) -> Values:
    """Regions of certain class that the training features span, and the distances between them.

    A class' region is spanned by the training features that the network gives to the class.
    """
    head = head_of(inputs)
    train, test = inputs.data["features"]["train"], inputs.data["features"]["test"]
    predicted = inputs.data["accuracy"]["train_predicted"]
    num_classes = head.kernel.shape[1]
    guarantee = hull_guarantee(train, predicted, head)
    found = inputs.chunks(lambda rows: region_membership(rows, train, head)._asdict(), test, _ROWS)
    values = {
        "margin": np.asarray(guarantee.margin),
        "boundary": np.asarray(guarantee.distance),
        "certain": np.asarray(guarantee.certain),
        "num_vertices": np.asarray(guarantee.num_vertices),
        **found,
    }
    values.update(_between(train, predicted, num_classes))
    return values


def _between(train: np.ndarray, predicted: np.ndarray, num_classes: int) -> Values:
    """Distances between the hulls of the classes; NaN for pairs that are not looked at."""
    members = [np.flatnonzero(predicted == label) for label in range(num_classes)]
    size = max(map(len, members))
    usable = [label for label in range(num_classes) if len(members[label])]
    distance, lower, overlap = np.full((3, num_classes, num_classes), np.nan)
    status = np.zeros((num_classes, num_classes), np.int32)
    for one, two in combinations(usable if num_classes <= _MOST_CELLS else (), 2):
        # Repeated vertices leave a hull as it is, and one size is compiled once.
        pair = hull_to_hull(*(train[np.resize(members[label], size)] for label in (one, two)))
        for matrix, value in (
            (distance, pair.distance), (lower, pair.distance_lower_bound),
            (overlap, pair.overlap), (status, pair.status),
        ):  # fmt: skip
            matrix[one, two] = matrix[two, one] = np.asarray(value)
    names = ("distance", "lower", "overlap", "status")
    return {
        f"between_{name}": matrix
        for name, matrix in zip(names, (distance, lower, overlap, status), strict=True)
    }


BOUNDARY_STAGES = (
    Stage("cells", cells, ("features", "head", "statistics")),
    Stage("nearest", nearest, ("features", "head", "statistics")),
    Stage("tie_map", tie_map, ("features", "head", "statistics")),
    Stage("regions", regions, ("features", "head", "accuracy")),
)
