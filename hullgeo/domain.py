"""Domains of features: all of R^d, the orthant after a ReLU, a box, or the hull of given points.

A box is `{x : lower <= x <= upper}`, either side infinite where it is open; the orthant is the box
from 0 to infinity, R^d the box without sides. Projection onto it is a clip, coordinate by
coordinate, which is what makes the problems of `nearest.py` and `ties.py` quick.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hullgeo import _check
from hullgeo.result import Domain


class Box(NamedTuple):
    """`lower <= x <= upper` in float64, `(dim,)` each, infinite where there is no side."""

    lower: Float[Array, " dim"]
    upper: Float[Array, " dim"]


def kind(lower: Any, upper: Any, hull: Any) -> Domain:
    """Which domain a function was asked for, looking at the bounds where they are concrete."""
    if hull is not None:
        return Domain.HULL
    open_below = lower is None or (_check.is_concrete(lower) and np.all(np.isneginf(lower)))
    open_above = upper is None or (_check.is_concrete(upper) and np.all(np.isposinf(upper)))
    if open_below and open_above:
        return Domain.SPACE
    from_zero = _check.is_concrete(lower) and np.all(np.asarray(lower) == 0)
    return Domain.ORTHANT if open_above and from_zero else Domain.BOX


def check(lower: Any, upper: Any, hull: Any, dim: int) -> None:
    """Options of a domain that fit together.

    Raises:
      ValueError: bounds together with a hull, bounds that are neither a number nor `(dim,)`, NaN
        bounds, `lower > upper`, or hull points that are not finite `(vertices, dim)`.
    """
    if hull is not None:
        if lower is not None or upper is not None:
            _check.fail(
                "lower and upper", (lower, upper), "to be None where hull is given",
                "Pass either a box or a hull.",
            )  # fmt: skip
        _check.floating("hull", hull)
        _check.shape("hull", hull, (None, dim), f"(vertices, {dim}) with at least one vertex")
        _check.all_finite("hull", hull)
        return
    for name, bound in (("lower", lower), ("upper", upper)):
        if bound is None:
            continue
        if np.shape(bound) not in ((), (dim,)):
            _check.fail(f"{name}.shape", np.shape(bound), f"to be () or ({dim},)")
        if _check.is_concrete(bound) and np.any(np.isnan(np.asarray(bound, np.float64))):
            _check.fail(name, bound, "to hold no NaN", "Infinity stands for no bound.")
        beyond = np.inf if name == "lower" else -np.inf
        if _check.is_concrete(bound) and np.any(np.asarray(bound, np.float64) == beyond):
            _check.fail(name, bound, f"to hold no {beyond}", "No feature would be left.")
    if lower is None or upper is None:
        return
    if _check.is_concrete(lower) and _check.is_concrete(upper):
        low, high = np.broadcast_arrays(
            np.asarray(lower, np.float64), np.asarray(upper, np.float64)
        )
        if np.any(low > high):
            at = tuple(int(index) for index in np.argwhere(low > high)[0])
            _check.fail(
                f"upper{list(at) if at else ''}", float(high[at]), f"to be >= lower={low[at]}"
            )


def box(lower: Any, upper: Any, dim: int) -> Box:
    """The bounds as float64 `(dim,)`; call it inside a float64 island."""

    def side(bound, default):
        wide = jnp.asarray(default if bound is None else bound).astype(jnp.float64)
        return jnp.broadcast_to(wide, (dim,))

    return Box(side(lower, -np.inf), side(upper, np.inf))
