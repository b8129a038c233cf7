"""Linear programs over a cell or a facet of a linear head inside a box, and proofs of absence.

For class c, and for a facet with class j, with all conditions scaled to distances,

    maximise t  over x in the box  with  z_c = z_j  (for a facet),
        distance to the plane c | i >= t  for all other i,   distance to the sides of the box >= t .

For a cell this is its Chebyshev centre and radius; for a facet, t > 0 gives a witness, and t < 0
multipliers that exclude even a common point, by Farkas' lemma (1902). Programs are solved by HiGHS
(Huangfu and Hall, Math. Program. Comput. 10, 2018) with rows generated as they are violated, and
nothing is taken on trust: points and multipliers are checked afterwards with rounding included.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hullgeo import _numerics, box_proofs
from hullgeo.domain import Box
from hullgeo.dual_newton import Conditions
from hullgeo.facets import Absence, Cells
from hullgeo.planes import UNIT

_FIRST_ROWS = 160  # rows of a program to begin with
_MORE_ROWS = 64  # violated rows added at a time
_TOLERANCE = 1e-9
_PROOFS = 64  # proofs of absence checked together


class Program(NamedTuple):
    """The outcome of one linear program.

    Attributes:
      value: t; infinite where there is no limit, NaN where the solver failed.
      point: x, `(dim,)`.
      multipliers: one a class, `(classes,)`, for the conditions against class c of length one; at
        most 0 except for j.
    """

    value: float
    point: np.ndarray
    multipliers: np.ndarray


def normals_of(cells: Cells, one: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and offsets of `(z_i - z_one) / |k_i - k_one|` for all classes i; 0 for its own."""
    lengths = np.where(cells.lengths[one] > 0, cells.lengths[one], 1.0)
    normals = (cells.kernel - cells.kernel[one]) / lengths[:, None]
    return normals, (cells.bias - cells.bias[one]) / lengths


def solve(cells: Cells, one: int, two: int | None = None, cap: float = np.inf) -> Program:
    """The program above for the cell of `one`, or for its facet with `two`; t at most `cap`."""
    normals, offsets = normals_of(cells, one)
    classes = np.flatnonzero((np.arange(len(offsets)) != one) & (np.arange(len(offsets)) != two))
    dim = normals.shape[1]
    free = cells.flexible
    below = np.flatnonzero(free & np.isfinite(cells.lower))
    above = np.flatnonzero(free & np.isfinite(cells.upper))
    unit = np.eye(dim)
    rows = np.concatenate([normals[classes], -unit[below], unit[above]])
    limits = np.concatenate([-offsets[classes], -cells.lower[below], cells.upper[above]])
    equation = None if two is None else (normals[two], -offsets[two])
    bounds = [
        (None, None) if moves else (side, side)
        for moves, side in zip(free, cells.lower, strict=True)
    ]
    bounds.append((None, None if np.isinf(cap) else cap))
    value, point, working, marginals, along = _generate_rows(rows, limits, equation, bounds)
    multipliers = np.zeros(len(offsets))
    of_class = working < len(classes)
    multipliers[classes[working[of_class]]] = np.minimum(marginals[of_class], 0.0)
    if two is not None:
        multipliers[two] = along
    return Program(value, point, multipliers)


def _generate_rows(rows: Any, limits: Any, equation: Any, bounds: Any) -> tuple:
    """max t with `rows x + t <= limits`: solve with few rows, add those violated, repeat."""
    from scipy.optimize import linprog

    dim = rows.shape[1]
    working = np.argsort(limits, kind="stable")[:_FIRST_ROWS]
    objective = np.append(np.zeros(dim), -1.0)
    equal = {}
    if equation is not None:
        equal = {"A_eq": np.append(equation[0], 0.0)[None], "b_eq": [equation[1]]}
    while True:
        matrix = np.column_stack([rows[working], np.ones(len(working))])
        found = linprog(objective, matrix, limits[working], bounds=bounds, method="highs", **equal)
        if found.status == 3 and len(working) < len(rows):  # unbounded with too few rows
            working = _more(working, np.arange(len(rows)))
            continue
        if found.status != 0:
            value = {2: -np.inf, 3: np.inf}.get(found.status, np.nan)
            return value, np.full(dim, np.nan), working, np.zeros(len(working)), 0.0
        point, value = found.x[:-1], found.x[-1]
        excess = rows @ point + value - limits
        excess[working] = -np.inf
        violated = np.flatnonzero(excess > _TOLERANCE * (1 + np.abs(limits)))
        if not len(violated):
            along = found.eqlin.marginals[0] if equation is not None else 0.0
            return value, point, working, found.ineqlin.marginals, along
        working = _more(working, violated[np.argsort(-excess[violated])])


def _more(working: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    new = wanted[~np.isin(wanted, working)][:_MORE_ROWS]
    return np.concatenate([working, new])


class Recession(NamedTuple):
    """Whether a cell is bounded: at most one of the two is proved.

    Attributes:
      ray: a direction proved to stay in the cell, strictly away from its planes, or None.
      unbounded: proved, by the ray or by counting conditions.
      bounded: proved.
    """

    ray: np.ndarray | None
    unbounded: bool
    bounded: bool


def recession(cells: Cells, one: int) -> Recession:
    """Decide whether the cell of `one`, if it is not empty, is bounded (Stiemke's lemma, 1915).

    Unbounded: a ray y with `a_i y < 0` for all conditions and in the box's own recession cone.
    Bounded: weights `v > 0` with `A' v = 0` on the coordinates without any side, `> 0` on those
    bounded below only, `< 0` above only, and no kernel left: then no ray but 0 remains.
    """
    normals, _ = normals_of(cells, one)
    normals = np.delete(normals, one, axis=0)
    no_lower, no_upper = np.isneginf(cells.lower), np.isposinf(cells.upper)
    open_both, up, down = no_lower & no_upper, ~no_lower & no_upper, no_lower & ~no_upper
    if not (no_lower | no_upper).any():
        return Recession(None, False, True)
    if open_both.all() and len(normals) < normals.shape[1]:
        return Recession(_ray(normals, open_both, up, down), True, False)
    ray = _ray(normals, open_both, up, down)
    if ray is not None:
        return Recession(ray, True, False)
    return Recession(None, False, _is_bounded(normals, open_both, up, down))


def _rounding(normals: np.ndarray, vector: np.ndarray) -> np.ndarray:
    size = np.abs(normals) @ np.abs(vector)
    return 2 * (len(vector) + 6) * UNIT * size


def _ray(normals: np.ndarray, open_both: Any, up: Any, down: Any) -> np.ndarray | None:
    """A direction strictly inside the recession cone, or None."""
    if not len(normals):
        return up * 1.0 - down * 1.0 + open_both
    unit = np.eye(normals.shape[1])
    rows = np.concatenate([normals, -unit[up], unit[down]])
    still = ~(open_both | up | down)
    bounds = [(0, 0) if fixed else (-1, 1) for fixed in still] + [(None, 1)]
    value, ray, *_ = _generate_rows(rows, np.zeros(len(rows)), None, bounds)
    if not value > _TOLERANCE:
        return None
    strict = (normals @ ray + _rounding(normals, ray) < 0).all()
    inside = (ray[up] > 0).all() and (ray[down] < 0).all() and (ray[still] == 0).all()
    return ray if strict and inside else None


def _is_bounded(normals: np.ndarray, open_both: Any, up: Any, down: Any) -> bool:
    from scipy.optimize import linprog

    count = len(normals)
    if count < open_both.sum():
        return False
    ones = np.ones((count, 1))
    transposed = normals.T
    rows = np.concatenate([
        np.column_stack([-np.eye(count), ones]),
        np.column_stack([-transposed[up], np.ones((up.sum(), 1))]),
        np.column_stack([transposed[down], np.ones((down.sum(), 1))]),
    ])  # fmt: skip
    equations = [np.append(np.ones(count), 0.0)]
    equations += [np.append(row, 0.0) for row in transposed[open_both]]
    found = linprog(
        np.append(np.zeros(count), -1.0), rows, np.zeros(len(rows)), np.array(equations),
        np.append(1.0, np.zeros(open_both.sum())), bounds=(None, None), method="highs",
    )  # fmt: skip
    if found.status != 0 or not -found.fun > 0:
        return False
    weights = found.x[:-1]
    pull = transposed @ weights
    unsure = _rounding(transposed, weights)
    error = 0.0
    if open_both.any():
        matrix = normals[:, open_both]
        least = np.linalg.svd(matrix, compute_uv=False)[-1]
        least -= 64 * UNIT * (sum(matrix.shape)) * np.linalg.norm(matrix)
        if not least > 0:
            return False
        error = np.linalg.norm(np.abs(pull[open_both]) + unsure[open_both]) / least * (1 + 2**-40)
    unsure = unsure + np.linalg.norm(normals, axis=0) * error * (1 + 2**-40)
    return bool(
        (weights > error).all() and (pull[up] > unsure[up]).all()
        and (pull[down] < -unsure[down]).all()
    )  # fmt: skip


def check_absence(cells: Cells, pairs: np.ndarray, multipliers: np.ndarray) -> Absence:
    """Check that no point of the box has `z_c = z_j >= all others`, pair by pair.

    Args:
      cells: the head and the box.
      pairs: `(proofs, 2)`; c twice asks whether the cell of c is empty.
      multipliers: `(proofs, classes)` from `solve`.
    """
    used = multipliers != 0
    terms = int(max(1, used.sum(axis=1).max(initial=0)))
    order = np.argsort(~used, axis=1, kind="stable")[:, :terms]
    chosen = np.take_along_axis(used, order, 1)
    classes = np.where(chosen, order, pairs[:, :1])
    values = np.where(chosen, np.take_along_axis(multipliers, order, 1), 0.0)
    proved = np.zeros(len(pairs), bool)
    with _numerics.float64():
        for first in range(0, len(pairs), _PROOFS):
            rows = np.resize(np.arange(first, min(first + _PROOFS, len(pairs))), _PROOFS)
            answer = _absent(cells, pairs[rows], classes[rows], values[rows])
            proved[rows] = np.asarray(answer)
    return Absence(pairs, classes, values, proved)


def _absent(cells: Cells, pairs: np.ndarray, classes: np.ndarray, values: np.ndarray) -> Any:
    one = pairs[:, :1]
    lengths = cells.lengths[one, classes]
    own = lengths == 0
    divisor = np.where(own, 1.0, lengths)
    normals = (cells.kernel[classes] - cells.kernel[one]) / divisor[:, :, None]
    offsets = (cells.bias[classes] - cells.bias[one]) / divisor
    equal = (classes == pairs[:, 1:]) & ~own
    arrays = (np.swapaxes(normals, 1, 2), offsets, equal, ~own)
    conditions = Conditions(*map(jnp.asarray, arrays))
    box = Box(jnp.asarray(cells.lower), jnp.asarray(cells.upper))
    return _absent_in_box(conditions, box, jnp.asarray(values))


@jax.jit
def _absent_in_box(conditions: Conditions, box: Box, duals: Any) -> Any:
    return jax.vmap(partial(_absent_lane, box))(conditions, duals)


def _absent_lane(box: Box, conditions: Conditions, dual: Any) -> Any:
    return box_proofs.absence(conditions, box, dual)
