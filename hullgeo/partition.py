"""The cells of a linear head: which are empty or bounded, their largest balls, their facets.

The cell of class c in a domain D is the convex set `{phi in D : z_c >= z_j for all j}`. Cells c and
j share a facet where `z_c = z_j > z_i` for all other i somewhere in D, and `z_c - z_j` takes both
signs in D. Each cell is settled by linear programs; each pair by the cheapest of these that works:

1. a witness by matrix products: the plane's points nearest to the middle of the two cells' centres
   and to the centres, changes of class along segments between features, and what an Agmon
   relaxation makes of them;
2. a linear program, which yields a witness, or multipliers that exclude a common point.

Witnesses and multipliers are checked with rounding included (`facets.py`, `facet_programs.py`;
`hull_facets.py` within a hull). The partition of feature space by the last layer is the subject of
arXiv:2202.04052.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hullgeo import _check, _numerics, domain, facet_programs, facets, hull_facets, planes
from hullgeo.facets import Cells, Facts
from hullgeo.features import LinearHead
from hullgeo.head import segment_classes
from hullgeo.oracle import Hull
from hullgeo.result import Evidence, Partition, Status

_NUM_SEGMENTS = 20  # segments per class between features
_RELAXATIONS = 30
_SEED = 0


def partition(
    head: LinearHead,
    *,
    lower: Any = None,
    upper: Any = None,
    hull: Float[Array | np.ndarray, "vertices dim"] | Hull | None = None,
    features: Float[Array | np.ndarray, "samples dim"] | None = None,
    progress: bool = False,
) -> Partition:
    """Cells of a linear head within a domain, their largest balls, and which pairs share a facet.

    Host side: linear programs (HiGHS) decide what cheap witnesses leave open; ten classes take a
    fraction of a second, a thousand classes (499,500 pairs) minutes. `Partition.counts` tells how
    many pairs were decided by which means.

    Guarantee: what the result calls True is proved, and so is False wherever the status is
    `CONVERGED`: witnesses and multipliers are checked with rounding included. Undecided are only
    cells that touch, or fail to touch, by less than rounding.

    Args:
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.
      lower: lower bounds of the features, a number or `(dim,)`; 0 after a ReLU.
      upper: upper bounds, likewise. `lower` and `upper` make the domain a box.
      hull: points `(vertices, dim)` whose convex hull is the domain, or a `Hull` from
        `prepare_hull`; not together with a box.
      features: points between which segments are followed in search of witnesses; by default the
        cells' centres, or the points of the hull.
      progress: show a progress bar.

    Returns:
      a `Partition`. Classes with equal kernel columns share no plane; of these, only those with the
      highest bias have a cell, and they have it together.

    Raises:
      ValueError: shapes or types that do not fit, `lower > upper`, a head, hull or features that
        are not finite.
    """
    planes.check_head(head)
    dim = head.kernel.shape[0]
    domain.check(lower, upper, hull, dim)
    if features is not None:
        planes.check_features("features", features, head)
        _check.shape("features", features, (None, dim), f"(samples, {dim})")
        _check.all_finite("features", features)
    for name, value in (("head.kernel", head.kernel), ("lower", lower), ("upper", upper)):
        if not _check.is_concrete(value):
            _check.fail(name, "a traced array", "to be concrete", "Call partition outside jit.")
    kernel, bias = (np.asarray(part, np.float64) for part in head)
    keeper = _keepers(kernel, bias)
    kept = np.unique(keeper[keeper >= 0])
    if hull is None:
        sides = [np.broadcast_to(np.float64(default if side is None else side), (dim,))
                 for side, default in ((lower, -np.inf), (upper, np.inf))]  # fmt: skip
        cells = facets.make_cells(kernel[:, kept], bias[kept], *sides)
        facts = _in_box(cells, features, progress)
    else:
        vertices = np.asarray(getattr(hull, "vertices", hull), np.float64)
        facts = hull_facets.settle(kernel[:, kept], bias[kept], vertices, progress)
    kind = domain.kind(lower, upper, hull)
    return _expand(facts, keeper, kept, kind, np.dtype(head.kernel.dtype))


def _keepers(kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """For each class the one of equal column, highest bias and lowest index; -1 if hidden by it."""
    _, group = np.unique(kernel.T, axis=0, return_inverse=True)
    keeper = np.full(len(bias), -1)
    for members in (np.flatnonzero(group == index) for index in np.unique(group)):
        top = members[bias[members] == bias[members].max()]
        keeper[top] = top[0]
    return keeper


def _in_box(cells: Cells, features: Any, progress: bool) -> Facts:
    num_classes, dim = cells.kernel.shape
    facts = facets.no_facts(num_classes, dim)
    _settle_cells(cells, facts, progress)
    alive = np.asarray(facts.nonempty[facts.pairs].all(axis=1))
    dead = (~facts.nonempty & (facts.cell_status == Status.CONVERGED))[facts.pairs].any(axis=1)
    facts.evidence[dead] = Evidence.EMPTY_CELL
    _seek_witnesses(cells, facts, alive, features)
    _settle_by_programs(cells, facts, progress)
    return facets.in_units(facts, cells.unit)


def _settle_cells(cells: Cells, facts: Facts, progress: bool) -> None:
    """Emptiness, boundedness and largest balls, one cell after the other."""
    empty = []
    for one in facets.bar(range(len(facts.nonempty)), progress, "cells"):
        recession = facet_programs.recession(cells, one)
        endless = (
            recession.ray is not None
            and not (np.isfinite(cells.lower) & np.isfinite(cells.upper)).any()
        )
        program = facet_programs.solve(cells, one, cap=1.0 if endless else np.inf)
        if np.isposinf(program.value):
            program = facet_programs.solve(cells, one, cap=1.0)
        point = cells.onto_box(program.point)
        radius = facets.proved_radii(cells, point[None], np.array([one]))[0]
        if radius >= 0:
            facts.nonempty[one] = True
            facts.center[one] = point
            facts.radius[one] = np.inf if endless else radius
            facts.bounded[one] = recession.bounded
            if not (recession.bounded or recession.unbounded):
                facts.cell_status[one] = Status.PRECISION_LIMIT
        else:
            empty.append((one, program.multipliers))
    _prove_absence(cells, facts, [(one, one) for one, _ in empty], [y for _, y in empty])


def _prove_absence(cells: Cells, facts: Facts, pairs: list, multipliers: list) -> None:
    """Record what multipliers prove; an empty cell is written as a pair of its class twice."""
    if not pairs:
        return
    absence = facet_programs.check_absence(cells, np.array(pairs), np.array(multipliers))
    for (one, two), proved in zip(pairs, absence.proved, strict=True):
        if one == two:
            facts.bounded[one] = proved
            facts.cell_status[one] = Status.CONVERGED if proved else Status.PRECISION_LIMIT
        elif proved:
            facts.evidence[facts.index(one, two)] = Evidence.FARKAS
    facts.absence.append(absence)


def _seek_witnesses(cells: Cells, facts: Facts, alive: np.ndarray, features: Any) -> None:
    """All cheap means in turn, each on the pairs that the earlier ones left open."""
    pairs, center = facts.pairs, facts.center
    best = np.full((len(pairs), cells.kernel.shape[1]), np.nan)
    best_margin = np.full(len(pairs), -np.inf)

    def attempt(evidence, rows, points):
        margins = facets.proved_margins(cells, points, pairs[rows])
        facts.record(rows, points, margins, evidence)
        better = margins > best_margin[rows]
        best[rows[better]], best_margin[rows[better]] = points[better], margins[better]

    def left():
        return np.flatnonzero(alive & (facts.evidence == Evidence.UNDECIDED))

    def project(rows, points):
        return cells.onto_planes(cells.onto_box(points), pairs[rows])

    rows = left()
    attempt(Evidence.MIDPOINT, rows, project(rows, center[pairs[rows]].mean(axis=1)))
    for side in (0, 1):
        rows = left()
        attempt(Evidence.BOUNDARY_POINT, rows, project(rows, center[pairs[rows, side]]))
    samples = center[facts.nonempty]
    if features is not None:
        samples = np.asarray(features, np.float64) / cells.unit
    rows, points = _along_segments(cells, facts, samples)
    open_ = alive[rows] & (facts.evidence[rows] == Evidence.UNDECIDED)
    attempt(Evidence.SEGMENT, rows[open_], points[open_])
    rows = left()
    target = 0.1 * np.median(np.minimum(facts.radius[facts.nonempty], 1.0)) if len(rows) else 0.0
    relaxed = facets.relax(cells, best[rows], pairs[rows], target, _RELAXATIONS)
    attempt(Evidence.RELAXATION, rows, relaxed)


def _along_segments(cells: Cells, facts: Facts, samples: np.ndarray) -> tuple:
    """Points where random segments between samples change class, with the index of their pair."""
    num_classes, dim = cells.kernel.shape
    rng = np.random.default_rng(_SEED)
    size = _NUM_SEGMENTS * num_classes if len(samples) > 1 else 0
    start, end = (
        samples[rng.integers(0, len(samples), (2, size))] if size else np.zeros((2, 0, dim))
    )
    with _numerics.float64():
        head = LinearHead(jnp.asarray(cells.kernel.T), jnp.asarray(cells.bias))
        path = segment_classes(jnp.asarray(start), jnp.asarray(end), head)
    position, classes = np.asarray(path.position), np.asarray(path.classes)
    row, step = np.nonzero(np.arange(num_classes - 1) < np.asarray(path.num_crossings)[:, None])
    index = facts.index(classes[row, step], classes[row, step + 1])
    points = start[row] + position[row, step][:, None] * (end - start)[row]
    _, once = np.unique(index, return_index=True)
    return index[once], points[once]


def _settle_by_programs(cells: Cells, facts: Facts, progress: bool) -> None:
    rows = np.flatnonzero(facts.evidence == Evidence.UNDECIDED)
    failed = []
    for row in facets.bar(rows, progress, "facets"):
        one, two = facts.pairs[row]
        program = facet_programs.solve(cells, int(one), int(two), cap=1.0)
        point = cells.onto_box(program.point)[None]
        margin = facets.proved_margins(cells, point, facts.pairs[row : row + 1])
        facts.record(np.array([row]), point, margin, Evidence.PROGRAM)
        if not margin[0] > 0:
            failed.append((row, program.multipliers))
    pairs = [tuple(map(int, facts.pairs[row])) for row, _ in failed]
    _prove_absence(cells, facts, pairs, [y for _, y in failed])


def _expand(facts: Facts, keeper: Any, kept: Any, kind: Any, dtype: Any) -> Partition:
    """The answer for all classes, from that for classes with distinct columns."""
    num_classes, dim = len(keeper), facts.center.shape[1]
    place = np.full(num_classes, -1)
    place[keeper >= 0] = np.searchsorted(kept, keeper[keeper >= 0])
    shown = place >= 0

    def by_class(values, otherwise):
        spread = np.full((num_classes, *values.shape[1:]), otherwise, values.dtype)
        spread[shown] = values[place[shown]]
        return spread

    evidence = np.full((num_classes, num_classes), Evidence.EMPTY_CELL, np.int32)
    margin = np.zeros((num_classes, num_classes))
    witness = np.full((num_classes, num_classes, dim), np.nan, dtype)
    row, column = np.indices((num_classes, num_classes)).reshape(2, -1)
    both = shown[row] & shown[column] & (row != column)
    same = both & (place[row] == place[column])
    evidence[row[same], column[same]] = Evidence.SAME_COLUMN
    apart = both & ~same
    index = facts.index(place[row[apart]], place[column[apart]])
    evidence[row[apart], column[apart]] = facts.evidence[index]
    margin[row[apart], column[apart]] = facts.margin[index]
    witness[row[apart], column[apart]] = facts.witness[index]
    np.fill_diagonal(evidence, Evidence.SAME_COLUMN)
    absence = facets.join_absence(facts.absence)
    undecided = evidence == Evidence.UNDECIDED
    with _numerics.float64():
        return Partition(
            nonempty=jnp.asarray(by_class(facts.nonempty, False)),
            bounded=jnp.asarray(by_class(facts.bounded, True)),
            center=jnp.asarray(by_class(facts.center, np.nan).astype(dtype)),
            radius=_numerics.round_down(jnp.asarray(by_class(facts.radius, 0.0)), dtype),
            facet=jnp.asarray((evidence > 0) & (evidence < Evidence.FARKAS)),
            witness=jnp.asarray(witness),
            margin=_numerics.round_down(jnp.asarray(margin), dtype),
            evidence=jnp.asarray(evidence),
            cell_status=jnp.asarray(by_class(facts.cell_status, Status.CONVERGED)),
            status=jnp.asarray(
                np.where(undecided, Status.PRECISION_LIMIT, Status.CONVERGED).astype(np.int32)
            ),
            domain=jnp.asarray(int(kind), jnp.int32),
            absent=jnp.asarray(kept[absence.pairs].astype(np.int32)),
            absent_classes=jnp.asarray(kept[absence.classes].astype(np.int32)),
            absent_multipliers=jnp.asarray(absence.multipliers),
        )
