"""Witnesses that cells of a linear head share a facet inside a box, found cheaply and proved.

Cells c and j share a facet in the box D where

    t* = max t  over x in D  with  z_c = z_j,  distance to the plane c | i >= t for all other i,
                                   distance to every side of D >= t

is positive: then x lies in the facet's relative interior, t away from all other cells. Where
t* < 0, no point of D has z_c = z_j >= all others, and the multipliers of the program prove it by
Farkas' lemma (1902). t* = 0 (cells that touch in less than a facet) no floating point can tell.

This module works in NumPy, float64, with matrix products for thousands of pairs at a time; what it
leaves is for the linear programs of `facet_programs.py`. Candidates may come from anywhere: every
witness is checked with rounding included.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from hullgeo.planes import UNIT
from hullgeo.result import Evidence, Status

_PAIRS = 4096  # pairs looked at together


class Cells(NamedTuple):
    """A head without repeated kernel columns, in a box, in units of `unit`.

    Attributes:
      kernel: `(classes, dim)`, one row a class.
      bias: `(classes,)`, divided by the unit.
      lengths: `|k_c - k_j|`.
      lower: sides of the box, divided by the unit.
      upper: likewise.
      unit: a length typical of the problem, a power of two, so that programs are well scaled.
    """

    kernel: np.ndarray
    bias: np.ndarray
    lengths: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    unit: float

    @property
    def flexible(self) -> np.ndarray:
        """Coordinates that the box does not fix."""
        return self.lower < self.upper

    def onto_box(self, points: np.ndarray) -> np.ndarray:
        """The nearest points of the box."""
        return np.clip(points, self.lower, self.upper)

    def onto_planes(self, points: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Points moved to the planes of their pairs, along the coordinates that are free."""
        one, two = pairs.T
        normals = self.kernel[one] - self.kernel[two]
        gap = np.sum(points * normals, axis=1) + self.bias[one] - self.bias[two]
        normals = np.where(self.flexible, normals, 0.0)
        square = np.sum(normals * normals, axis=1)
        step = np.divide(gap, square, out=np.zeros_like(gap), where=square > 0)
        return points - normals * step[:, None]


class Absence(NamedTuple):
    """Multipliers of pairs without a common point, few of them not zero.

    Attributes:
      pairs: `(proofs, 2)`: the cells c and j; c twice for an empty cell.
      classes: `(proofs, terms)`: classes with a multiplier, padded with c.
      multipliers: `(proofs, terms)`, padded with 0.
      proved: `(proofs,)`: whether they are proved to be close to exact ones.
    """

    pairs: np.ndarray
    classes: np.ndarray
    multipliers: np.ndarray
    proved: np.ndarray


class Facts(NamedTuple):
    """What is known so far, arrays that are filled in place; pairs are those of `pairs`, c < j."""

    nonempty: np.ndarray
    bounded: np.ndarray
    center: np.ndarray
    radius: np.ndarray
    cell_status: np.ndarray
    pairs: np.ndarray
    evidence: np.ndarray
    margin: np.ndarray
    witness: np.ndarray
    absence: list[Absence]

    def index(self, one: Any, two: Any) -> Any:
        """Place of a pair of different classes, in either order."""
        low, high = np.minimum(one, two), np.maximum(one, two)
        return low * len(self.nonempty) - low * (low + 1) // 2 + high - low - 1

    def record(self, rows: np.ndarray, points: np.ndarray, margins: np.ndarray, how: Any) -> None:
        """Keep witnesses with a proved margin."""
        good = margins > 0
        self.evidence[rows[good]] = how
        self.margin[rows[good]] = margins[good]
        self.witness[rows[good]] = points[good]


def no_facts(num_classes: int, dim: int) -> Facts:
    """Nothing known yet."""
    pairs = np.stack(np.triu_indices(num_classes, 1), axis=1)
    return Facts(
        nonempty=np.zeros(num_classes, bool),
        bounded=np.zeros(num_classes, bool),
        center=np.full((num_classes, dim), np.nan),
        radius=np.zeros(num_classes),
        cell_status=np.full(num_classes, Status.CONVERGED, np.int32),
        pairs=pairs,
        evidence=np.full(len(pairs), Evidence.UNDECIDED, np.int32),
        margin=np.zeros(len(pairs)),
        witness=np.full((len(pairs), dim), np.nan),
        absence=[],
    )


def in_units(facts: Facts, unit: float) -> Facts:
    """Lengths in the caller's units (a power of two, so nothing is rounded)."""
    return facts._replace(
        center=facts.center * unit,
        radius=facts.radius * unit,
        margin=facts.margin * unit,
        witness=facts.witness * unit,
    )


def join_absence(parts: list[Absence]) -> Absence:
    """All proofs that hold, padded to the same number of terms."""
    empty = Absence(
        *(np.zeros((0, 2), int), np.zeros((0, 1), int), np.zeros((0, 1))), np.zeros(0, bool)
    )
    terms = max(part.classes.shape[1] for part in [empty, *parts])

    def widen(part):
        extra = ((0, 0), (0, terms - part.classes.shape[1]))
        kept = part.proved
        return Absence(
            part.pairs[kept],
            np.pad(part.classes, extra, mode="edge")[kept],
            np.pad(part.multipliers, extra)[kept],
            kept[kept],
        )

    return Absence(*map(np.concatenate, zip(*map(widen, [empty, *parts]), strict=True)))


def bar(items: Iterable[Any], progress: bool, description: str) -> Iterable[Any]:
    """The items, with a progress bar if wanted."""
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=description)


def make_cells(kernel: np.ndarray, bias: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Cells:
    """Scale the problem; `kernel` is `(dim, classes)` with distinct columns."""
    columns = np.ascontiguousarray(kernel.T, np.float64)
    lengths = np.stack([np.linalg.norm(columns - column, axis=1) for column in columns])
    offsets = np.abs(bias[:, None] - bias[None, :])
    ratios = offsets[lengths > 0] / lengths[lengths > 0]
    sides = np.concatenate([lower[np.isfinite(lower)], upper[np.isfinite(upper)]])
    size = max(np.max(ratios, initial=0.0), np.max(np.abs(sides), initial=0.0))
    unit = float(2.0 ** np.round(np.log2(size))) if size > 0 else 1.0
    return Cells(columns, bias / unit, lengths, lower / unit, upper / unit, unit)


def logits_and_errors(cells: Cells, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of points `(n, dim)` and bounds of their rounding."""
    logits = points @ cells.kernel.T + cells.bias
    size = np.abs(points) @ np.abs(cells.kernel.T) + np.abs(cells.bias)
    return logits, 2 * (points.shape[1] + 2) * UNIT * size


def proved_margins(cells: Cells, points: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """How far each point is proved to stay inside the facet of its pair; <= 0 proves nothing.

    The point is moved onto the plane z_c = z_j exactly (which rounding forbids to write down) and
    then at least the margin away from every other cell and every side of the box.
    """
    margins = np.empty(len(points))
    for first in range(0, len(points), _PAIRS):
        rows = slice(first, first + _PAIRS)
        margins[rows] = _margins(cells, points[rows], pairs[rows])
    return margins


def _margins(cells: Cells, points: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    one, two = pairs.T
    row = np.arange(len(points))
    logits, errors = logits_and_errors(cells, points)
    free = cells.flexible
    normals = np.where(free, cells.kernel[one] - cells.kernel[two], 0.0)
    slack = 2 * (points.shape[1] + 8) * UNIT  # of lengths and quotients
    length = np.linalg.norm(normals, axis=1) * (1 - slack)
    gap = np.abs(logits[row, one] - logits[row, two]) + errors[row, one] + errors[row, two]
    move = np.divide(gap, length, out=np.full(len(points), np.inf), where=length > 0)
    lead = logits[row, one][:, None] - logits - errors[row, one][:, None] - errors
    away = lead - slack * np.abs(lead)
    with np.errstate(divide="ignore", invalid="ignore"):
        away = away / cells.lengths[one]
    away[row, one] = away[row, two] = np.inf
    inside = _inside(cells, points)
    return np.where(
        np.isfinite(move), np.minimum(away.min(axis=1), inside) - move * (1 + slack), -np.inf
    )


def proved_radii(cells: Cells, points: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Radius of a ball around each point proved to lie in the box and in the cell of its class.

    Coordinates that the box fixes are left out of the ball. Negative where nothing is proved.
    """
    row = np.arange(len(points))
    logits, errors = logits_and_errors(cells, points)
    slack = 2 * (points.shape[1] + 8) * UNIT
    lead = logits[row, classes][:, None] - logits - errors[row, classes][:, None] - errors
    lead -= slack * np.abs(lead)
    with np.errstate(divide="ignore", invalid="ignore"):
        away = lead / cells.lengths[classes]
    away[row, classes] = np.inf
    return np.minimum(away.min(axis=1), _inside(cells, points))


def _inside(cells: Cells, points: np.ndarray) -> np.ndarray:
    """Distance to the nearest side, -inf where a fixed coordinate differs."""
    free = cells.flexible
    sides = np.minimum(points - cells.lower, cells.upper - points)
    fixed = np.all((points == cells.lower) | free, axis=1)
    return np.where(fixed, np.min(sides, axis=1, where=free, initial=np.inf), -np.inf)


def relax(
    cells: Cells, points: np.ndarray, pairs: np.ndarray, target: float, num_steps: int
) -> np.ndarray:
    """Move points inside the planes of their pairs away from the class nearest to them.

    Agmon's relaxation (1954), over the classes and the sides in turn: cheap, often enough, and
    checked afterwards like every witness.
    """
    parts = [
        _relax(
            cells, points[first : first + _PAIRS], pairs[first : first + _PAIRS], target, num_steps
        )
        for first in range(0, len(points), _PAIRS)
    ]
    return np.concatenate(parts) if parts else points


def _relax(cells: Cells, points: Any, pairs: Any, target: float, num_steps: int) -> np.ndarray:
    one, two = pairs.T
    row = np.arange(len(points))
    free = cells.flexible
    normals = np.where(free, cells.kernel[one] - cells.kernel[two], 0.0)
    square = np.maximum(np.sum(normals * normals, axis=1), 1e-300)
    room = np.where(free, np.minimum(target, 0.25 * (cells.upper - cells.lower)), 0.0)
    best, best_margin = points, np.full(len(points), -np.inf)
    for _ in range(num_steps):
        points = np.clip(points, cells.lower + room, cells.upper - room)
        points = cells.onto_planes(points, pairs)
        logits = points @ cells.kernel.T + cells.bias
        with np.errstate(divide="ignore", invalid="ignore"):
            away = (logits[row, one][:, None] - logits) / cells.lengths[one]
        away[row, one] = away[row, two] = np.inf
        worst = away.argmin(axis=1)
        margin = np.minimum(away[row, worst], _inside(cells, points))
        better = margin > best_margin
        best = np.where(better[:, None], points, best)
        best_margin = np.where(better, margin, best_margin)
        if (best_margin > 0.5 * target).all():
            break
        push = np.where(free, cells.kernel[one] - cells.kernel[worst], 0.0)
        push -= (np.sum(push * normals, axis=1) / square)[:, None] * normals
        size = np.maximum(np.sum(push * push, axis=1), 1e-300)
        lack = np.maximum(target - away[row, worst], 0.0) * cells.lengths[one, worst]
        points = points + push * (1.5 * lack / size)[:, None]
    return best
