"""Seeded hulls and queries that try to break a certificate.

Each kind makes one hull and a batch of queries; the kinds aim at what a proof by floating-point
arithmetic may get wrong: distances that drown in rounding, ties, dependent vertices, verdicts on
the boundary, cancellation by offsets, scales near the ends of a type, and orders of the vertices in
which the decisive ones are looked at last or share a slot.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from benchmarks.peers import make_wolfe


class Batch(NamedTuple):
    """One hull and its queries.

    Attributes:
      kind: a key of `KINDS`.
      vertices: `(n, d)` in the type under test.
      queries: `(batch, d)`, the same type or float64.
      weights: `(batch, n)` with `weights @ vertices == queries` exactly, where that is known.
    """

    kind: str
    vertices: np.ndarray
    queries: np.ndarray
    weights: np.ndarray | None = None


Shape = tuple[int, int]
Made = tuple[np.ndarray, np.ndarray, np.ndarray | None]
Maker = Callable[[np.random.Generator, Shape, int, Any], Made]

# Few shapes and pairs of types, so that few programs are compiled.
SHAPES: tuple[Shape, ...] = ((12, 3), (9, 16), (60, 8), (300, 24))
TYPES = (
    (np.float32, np.float64),
    (np.float32, np.float32),
    (np.float64, np.float64),
    (ml_dtypes.bfloat16, np.float64),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
)


def program(seed: int) -> int:
    """Seeds with the same number have the same shape and types."""
    return seed % (len(SHAPES) * len(TYPES))


def make(kind: str, seed: int, batch: int) -> Batch:
    """The batch of a kind that belongs to a seed: always the same one."""
    rng = np.random.default_rng([seed, *kind.encode()])
    shape = SHAPES[program(seed) % len(SHAPES)]
    types = TYPES[program(seed) // len(SHAPES)]
    vertices, queries, weights = KINDS[kind](rng, shape, batch, types[0])
    return Batch(kind, vertices.astype(types[0]), queries.astype(types[1]), weights)


def _general(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    return rng.normal(size=shape), 2 * rng.normal(size=(batch, shape[1])), None


def _boundary(
    rng: np.random.Generator, vertices: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the boundary and outward unit normals there."""
    solve = make_wolfe(vertices)
    points, normals = [], []
    center = vertices.mean(axis=0)
    spread = np.abs(vertices - center).max()
    while len(points) < batch:
        query = center + 4 * spread * rng.normal(size=vertices.shape[1])
        index, weights = solve(query)
        point = weights @ vertices[index]
        points.append(point)
        normals.append((query - point) / np.linalg.norm(query - point))
    return np.array(points), np.array(normals)


def _near(sign: float) -> Maker:
    def make_near(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
        vertices = rng.normal(size=shape).astype(dtype).astype(np.float64)
        points, normals = _boundary(rng, vertices, batch)
        radius = np.linalg.norm(vertices - vertices.mean(axis=0), axis=1).max()
        steps = radius * 10 ** rng.uniform(-9, -2, size=(batch, 1))
        return vertices, points + sign * steps * normals, None

    return make_near


def _inside(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    vertices = rng.normal(size=shape)
    return vertices, rng.dirichlet(np.full(len(vertices), 0.5), size=batch) @ vertices, None


def _duplicates(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    distinct = rng.normal(size=shape)[: max(2, shape[0] // 3)]
    vertices = distinct[rng.integers(len(distinct), size=shape[0])]
    noise = rng.choice([0.0, 1e-15, 1e-7, 1e-4], size=(shape[0], 1))
    return vertices + noise * rng.normal(size=shape), *_general(rng, shape, batch, dtype)[1:]


def _parallel(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    line = rng.normal(size=(2, shape[1]))
    place = rng.normal(size=(shape[0], 1))
    noise = 10.0 ** -rng.integers(2, 12)
    vertices = line[0] + place * line[1] + noise * rng.normal(size=shape)
    return vertices, line[0] + rng.normal(size=(batch, shape[1])), None


def _simplex(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    corners = rng.normal(size=(rng.integers(1, shape[1] + 2), shape[1]))
    vertices = corners[np.arange(shape[0]) % len(corners)].astype(dtype).astype(np.float64)
    mix = rng.dirichlet(np.ones(len(corners)), size=batch)
    away = rng.choice([0.0, 1e-6, 1.0], size=(batch, 1)) * rng.normal(size=(batch, shape[1]))
    return vertices, mix @ vertices[np.arange(len(corners)) % shape[0]] + away, None


def _at_a_vertex(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    vertices = rng.normal(size=shape).astype(dtype).astype(np.float64)
    place = rng.integers(shape[0], size=batch)
    return vertices, vertices[place], np.eye(shape[0])[place]


def _on_a_face(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    """Means of two or four vertices with small integer coordinates: exact in every type."""
    vertices = rng.integers(-8, 9, size=shape).astype(np.float64)
    count = rng.choice([2, 4])
    weights = np.zeros((batch, shape[0]))
    for row in weights:
        row[rng.choice(shape[0], size=count, replace=False)] = 1 / count
    return vertices, weights @ vertices, weights


def _integers(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    vertices = rng.integers(-2, 3, size=shape).astype(np.float64)
    return vertices, rng.integers(-4, 5, size=(batch, shape[1])).astype(np.float64), None


def _offset(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    vertices, queries, _ = _general(rng, shape, batch, dtype)
    radius = np.linalg.norm(vertices, axis=1).max()
    shift = 1e4 * radius * rng.choice([-1.0, 1.0], size=shape[1]) / shape[1] ** 0.5
    return vertices + shift, queries + shift, None


def _scaled(scale: float) -> Maker:
    def make_scaled(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
        vertices, queries, _ = _general(rng, shape, batch, dtype)
        return scale * vertices, scale * queries, None

    return make_scaled


def _uneven(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    vertices, queries, _ = _general(rng, shape, batch, dtype)
    scales = 10 ** rng.uniform(-6, 6, size=shape[1])
    return vertices * scales, queries * scales, None


def _heavy_tails(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    return rng.standard_t(1, size=shape), rng.standard_t(1, size=(batch, shape[1])), None


def _far(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    vertices, queries, _ = _general(rng, shape, batch, dtype)
    return vertices, queries * 10 ** rng.uniform(2, 8, size=(batch, 1)), None


def _flat(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    """Hulls without interior: dead coordinates, or a subspace; queries in it and next to it."""
    rank = rng.integers(1, shape[1])
    basis = rng.normal(size=(rank, shape[1]))
    if rng.random() < 0.5:
        basis = np.eye(shape[1])[rng.permutation(shape[1])[:rank]]
    vertices = rng.normal(size=(shape[0], rank)) @ basis
    queries = 0.5 * rng.normal(size=(batch, rank)) @ basis
    off = rng.choice([0.0, 1e-8, 1e-3], size=(batch, 1)) * rng.normal(size=(batch, shape[1]))
    return vertices, queries + off, None


def _ordered(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    """The decisive vertices first, last, or a fixed stride apart, for queries in one direction."""
    vertices = rng.normal(size=shape)
    direction = rng.normal(size=shape[1])
    order = np.argsort(vertices @ direction)
    arrangement = rng.integers(4)
    if arrangement == 1:
        order = order[::-1]
    elif arrangement > 1:
        stride = [32, 8][arrangement - 2]
        places = np.argsort(np.arange(shape[0]) % stride, kind="stable")
        order = order[np.argsort(places)]
    queries = 3 * direction + 0.3 * rng.normal(size=(batch, shape[1]))
    return vertices[order], queries, None


def _almost_tied(rng: np.random.Generator, shape: Shape, batch: int, dtype: Any) -> Made:
    """Vertices on a sphere around the query: all scores nearly equal, the optimum in the middle."""
    vertices = rng.normal(size=shape)
    vertices[:, 0] = 0
    vertices /= np.linalg.norm(vertices, axis=1, keepdims=True) + 1e-300
    vertices[:, 0] = 1 + 10.0 ** -rng.integers(3, 16) * rng.normal(size=shape[0])
    queries = np.zeros((batch, shape[1]))
    queries[:, 1:] = 10 ** rng.uniform(-9, -1, size=(batch, 1)) * rng.normal(
        size=(batch, shape[1] - 1)
    )
    return vertices, queries, None


KINDS: dict[str, Maker] = {
    "general": _general,
    "near, outside": _near(1.0),
    "near, inside": _near(-1.0),
    "inside": _inside,
    "duplicates": _duplicates,
    "nearly parallel": _parallel,
    "simplices": _simplex,
    "at a vertex": _at_a_vertex,
    "on a face": _on_a_face,
    "integers": _integers,
    "offset 1e4": _offset,
    "scale 1e-20": _scaled(1e-20),
    "scale 1e20": _scaled(1e20),
    "uneven coordinates": _uneven,
    "heavy tails": _heavy_tails,
    "far queries": _far,
    "flat": _flat,
    "ordered": _ordered,
    "almost tied": _almost_tied,
}
