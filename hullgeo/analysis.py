"""The whole analysis of one classifier: stages on disk, figures from them, one report.

Where do images lie relative to the training data and to the decision boundaries, in the space in
which the network classifies (arXiv:2202.04052)? Every stage's result is saved as soon as it is
there; a run that was killed goes on where it stopped, and a result is reused only where the images,
the labels, the network's parameters and the options it depends on are the same.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hullgeo import _check, _store
from hullgeo.features import Classifier
from hullgeo.stages import STAGES
from hullgeo.staging import Inputs, Stage, Values, apply_padded, join, load_stage


class Analysis(NamedTuple):
    """Where an analysis lies, and what it found.

    Attributes:
      out: the folder.
      report: the HTML report, one self-contained file.
      summary: the scalars of every stage, as in `summary.json`.
      computed: names of the stages that were computed now, not read back.
    """

    out: Path
    report: Path
    summary: dict[str, Any]
    computed: tuple[str, ...]

    def load(self, stage: str) -> dict[str, Any]:
        """The saved arrays and scalars of a stage by name; see `load_stage`."""
        return load_stage(self.out, stage)


def analyze(
    classifier: Classifier,
    train: Any,
    test: Any,
    *,
    out: str | os.PathLike[str],
    title: str = "a classifier",
    class_names: Sequence[str] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    rtol: float = 1e-6,
    num_shown: int = 12,
    num_flips: int = 100,
    num_inversions: int = 6,
    inversion_steps: int = 60,
    num_morphs: int = 3,
    num_ties: int = 3,
    batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
    stages: Sequence[Stage] = STAGES,
) -> Analysis:
    """Analyse a classifier's feature space; save every array, draw figures, write one HTML report.

    Distances are Euclidean, in feature space, in the features' own units; the report divides them
    by the diameter of the training features' hull. Guarantees are those of the functions used
    (`project_to_hull`, `boundary_distance`, `invert_features`), saved beside their answers: a
    bracket for every hull distance, and a status for every row. After arXiv:2202.04052.

    Args:
      classifier: features and a linear head.
      train: a pair of images `(n, height, width, channels)`, floating point within `bounds`, and
        integer labels `(n,)`; their features span the hulls.
      test: likewise; every test image is located relative to the training images.
      out: folder for `data/<stage>.npz`, `summary.json` and `report.html`, made if missing. Results
        in it are reused if they answer the same question, and replaced otherwise.
      title: what the report calls the network and its data.
      class_names: one name a class; the numbers if None.
      bounds: smallest and largest value of a pixel.
      rtol: relative tolerance of squared hull distances.
      num_shown: images in each gallery.
      num_flips: test images, spread evenly, whose nearest flips are searched.
      num_inversions: nearest boundary points that are taken back to pixels.
      inversion_steps: Gauss-Newton steps for each of them.
      num_morphs: pairs of test images between which morphs are made.
      num_ties: images that are moved to ties of two, three and four classes.
      batch_size: images that pass through the network at a time.
      devices: where the network runs; None for the default device.
      progress: show progress bars.
      stages: the stages to compute, in order; those whose needs are all among them.

    Returns:
      an `Analysis`.

    Raises:
      ValueError: for images, labels, options or a folder that cannot be used, naming them.
      OSError: when the disk is full; finished stages are kept.
    """
    num_classes = classifier.head.kernel.shape[1]
    train, test = _checked_sets(train, test, bounds, num_classes)
    names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        _check.fail("class_names", names, f"to hold one name for each of {num_classes} classes")
    _check.nonnegative("rtol", rtol)
    for name, value, least in (
        ("num_shown", num_shown, 1), ("num_flips", num_flips, 0),
        ("num_inversions", num_inversions, 0), ("inversion_steps", inversion_steps, 1),
        ("num_morphs", num_morphs, 0), ("num_ties", num_ties, 0), ("batch_size", batch_size, 1),
    ):  # fmt: skip
        _check.at_least(name, value, least)

    options = {
        "bounds": [float(bound) for bound in bounds],
        "rtol": float(rtol),
        "num_shown": int(num_shown),
        "num_flips": int(num_flips),
        "num_inversions": int(num_inversions),
        "inversion_steps": int(inversion_steps),
        "num_morphs": int(num_morphs),
        "num_ties": int(num_ties),
    }
    kernel, bias = (np.asarray(part) for part in classifier.head)
    data: dict[str, Values] = {
        "network": {"classifier": classifier},
        "head": {"kernel": kernel, "bias": bias},
        "train": {"images": train[0], "labels": train[1]},
        "test": {"images": test[0], "labels": test[1]},
    }
    digests = {name: _store.digest(data[name]) for name in ("head", "train", "test")}
    digests["network"] = _store.digest([_bits(leaf) for leaf in jax.tree.leaves(classifier)])

    folder = _store.prepare_folder(out)
    saved = _store.prepare_folder(folder / "data")
    about = {
        "title": title,
        "class_names": [str(name) for name in names],
        "options": {**options, "batch_size": int(batch_size)},
        "digests": dict(digests),
        "image_shape": list(train[0].shape[1:]),
        "stages": [stage.name for stage in stages],
        "versions": _versions(),
    }
    _store.write(saved / "about.npz", None, about)
    _store.write(saved / "labels.npz", None, {"train_labels": train[1], "test_labels": test[1]})
    computed = []
    for stage in _with_progress(stages, progress):
        source = _source(stage, options, digests)
        path = saved / f"{stage.name}.npz"
        inputs = Inputs(
            data={name: data[name] for name in stage.needs},
            options=source["options"],
            chunks=_saved_chunks(path, source, progress),
            batch_size=batch_size,
            devices=devices,
            progress=progress,
        )
        found = _store.find(path, source)
        if found is None or (stage.confirm and not stage.confirm(inputs, found.values)):
            start = time.perf_counter()
            values = stage.compute(inputs)
            found = _store.write(path, source, values, seconds=time.perf_counter() - start)
            computed.append(stage.name)
        for block in saved.glob(f"{stage.name}.block*.npz"):
            block.unlink(missing_ok=True)
        data[stage.name], digests[stage.name] = found.values, found.digest

    from hullgeo.report import write_report

    report, summary = write_report(folder)
    return Analysis(folder, report, summary, tuple(computed))


def _source(stage: Stage, options: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """Everything that a stage's result depends on."""
    import hullgeo

    return {
        "version": hullgeo.__version__,
        "stage": stage.name,
        "options": {name: options[name] for name in stage.options},
        "needs": {name: digests[name] for name in stage.needs},
    }


def _saved_chunks(path: Path, source: dict[str, Any], progress: bool) -> Callable[..., Values]:
    """Blocks of rows, each saved when it is done, so that a killed run repeats at most one."""

    def chunks(function: Callable[[np.ndarray], Values], rows: np.ndarray, size: int) -> Values:
        starts = range(0, len(rows), size)
        blocks = []
        for start in _with_progress(starts, progress and len(starts) > 1, f"{path.stem}, blocks"):
            block_source = {**source, "block": [start, size]}
            block_path = path.with_name(f"{path.stem}.block{start}.npz")
            found = _store.find(block_path, block_source) if len(starts) > 1 else None
            if found is None:
                values = apply_padded(function, rows[start : start + size], size, len(rows))
                found = _store.Stored(values, "", block_source, 0.0)
                if len(starts) > 1:
                    _store.write(block_path, block_source, values)
            blocks.append(found.values)
        return join(blocks)

    return chunks


def _with_progress(steps: Sequence[Any], progress: bool, name: str = "analysis") -> Any:
    from tqdm.auto import tqdm

    bar = tqdm(steps, desc=name, disable=not progress, leave=name == "analysis")
    for step in bar:
        if isinstance(step, Stage):
            bar.set_description(f"{name}: {step.name}")
        yield step


def _checked_sets(
    train: Any, test: Any, bounds: Any, num_classes: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images and labels that every stage can take, as NumPy arrays."""
    if not (np.shape(bounds) == (2,) and np.isfinite(bounds).all() and bounds[0] < bounds[1]):
        _check.fail("bounds", bounds, "to be two numbers (lower, upper), lower < upper")
    train, test = _checked_pair("train", train, bounds), _checked_pair("test", test, bounds)
    if test[0].shape[1:] != train[0].shape[1:]:
        axes = ", ".join(map(str, train[0].shape[1:]))
        _check.fail("test[0].shape", test[0].shape, f"to be (n, {axes}) as in train[0]")
    for name, (_, labels) in (("train", train), ("test", test)):
        if labels.max() >= num_classes:
            limit = f"to be below the number of the head's classes, {num_classes}"
            _check.fail(f"{name}[1].max()", int(labels.max()), limit)
    return train, test


def _checked_pair(name: str, pair: Any, bounds: Any) -> tuple[np.ndarray, np.ndarray]:
    """One pair of images and labels."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        _check.fail(name, type(pair).__name__, "to be a pair (images, labels)")
    images, labels = (np.asarray(part) for part in pair)
    _check.shape(f"{name}[0]", images, (None,) * 4, "(n, height, width, channels), n >= 1")
    _check.floating(f"{name}[0]", images)
    _check.shape(f"{name}[1]", labels, (len(images),), f"({len(images)},), one label an image")
    if not np.issubdtype(labels.dtype, np.integer):
        _check.fail(f"{name}[1].dtype", str(labels.dtype), "to be an integer type")
    if labels.min() < 0:
        _check.fail(f"{name}[1].min()", int(labels.min()), "to be >= 0")
    for start in range(0, len(images), 4096):
        _check_values(name, images[start : start + 4096], start, bounds)
    return images, labels


def _check_values(name: str, block: np.ndarray, start: int, bounds: Any) -> None:
    """Name the first image that holds NaN, infinity, or a value outside the bounds."""
    lower, upper = bounds
    bad = ~((block >= lower) & (block <= upper))
    if not bad.any():
        return
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    value = float(block[index])
    where = f"{name}[0][{start + index[0]}, {index[1]}, {index[2]}, {index[3]}]"
    if np.isfinite(value):
        _check.fail(
            where, value, f"to lie within bounds={tuple(bounds)}",
            "Pass bounds=(smallest, largest) for images in other units.",
        )  # fmt: skip
    _check.fail(where, value, "to be finite")


def _bits(leaf: Any) -> np.ndarray:
    """A parameter as an array, random keys included."""
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    import hullgeo

    packages = ("jax", "jaxlib", "flax", "numpy", "scipy", "matplotlib")
    return {
        "hullgeo": hullgeo.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
    }
