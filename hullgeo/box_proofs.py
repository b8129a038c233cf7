"""What singular values prove about linear conditions in a box: a solution near by, or none.

The conditions are those of `dual_newton.py`, `g_j(x) = a_j x + b_j = 0` (or `<= 0`) for x in a box.

- *existence*: an approximate solution with residual r on the tight conditions lies within
  `r / sigma` of an exact one, sigma the least singular value of these conditions on the coordinates
  that have room to move (least-norm correction of a linear system).
- *absence*: multipliers y with `sum_j y_j g_j < 0` on the whole box exclude a solution (J. Farkas,
  1902). Where the box is open, `A y` has to vanish exactly in some coordinates; multipliers that
  nearly do so are within `|A y| / sigma` of exact ones.

Rounding is included in both; what neither proves is left undecided.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hullgeo import _numerics, dual_newton
from hullgeo.domain import Box
from hullgeo.dual_newton import Conditions, Evaluation
from hullgeo.planes import UNIT

_SMALL = 1e-6  # relative size below which a multiplier counts as zero when a proof is looked for
_ROOM = 1e-9  # room to a bound, relative to the point, that a coordinate needs to count as free


def most(
    pull: Array, unsure: Array, offsets: Array, dual: Array, dual_error: Any, box: Box
) -> Float[Array, ""]:
    """An upper bound of `sum_j y_j g_j(x)` over the box; negative proves that no x qualifies.

    `pull` is A y, known up to `unsure`; `dual_error` bounds the error of y itself (its norm).
    """
    ends = [_times(slope, side) for slope in (pull - unsure, pull + unsure) for side in box]
    largest = jnp.max(jnp.stack(ends), axis=0)
    constant = dual * offsets
    rounding = 2 * (pull.shape[0] + dual.shape[0] + 6) * UNIT
    error = rounding * (jnp.sum(jnp.abs(largest)) + jnp.sum(jnp.abs(constant)))
    return jnp.sum(largest) + jnp.sum(constant) + error + dual_error * _numerics.norm(offsets)


def _times(slope, side):
    """Products in which 0 times infinity is 0."""
    return jnp.where(slope == 0, 0.0, slope * jnp.where(slope == 0, 0.0, side))


def absence(conditions: Conditions, box: Box, dual: Float[Array, " conditions"]) -> Bool[Array, ""]:
    """Whether multipliers near `dual` are proved to satisfy Farkas' lemma exactly."""
    dual = dual / jnp.maximum(jnp.max(jnp.abs(dual)), 2.0**-1000)
    member = conditions.used & (conditions.equal | (dual < -_SMALL))
    dual = jnp.where(member, dual, 0.0)
    columns = jnp.where(member[None, :], conditions.columns, 0.0)
    size = _numerics.norm(columns)
    pull = _numerics.product(columns, dual)
    unsure = (2 * (dual.shape[0] + 6) * UNIT) * _numerics.product(jnp.abs(columns), jnp.abs(dual))
    # Coordinates without a bound on the side to which they are pulled have to be pulled nowhere.
    no_upper, no_lower = jnp.isposinf(box.upper), jnp.isneginf(box.lower)
    pulled_up, pulled_down = pull > -_SMALL * size, pull < _SMALL * size
    level = (no_upper & pulled_up) | (no_lower & pulled_down)
    rank = jnp.sum(level).astype(jnp.int32)
    least = dual_newton.singular_value(jnp.where(level[:, None], columns, 0.0), rank)
    missing = _numerics.norm(jnp.where(level, jnp.abs(pull) + unsure, 0.0))
    error = jnp.where(missing > 0, missing / jnp.where(least > 0, least, 0.0), 0.0)
    error *= 1 + 64 * UNIT
    signs = jnp.all(jnp.where(member & ~conditions.equal, dual <= -error, True))
    pull, unsure = (jnp.where(level, 0.0, part) for part in (pull, unsure + size * error))
    highest = most(pull, unsure, conditions.offsets, dual, error, box)
    return signs & jnp.isfinite(error) & (highest < 0)


def existence(
    query: Float[Array, " dim"],
    conditions: Conditions,
    box: Box,
    dual: Float[Array, " conditions"],
    evaluation: Evaluation,
) -> Float[Array, ""]:
    """Distance to a point proved to meet all conditions exactly, else infinity."""
    point, values, slack = evaluation.point, evaluation.values, evaluation.slack
    tight = conditions.equal | (dual < 0) | (values >= -8 * slack)
    tight &= conditions.used
    least_room = _ROOM * jnp.max(jnp.abs(point))
    free = (point - box.lower > least_room) & (box.upper - point > least_room)
    matrix = jnp.where(free[:, None] & tight[None, :], conditions.columns, 0.0)
    rank = jnp.sum(tight).astype(jnp.int32)
    least = dual_newton.singular_value(matrix, rank)
    residual = _numerics.norm(jnp.where(tight, jnp.abs(values) + slack, 0.0))
    move = jnp.where(residual > 0, residual / jnp.where(least > 0, least, 0.0), 0.0)
    move *= 1 + 64 * UNIT
    others = jnp.where(tight | ~conditions.used, True, values + slack + move <= 0)
    proved = jnp.all(others) & ((move <= least_room) | (rank == 0))
    distance = _numerics.norm(point - query) * (1 + 2 * (point.shape[0] + 4) * UNIT)
    return jnp.where(proved, distance + jnp.where(proved, move, 0.0), jnp.inf)
