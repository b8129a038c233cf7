"""The experiments' images: formats, errors, and a set really written by tensorflow-datasets."""

import importlib.util
import sys
import textwrap

import numpy as np
import pytest

from experiments import data


def test_digits_are_scikit_learns_in_two_disjoint_parts():
    from sklearn.datasets import load_digits

    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.float32
    assert train.labels.dtype == np.int32
    assert np.bincount(test.labels).min() >= 34
    theirs = load_digits()
    rows = np.concatenate([np.column_stack([part.images.reshape(-1, 64) * 16, part.labels])
                           for part in (train, test)])  # fmt: skip
    expected = np.column_stack([theirs.data, theirs.target])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(expected, axis=0))
    np.testing.assert_array_equal(data.digits("test").images, test.images)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnist", "test", r"name to be one of 'digits', .* or 'tfds:<name>', got name='mnist'"),
        ("digits", "valid", "split to be 'train' or 'test', got split='valid'"),
        ("cifar10", "valid", "split to be 'train' or 'test'"),
        ("fashion_mnist", "valid", "split to be 'train' or 'test'"),
    ],
)
def test_unknown_names_and_splits(name, split, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, split)


@pytest.mark.parametrize("folder", [None, "", "missing"])
def test_an_unset_folder_is_named_with_the_way_out(monkeypatch, tmp_path, folder):
    if folder is None:
        monkeypatch.delenv("HULLGEO_DATA", raising=False)
    else:
        monkeypatch.setenv("HULLGEO_DATA", folder and str(tmp_path / folder))
    for read in (
        lambda: data.load("cifar10", "test"),
        lambda: data.fashion_mnist("test"),
        lambda: data.published_weights("resnet20_cifar10"),
    ):
        with pytest.raises(ValueError, match=r"variable HULLGEO_DATA .* load\('digits', ...\)"):
            read()
    with pytest.raises(ValueError, match=r"resnet20_cifar10.*got name='resnet50'"):
        data.published_weights("resnet50")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HULLGEO_DATA", str(tmp_path))
    return tmp_path


def filtered(images):
    """CIFAR-10 images (n, 32, 32, 3) as the files keep them, by differences modulo 256."""
    red, green, blue = np.moveaxis(images.astype(int), -1, 0)
    planes = np.stack([red - green, green, blue - green], axis=1)
    for axis in (3, 2):
        planes = np.diff(planes, axis=axis, prepend=0)
    return (planes % 256).astype(np.uint8)


def test_cifar10_is_decoded(folder):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3))
    labels = rng.integers(0, 10, 30).astype(np.uint8)
    lossless = np.arange(30) % 7 > 0
    for part in range(5):
        rows = slice(6 * part, 6 * part + 6)
        np.savez(
            folder / f"cifar10_train_{part + 1}.npz",
            planes=filtered(images[rows]), labels=labels[rows], lossless=lossless[rows],
        )  # fmt: skip
    found = data.cifar10("train")
    assert found.images.dtype == np.float32
    np.testing.assert_array_equal(found.images, (images / 255).astype(np.float32))
    np.testing.assert_array_equal(found.labels, labels)
    kept = data.cifar10("train", lossless_only=True)
    np.testing.assert_array_equal(kept.labels, labels[lossless])
    np.testing.assert_array_equal(kept.images, found.images[lossless])
    with pytest.raises(ValueError, match=r"cifar10_test.npz, which is not there; see HULLGEO_DATA"):
        data.cifar10("test")


def corrupt(path, how):
    arrays = {"x_test": np.zeros((9, 28, 28), np.uint8), "y_test": np.zeros(9, np.uint8)}
    if how == "missing array":
        del arrays["y_test"]
    elif how == "other shape":
        arrays["x_test"] = arrays["x_test"][..., 0]
    elif how == "other length":
        arrays["y_test"] = arrays["y_test"][1:]
    elif how == "pickled":
        arrays["y_test"] = np.array([object()])
    np.savez_compressed(path, **arrays)
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = content.index(b"x_test.npy") + 60
        path.write_bytes(content[:middle] + bytes(16) + content[middle + 16 :])
    elif how == "text":
        path.write_text("<html>not found</html>")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "single array":
        with path.open("wb") as file:
            np.save(file, arrays["x_test"])


@pytest.mark.parametrize(
    "how",
    [
        "missing array", "other shape", "other length", "pickled", "cut", "flipped", "text",
        "empty", "single array",
    ],
)  # fmt: skip
def test_corrupt_files_are_named(folder, how):
    path = folder / "fashion_mnist.npz"
    corrupt(path, how)
    with pytest.raises(ValueError, match=r"Expected .*fashion_mnist\.npz to .*, got"):
        data.load("fashion_mnist", "test")
    corrupt(path, "not at all")
    assert data.load("fashion_mnist", "test").images.shape == (9, 28, 28, 1)


BUILDER = """
    import numpy as np
    import tensorflow_datasets as tfds

    class {name}(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({{
                    "image": tfds.features.{feature},
                    "label": tfds.features.Tensor(shape=(), dtype=np.int64),
                }}),
                supervised_keys={keys},
            )

        def _split_generators(self, dl_manager):
            return {{"train": self._generate_examples(7), "test": self._generate_examples(3)}}

        def _generate_examples(self, count):
            for i in range(count):
                shape = [size or 1 + i for size in {shape}]
                yield i, {{"image": np.full(shape, 20 * i, np.uint8), "label": i % 3}}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A package with builders, and the folder in which their sets are kept."""
    root = tmp_path_factory.mktemp("tfds")
    package = root / "written_sets"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, shape, keys in (
        ("Tiny", (4, 5, 3), ("image", "label")),
        ("Gray", (4, 5), None),
        ("Ragged", (None, 5, 3), None),
        ("Unlabelled", (4, 5, 3), ("image", "mask")),
        ("Encoded", (4, 5, 3), None),
    ):
        kind = "Image(shape={0})" if name == "Encoded" else "Tensor(shape={0}, dtype=np.uint8)"
        source = textwrap.dedent(BUILDER).format(
            name=name, shape=shape, keys=keys, feature=kind.format(shape)
        )
        (package / f"{name.lower()}.py").write_text(source)
    sys.path.insert(0, str(root))
    try:
        for name in ("tiny", "gray", "ragged", "unlabelled", "encoded"):
            __import__(f"written_sets.{name}")
        yield root / "data"
    finally:
        sys.path.remove(str(root))


def test_a_written_set_is_read_without_tensorflow(written):
    train = data.tfds_images("tiny", "train", data_dir=written)
    assert train.images.shape == (7, 4, 5, 3)
    assert train.images.dtype == np.float32
    assert train.labels.dtype == np.int32
    number = np.sort(np.rint(train.images[:, 0, 0, 0] * 255 / 20))
    np.testing.assert_array_equal(number, np.arange(7))
    numbers = np.rint(train.images.mean((1, 2, 3)) * 255 / 20).astype(int)
    np.testing.assert_array_equal(train.labels, numbers % 3)
    part = data.tfds_images("tiny", "train[:2]", data_dir=written)
    np.testing.assert_array_equal(part.images, train.images[:2])
    assert data.tfds_images("gray", "test", data_dir=written).images.shape == (3, 4, 5, 1)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "tiny",
            "valid",
            r"split to be one of \['test', 'train'\] or a slice .* got split='valid'",
        ),
        ("ragged", "train", r"images of name='ragged' to have one size, got 7 sizes"),
        ("unlabelled", "train", r"labelled images, got name='unlabelled' with the features image"),
        ("tinny", "train", r"a set of tensorflow-datasets, got name='tinny'. Did you mean .*tiny"),
    ],
)
def test_sets_that_are_no_labelled_images(written, name, split, message):
    with pytest.raises(ValueError, match=message):
        data.tfds_images(name, split, data_dir=written)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="has TensorFlow")
def test_a_set_that_needs_tensorflow_to_be_prepared(written):
    with pytest.raises(
        ValueError, match=r"(?s)got name='encoded': .*tensorflow.* `tfds build encoded"
    ):
        data.tfds_images("encoded", "train", data_dir=written)


def test_a_set_by_name(monkeypatch, written):
    monkeypatch.setenv("TFDS_DATA_DIR", str(written))
    with pytest.raises(ValueError, match="got name='no_such_set'"):
        data.load("tfds:no_such_set", "test")
