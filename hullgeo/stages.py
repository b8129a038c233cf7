"""The stages of an analysis, each one function from saved data to saved data.

To add one, write its function, put it into `STAGES` with what it reads, and give it a section in
`hullgeo.sections`.
"""

import numpy as np

from hullgeo import _plane, _statistics
from hullgeo.class_hulls import project_to_class_hulls
from hullgeo.features import extract_features
from hullgeo.head import boundary_distance
from hullgeo.hull import membership, project_to_hull
from hullgeo.prepare import prepare_hull
from hullgeo.stages_boundaries import BOUNDARY_STAGES
from hullgeo.stages_pixels import flips, gallery, inversion, morphs, pixel_plane, ties
from hullgeo.staging import Inputs, Stage, Values, head_of, in_blocks

_HULL_ROWS = 512
_BOUNDARY_ROWS = 8192
_NEAR_PLANE = 120
_GRID = 49  # points along a side of the plane that are asked for the hull


def features(inputs: Inputs) -> Values:
    """Features of all training and test images, `(n, dim)`."""
    values = {}
    for name in ("train", "test"):
        found = _extract(inputs, inputs.data[name]["images"], inputs.progress)
        if not np.isfinite(found).all():
            row = int(np.argwhere(~np.isfinite(found))[0, 0])
            raise ValueError(
                f"Expected finite features of every image, got NaN or infinity for {name} image "
                f"{row}. Look at the network's parameters and at how the images are scaled."
            )
        values[name] = found
    return values


def _extract(inputs: Inputs, images: np.ndarray, progress: bool) -> np.ndarray:
    found = extract_features(
        inputs.data["network"]["classifier"],
        images,
        batch_size=inputs.batch_size,
        devices=inputs.devices,
        progress=progress,
    )
    return found.astype(np.promote_types(found.dtype, np.float32))


def confirm_features(inputs: Inputs, values: Values) -> bool:
    """Whether the network still gives the stored features on a few images.

    Its parameters are in the fingerprint, its code cannot be.
    """
    for name in ("train", "test"):
        images = inputs.data[name]["images"]
        rows = np.unique(np.linspace(0, len(images) - 1, 8).astype(int))
        fresh, stored = _extract(inputs, images[rows], False), values[name][rows]
        if fresh.shape != stored.shape:
            return False
        if not np.abs(fresh - stored).max() <= 1e-3 * np.abs(stored).max():
            return False
    return True


def accuracy(inputs: Inputs) -> Values:
    """Predicted classes, share correct, and the confusion matrix (rows: true class)."""
    head, values = head_of(inputs), {}
    for name in ("train", "test"):
        labels = inputs.data[name]["labels"]
        logits = in_blocks(
            lambda rows: {"logits": head(rows)}, inputs.data["features"][name], _BOUNDARY_ROWS
        )["logits"]
        predicted = logits.argmax(axis=1).astype(np.int32)
        values[f"{name}_predicted"] = predicted
        values[f"{name}_accuracy"] = float(np.mean(predicted == labels))
        values[f"{name}_correct"] = int(np.sum(predicted == labels))
    num_classes = head.kernel.shape[1]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (inputs.data["test"]["labels"], values["test_predicted"]), 1)
    return {**values, "confusion": confusion}


def statistics(inputs: Inputs) -> Values:
    """Spectrum, active units, intrinsic dimension and diameter of the training features."""
    train = inputs.data["features"]["train"]
    mean, variance = _statistics.spectrum(train)
    share = variance / max(float(variance.sum()), 1e-300)
    active = train > 0
    dimension = _statistics.two_nn(train)
    lower, upper = _statistics.diameter(train)
    if upper == 0:
        raise ValueError(
            "Expected the features of the training images to differ, got the same for all. The "
            "network may be untrained, or all its last units dead."
        )
    return {
        "mean": mean,
        "variance_share": share,
        "unit_active_share": active.mean(axis=0),
        "num_features": train.shape[1],
        "num_train": train.shape[0],
        "num_test": inputs.data["features"]["test"].shape[0],
        "nonnegative": bool((train >= 0).all()),
        "mean_active_units": float(active.sum(axis=1).mean()),
        "num_constant_units": int((np.ptp(train, axis=0) == 0).sum()),
        "participation_ratio": float(1.0 / np.sum(share**2)),
        "components_90": int(np.searchsorted(np.cumsum(share), 0.90) + 1),
        "components_99": int(np.searchsorted(np.cumsum(share), 0.99) + 1),
        "intrinsic_dimension": dimension.estimate,
        "intrinsic_standard_error": dimension.standard_error,
        "intrinsic_points": dimension.num_points,
        "diameter_lower": lower,
        "diameter_upper": upper,
    }


def hull(inputs: Inputs) -> Values:
    """Bracketed distance of every test image's features to the hull of all training features."""
    vertices, queries = _without_constants(inputs)
    prepared = prepare_hull(vertices)
    rtol, diameter = inputs.options["rtol"], inputs.data["statistics"]["diameter_lower"]

    def project(queries: np.ndarray) -> Values:
        found = project_to_hull(queries, prepared, rtol=rtol, atol=_atol(rtol, diameter))
        nearest, nearest_distance = _statistics.nearest(queries, vertices)
        return {
            "distance": found.distance,
            "lower": found.distance_lower_bound,
            "interior_radius": found.interior_radius,
            "gap": found.gap,
            "num_steps": found.num_steps,
            "status": found.status,
            "verdict": membership(found),
            "nearest": nearest,
            "nearest_distance": nearest_distance,
            **_largest_weights(np.asarray(found.support), np.asarray(found.weights)),
        }

    return inputs.chunks(project, queries, _HULL_ROWS)


def class_hulls(inputs: Inputs) -> Values:
    """Bracketed distance of every test image's features to the hull of each class, `(n, K)`."""
    vertices, queries = _without_constants(inputs)
    labels = inputs.data["train"]["labels"]
    num_classes = inputs.data["head"]["kernel"].shape[1]
    rtol, diameter = inputs.options["rtol"], inputs.data["statistics"]["diameter_lower"]

    def project(queries: np.ndarray) -> Values:
        found = project_to_class_hulls(
            queries, vertices, labels, num_classes, rtol=rtol, atol=_atol(rtol, diameter)
        )
        return {
            "distance": found.distance,
            "lower": found.distance_lower_bound,
            "status": found.status,
        }

    return inputs.chunks(project, queries, _HULL_ROWS)


def boundary(inputs: Inputs) -> Values:
    """Distance of every image's features to the nearest decision boundary, and who is there."""
    head, values = head_of(inputs), {}
    for name in ("train", "test"):
        found = in_blocks(
            lambda rows: boundary_distance(rows, head)._asdict(),
            inputs.data["features"][name],
            _BOUNDARY_ROWS,
        )
        values.update({f"{name}_{field}": array for field, array in found.items()})
    return values


def plane(inputs: Inputs) -> Values:
    """The plane through the features of three images, its exact class cells, and who is near it."""
    head = head_of(inputs)
    points = np.asarray(inputs.data["features"]["test"], np.float64)
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    if points.shape[1] == 1:  # a line is shown as a plane on which the second axis changes nothing
        points, kernel = np.pad(points, ((0, 0), (0, 1))), np.pad(kernel, ((0, 1), (0, 0)))
    labels, predicted = inputs.data["test"]["labels"], inputs.data["accuracy"]["test_predicted"]
    near = inputs.data["boundary"]
    anchors = _plane.anchors(
        points, labels, predicted, near["test_label"], near["test_rival"], len(bias)
    )
    origin, axes = _plane.axes_through(points[anchors])
    coordinates = (points - origin) @ axes.T
    off_plane = np.linalg.norm(points - origin - coordinates @ axes, axis=1)
    corners = coordinates[anchors]
    middle, half = corners.mean(axis=0), 0.85 * np.ptp(corners, axis=0).max()
    half = half if half > 0 else 1.0
    view = np.stack([middle - half, middle + half])
    vertices, starts, classes = _plane.cell_polygons(origin @ kernel + bias, axes @ kernel, view)
    visible = np.flatnonzero(((coordinates >= view[0]) & (coordinates <= view[1])).all(axis=1))
    visible = np.setdiff1d(visible, anchors)
    shown = visible[
        np.argsort(off_plane[visible], kind="stable")[: min(_NEAR_PLANE, max(20, len(points) // 5))]
    ]
    return {
        "anchors": anchors,
        "anchor_images": inputs.data["test"]["images"][anchors],
        "corners": corners,
        "origin": origin,
        "axes": axes,
        "view": view,
        "polygon_vertices": vertices,
        "polygon_starts": starts,
        "polygon_classes": classes,
        "near_rows": shown,
        "near_coordinates": coordinates[shown],
        "near_off_plane": off_plane[shown],
    }


def plane_hull(inputs: Inputs) -> Values:
    """Where the hull of all training features cuts the plane, on a grid over the view.

    Rows of the grid follow the second axis upwards.
    """
    plane = inputs.data["plane"]
    train, kept = inputs.data["features"]["train"], _varying(inputs)
    across, up = np.linspace(plane["view"][0], plane["view"][1], _GRID).T
    places = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    # A line is shown as a plane with an axis of its own, on which features do not lie.
    queries = (plane["origin"] + places @ plane["axes"])[:, : train.shape[1]]
    prepared = prepare_hull(train[:, kept])

    def project(queries: np.ndarray) -> Values:
        found = project_to_hull(queries, prepared, verdict_only=True)
        return {"status": found.status, "verdict": membership(found)}

    found = in_blocks(project, queries[:, kept].astype(train.dtype), _HULL_ROWS)
    return {name: array.reshape(_GRID, _GRID) for name, array in found.items()}


def _without_constants(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Training and test features without the units that have one value on all of them.

    No distance changes, and the hull gains an interior in which a ball can be proved.
    """
    kept = _varying(inputs)
    return inputs.data["features"]["train"][:, kept], inputs.data["features"]["test"][:, kept]


def _varying(inputs: Inputs) -> np.ndarray:
    train, test = inputs.data["features"]["train"], inputs.data["features"]["test"]
    return (np.ptp(train, axis=0) > 0) | (test != train[0]).any(axis=0)


def _atol(rtol: float, diameter: float) -> float:
    """Stop inside the hull at a distance of `sqrt(rtol)` thousandths of the diameter."""
    return 0.5 * rtol * (1e-3 * diameter) ** 2


def _largest_weights(support: np.ndarray, weights: np.ndarray, count: int = 4) -> Values:
    """The vertices that contribute most to each nearest point."""
    count = min(count, weights.shape[-1])
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :count]
    return {
        "support": np.take_along_axis(support, order, axis=-1),
        "weights": np.take_along_axis(weights, order, axis=-1),
    }


STAGES = (
    Stage("features", features, ("network", "train", "test"), confirm=confirm_features),
    Stage("accuracy", accuracy, ("features", "head", "train", "test")),
    Stage("statistics", statistics, ("features",)),
    Stage("hull", hull, ("features", "statistics"), ("rtol",)),
    Stage("class_hulls", class_hulls, ("features", "statistics", "head", "train"), ("rtol",)),
    Stage("boundary", boundary, ("features", "head")),
    *BOUNDARY_STAGES,
    Stage(
        "gallery",
        gallery,
        ("train", "test", "accuracy", "hull", "boundary"),
        ("num_shown",),
    ),
    Stage(
        "inversion",
        inversion,
        ("network", "head", "test", "features", "accuracy", "boundary"),
        ("num_inversions", "inversion_steps", "bounds"),
    ),
    Stage(
        "flips",
        flips,
        ("network", "test"),
        ("num_flips", "bounds"),
    ),
    Stage("morphs", morphs, ("network", "test", "accuracy"), ("num_morphs", "bounds")),
    Stage(
        "ties",
        ties,
        ("network", "head", "test", "features", "accuracy", "boundary"),
        ("num_ties", "bounds"),
    ),
    Stage("plane", plane, ("head", "test", "features", "accuracy", "boundary")),
    Stage("plane_hull", plane_hull, ("features", "plane")),
    Stage("pixel_plane", pixel_plane, ("network", "test", "accuracy", "plane"), ("bounds",)),
)
