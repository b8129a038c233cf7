"""Domains of features: all of R^d, the orthant after a ReLU, a box, or the hull of given points.

A box is `{x : lower <= x <= upper}`, either side infinite where it is open; the orthant is the box
from 0 to infinity, R^d the box without sides. Projection onto it is a clip, coordinate by
coordinate, which is what makes the problems of `nearest.py` and `ties.py` quick.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hullgeo import _check, _numerics
from hullgeo.result import BoundaryPoint, Domain, Status


class Box(NamedTuple):
    """`lower <= x <= upper` in float64, `(dim,)` each, infinite where there is no side."""

    lower: Float[Array, " dim"]
    upper: Float[Array, " dim"]


class Options(NamedTuple):
    """Where and how closely a problem is solved: all of it traced."""

    box: Box
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    kind: Int[Array, ""]


class Found(NamedTuple):
    """Nearest points of a domain and what is proved of them, one lane a problem, in float64.

    Attributes:
      point: nearest point found; NaN where the domain is proved to hold none.
      multipliers: of the conditions, in whatever form the solver uses.
      distance: distance to a point proved to qualify, else infinite.
      lower_bound: proved, infinite where no point of the domain qualifies.
      residual: largest violation of the optimality conditions, as a distance.
    """

    point: Float[Array, "lanes dim"]
    multipliers: Float[Array, "lanes conditions"]
    distance: Float[Array, " lanes"]
    lower_bound: Float[Array, " lanes"]
    residual: Float[Array, " lanes"]


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
        hull = getattr(hull, "vertices", hull)
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


def options(lower: Any, upper: Any, hull: Any, dim: int, rtol: Any, atol: Any) -> Options:
    """The options of a problem as arrays; call it inside a float64 island."""
    rtol, atol = (jnp.asarray(value).astype(jnp.float64) for value in (rtol, atol))
    chosen = jnp.asarray(int(kind(lower, upper, hull)), jnp.int32)
    return Options(box(lower, upper, dim), rtol, atol, chosen)


def boundary_point(
    found: Found, rival: Any, lead: Any, options: Options, dtype: Any, batch: tuple[int, ...]
) -> BoundaryPoint:
    """The public answer: statuses, and everything rounded to the type of the features.

    Args:
      found: with multipliers of the classes.
      rival: class met, one a lane.
      lead: `label` and `finite` of each feature.
      options: tolerances, box and kind of the domain.
      dtype: of the features.
      batch: leading axes of the answer.
    """
    upper, lower = found.distance, found.lower_bound
    width = 0.5 * (upper - lower) * (upper + lower)
    converged = jnp.isfinite(upper)
    converged &= width <= options.atol + 0.5 * options.rtol * upper * upper
    status = jnp.where(converged, jnp.int32(Status.CONVERGED), jnp.int32(Status.PRECISION_LIMIT))
    status = jnp.where(jnp.isinf(lower), jnp.int32(Status.INFEASIBLE), status)
    status = jnp.where(lead.finite, status, jnp.int32(Status.NONFINITE))
    nan = jnp.where(lead.finite, 0.0, jnp.nan)
    point = jnp.clip(  # rounding must not leave the box
        found.point.astype(dtype),
        _numerics.round_up(options.box.lower, dtype)[None, :],
        _numerics.round_down(options.box.upper, dtype)[None, :],
    )
    answer = BoundaryPoint(
        point=point + nan[:, None].astype(dtype),
        distance=_numerics.round_up(upper + nan, dtype),
        distance_lower_bound=_numerics.round_down(lower + nan, dtype),
        label=lead.label,
        rival=rival,
        multipliers=(found.multipliers + nan[:, None]).astype(dtype),
        kkt_residual=_numerics.round_up(found.residual + nan, dtype),
        domain=jnp.zeros_like(lead.label) + options.kind,
        status=status,
    )
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape[1:]), answer)
