"""Labelled images for the experiments: float32 in [0, 1], NHWC, in a fixed order.

>>> images, labels = load("digits", "train")        # scikit-learn's handwriting, always there
>>> images, labels = load("tfds:mnist", "test")     # any image set of tensorflow-datasets
>>> images, labels = load("cifar10", "test")        # from the folder named by HULLGEO_DATA
>>> weights = published_weights("resnet20_cifar10")  # likewise

tensorflow-datasets is read through `as_data_source`, which needs no TensorFlow; it downloads and
prepares a set on first use, in its own folder.
"""

import difflib
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class ImageSet(NamedTuple):
    """Images and their classes.

    Attributes:
      images: float32 in [0, 1].
      labels: int32, counted from 0.
    """

    images: Float[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, "n"]


def load(name: str, split: str) -> ImageSet:
    """Images by name.

    Args:
      name: 'digits', 'cifar10', 'fashion_mnist', or 'tfds:' and a name of tensorflow-datasets.
      split: 'train' or 'test'; for tensorflow-datasets any of its splits, such as 'train[:1000]'.

    Raises:
      ValueError: for an unknown name or split, an unset `HULLGEO_DATA`, a missing or corrupt file.
    """
    if name.startswith("tfds:"):
        return tfds_images(name.removeprefix("tfds:"), split)
    readers: dict[str, Callable[[str], ImageSet]] = {
        "digits": digits,
        "cifar10": cifar10,
        "fashion_mnist": fashion_mnist,
    }
    if name not in readers:
        known = ", ".join(map(repr, readers))
        raise ValueError(
            f"Expected name to be one of {known}, or 'tfds:<name>', got name={name!r}."
        )
    return readers[name](split)


def digits(split: str) -> ImageSet:
    """Handwritten digits of scikit-learn, 8 x 8 x 1: 1,437 for training and 360 for testing.

    The split is stratified by class and seeded; scikit-learn's own order goes by writer.
    """
    _check_split(split)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    train, test = train_test_split(
        np.arange(len(data.target)), test_size=360, random_state=0, stratify=data.target
    )
    rows = np.sort(train if split == "train" else test)
    return _image_set(data.images[rows] / 16, data.target[rows])


def cifar10(split: str, *, lossless_only: bool = False) -> ImageSet:
    """CIFAR-10 in its original order, 32 x 32 x 3: 50,000 and 10,000 images of `HULLGEO_DATA`.

    Args:
      split: 'train' or 'test'.
      lossless_only: leave out the 111 images that are kept as JPEG copies.

    Raises:
      ValueError: for another split, an unset `HULLGEO_DATA`, a missing or corrupt file.
    """
    _check_split(split)
    parts = [""] if split == "test" else [f"_{part}" for part in range(1, 6)]
    images, labels = [], []
    for part in parts:
        path = _folder() / f"cifar10_{split}{part}.npz"
        data = _read_npz(path, ("planes", "labels", "lossless"))
        keep = data["lossless"] if lossless_only else np.ones_like(data["lossless"])
        _check_arrays(path, data["planes"], (3, 32, 32), data["labels"])
        images.append(_undo_filter(data["planes"][keep]))
        labels.append(data["labels"][keep])
    return _image_set(np.concatenate(images), np.concatenate(labels))


def fashion_mnist(split: str) -> ImageSet:
    """Fashion-MNIST, 28 x 28 x 1: 60,000 and 10,000 images of `HULLGEO_DATA`."""
    _check_split(split)
    path = _folder() / "fashion_mnist.npz"
    data = _read_npz(path, (f"x_{split}", f"y_{split}"))
    _check_arrays(path, data[f"x_{split}"], (28, 28), data[f"y_{split}"])
    return _image_set(data[f"x_{split}"], data[f"y_{split}"])


def tfds_images(name: str, split: str, *, data_dir: str | Path | None = None) -> ImageSet:
    """An image set of tensorflow-datasets, read without TensorFlow.

    Args:
      name: as tensorflow-datasets knows it, such as 'mnist' or 'cifar10:3.0.2'.
      split: one of its splits, or a slice of one such as 'test[:100]'.
      data_dir: where prepared sets are kept; its own default folder if None. A set that is not
        there is downloaded and prepared as `array_record`; only for this step do sets that encode
        their images from arrays, as MNIST's does, need TensorFlow.

    Raises:
      ValueError: for an unknown name or split, a set without one image and one label an example,
        with images of several sizes, or that cannot be prepared here.
    """
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"Expected name to be a set of tensorflow-datasets, got name={name!r}.{hint}"
        ) from error
    try:
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Expected name to be a set that is prepared already, or can be without TensorFlow, "
            f"got name={name!r}: {error}. Prepare it once where TensorFlow is installed, with "
            f"`tfds build {name} --file_format=array_record`, and copy its folder."
        ) from error
    image_key, label_key = _supervised_keys(name, builder.info)
    try:
        source: Sequence[Any] = builder.as_data_source(split)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"Expected split to be one of {sorted(builder.info.splits)} or a slice of one, "
            f"got split={split!r}."
        ) from error
    examples = [source[index] for index in range(len(source))]
    shapes = {np.shape(example[image_key]) for example in examples}
    if len(shapes) != 1:
        raise ValueError(
            f"Expected the images of name={name!r} to have one size, got {len(shapes)} sizes, "
            f"such as {sorted(shapes)[:3]}."
        )
    return _image_set(
        np.stack([example[image_key] for example in examples]),
        np.asarray([example[label_key] for example in examples]),
    )


def published_weights(name: str) -> dict[str, np.ndarray]:
    """Weights trained by others, by their PyTorch names and in PyTorch's layouts.

    Args:
      name: 'resnet20_cifar10' or 'crown_resnet2b'.

    Raises:
      ValueError: for another name, an unset `HULLGEO_DATA`, a missing or corrupt file.
    """
    known = ("resnet20_cifar10", "crown_resnet2b")
    if name not in known:
        raise ValueError(f"Expected name to be one of {known}, got name={name!r}.")
    return _read_npz(_folder() / f"{name}.npz")


def _folder() -> Path:
    """The folder of images and weights that are not part of the project."""
    folder = os.environ.get("HULLGEO_DATA")
    if not folder or not Path(folder).is_dir():
        raise ValueError(
            "Expected the environment variable HULLGEO_DATA to name the folder that holds the "
            f"images and published weights, got HULLGEO_DATA={folder!r}. "
            "Or use load('digits', ...) or load('tfds:<name>', ...)."
        )
    return Path(folder)


def _read_npz(path: Path, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file (all of them, or the named ones), or an error that names it."""
    if not path.is_file():
        raise ValueError(f"Expected the file {path}, which is not there; see HULLGEO_DATA.")
    try:
        with path.open("rb") as file:  # np.load leaves a broken file open
            data = np.load(file, allow_pickle=False)
            if not isinstance(data, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            return {key: data[key] for key in (data.files if keys is None else keys)}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        wanted = "" if keys is None else f" with the arrays {', '.join(keys)}"
        raise ValueError(
            f"Expected {path} to be a readable npz file{wanted}, got: {error}. Copy it again."
        ) from error


def _undo_filter(planes: np.ndarray) -> np.ndarray:
    """Stored planes to RGB, everything modulo 256.

    Stored are the second differences, down and across, of red - green, green and blue - green.
    """
    for axis in (2, 3):
        planes = np.add.accumulate(planes, axis=axis, dtype=np.uint8)
    red, green, blue = np.moveaxis(planes, 1, 0)
    return np.stack([red + green, green, blue + green], axis=-1)


def _image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """Bytes to [0, 1], a channel axis where there is none, one type each."""
    if images.ndim == 3:
        images = images[..., None]
    scale = 255 if images.dtype == np.uint8 else 1
    return ImageSet(np.divide(images, scale, dtype=np.float32), labels.astype(np.int32))


def _supervised_keys(name: str, info: Any) -> tuple[str, str]:
    """The names of image and label in a TFDS example."""
    keys = info.supervised_keys or ("image", "label")
    if len(keys) != 2 or any(key not in info.features for key in keys):
        raise ValueError(
            f"Expected name to be a set of labelled images, got name={name!r} with the features "
            f"{', '.join(info.features)}."
        )
    return keys


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"Expected split to be 'train' or 'test', got split={split!r}.")


def _check_arrays(path: Path, images: np.ndarray, shape: tuple[int, ...], labels: Any) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != shape or labels.shape != images.shape[:1]:
        raise ValueError(
            f"Expected {path} to hold bytes of shape (n, {', '.join(map(str, shape))}) and n "
            f"labels, got {images.dtype} {images.shape} and {labels.shape}."
        )
