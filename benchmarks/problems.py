"""The problem set of the hull benchmarks: vertices, queries, and how they are scaled.

| name | vertices | what |
| --- | --- | --- |
| a | 1,500 x 64 | scikit-learn's digits, pixels; queries are the other 297 |
| b | 5,000 x 64 | ten Gaussian clusters |
| c | 5,000 x 512 | features like those after a ReLU: 64 latent dimensions and noise |
| d | 1,000 x 2,048 | the same |
| e | 60,000 x 512 | the same |
| r | 50,000 x 64 | features of CIFAR-10's ResNet-20: training against 10,000 test images |
| p | 50,000 x 3,072 | pixels of CIFAR-10: training against 10,000 test images |

All are float32, centred at the mean of the vertices and scaled to largest norm 1 in float64 before
they are rounded. r and p need the data of HULLGEO_DATA; r's features are computed once and kept in
`results/cache`.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

CACHE = Path(__file__).parent.parent / "results" / "cache"
NAMES = ("a", "b", "c", "d", "e", "r", "p")


class Problem(NamedTuple):
    """Vertices and queries of a benchmark.

    Attributes:
      name: a key of the table above.
      vertices: `(n, d)` float32, centred, largest norm 1.
      queries: `(m, d)` float32, on the same scale.
    """

    name: str
    vertices: np.ndarray
    queries: np.ndarray


def load(name: str, num_queries: int = 256) -> Problem:
    """One problem, with as many queries as asked for or as there are.

    Args:
      name: one of `NAMES`.
      num_queries: at most that many queries.

    Raises:
      ValueError: unknown name.
      FileNotFoundError: r or p without HULLGEO_DATA.
    """
    if name not in NAMES:
        raise ValueError(f"Expected name to be one of {', '.join(NAMES)}, got name={name!r}.")
    vertices, queries = _MAKE[name](num_queries)
    vertices, queries = vertices.astype(np.float64), queries[:num_queries].astype(np.float64)
    center = vertices.mean(axis=0)
    radius = np.linalg.norm(vertices - center, axis=1).max()
    return Problem(
        name,
        ((vertices - center) / radius).astype(np.float32),
        ((queries - center) / radius).astype(np.float32),
    )


def _digits(num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels = load_digits(return_X_y=True)[0]
    return pixels[:1500], pixels[1500:]


def _clusters(num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centers = 2 * rng.normal(size=(10, 64))
    points = centers[rng.integers(10, size=5000 + num_queries)]
    points += rng.normal(size=points.shape)
    return points[:5000], points[5000:]


def _relu_features(size: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(64, dim)).astype(np.float32) / 8
    centers = rng.normal(size=(10, 64)).astype(np.float32)
    labels = rng.integers(10, size=size + num_queries)
    latent = centers[labels] + rng.normal(size=(len(labels), 64)).astype(np.float32)
    noise = 0.1 * rng.normal(size=(len(labels), dim)).astype(np.float32)
    points = np.maximum(latent @ weights + noise, 0)
    return points[:size], points[size:]


def _resnet20(num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    path = CACHE / "resnet20_features.npz"
    if not path.exists():
        import hullgeo
        from experiments.data import cifar10
        from experiments.resnet20_cifar10 import resnet20

        _require_data()
        arrays = {}
        classifier = resnet20(cifar10("test").images[:8])
        for split in ("train", "test"):
            images = cifar10(split).images
            arrays[split] = np.asarray(hullgeo.extract_features(classifier, images, batch_size=500))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, **arrays)
        unfinished.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return stored["train"], stored["test"]


def _pixels(num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    from experiments.data import cifar10

    _require_data()
    train, test = cifar10("train").images, cifar10("test").images[:num_queries]
    return train.reshape(len(train), -1), test.reshape(len(test), -1)


def _require_data() -> None:
    if not os.environ.get("HULLGEO_DATA"):
        raise FileNotFoundError(
            "Expected HULLGEO_DATA to name the folder of CIFAR-10 and the published weights."
        )


_MAKE = {
    "a": _digits,
    "b": _clusters,
    "c": lambda num_queries: _relu_features(5000, 512, num_queries),
    "d": lambda num_queries: _relu_features(1000, 2048, num_queries),
    "e": lambda num_queries: _relu_features(60_000, 512, num_queries),
    "r": _resnet20,
    "p": _pixels,
}
