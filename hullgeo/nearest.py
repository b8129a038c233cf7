"""The nearest point at which another class takes over, inside a domain of features.

For a query q of class c and a rival j, with `a = k_j - k_c` and `beta = b_c - b_j`,

    minimise |x - q|  over x in the domain with  a x >= beta .

Its dual has one variable mu >= 0: in a box the minimiser of the Lagrangian is
`x(mu) = clip(q + mu a)`, and `a x(mu)` grows with mu, piecewise linearly, so that a safeguarded
semismooth Newton iteration finds the multiplier in a few steps. Every mu gives a lower bound by
weak duality, and every mu with `a x(mu) >= beta` an upper one (the problem and its dual: Dai and
Fletcher, Math. Program. 106, 2006, doi:10.1007/s10107-005-0595-2). The distance to the plane in R^d
bounds every rival from below, so that rivals are taken in this order and most are never solved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _check, _numerics, domain, planes
from hullgeo.features import LinearHead
from hullgeo.planes import UNIT
from hullgeo.result import BoundaryPoint, Status

_MAX_STEPS = 200
_CHUNK = 256


def nearest_boundary_point(
    features: Float[Array | np.ndarray, "*batch dim"],
    head: LinearHead,
    *,
    rival: Int[Array | np.ndarray, "*#batch"] | int | None = None,
    lower: Any = None,
    upper: Any = None,
    hull: Float[Array | np.ndarray, "vertices dim"] | None = None,
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
) -> BoundaryPoint:
    """The nearest point of a domain at which another class ties with that of the feature.

    Guarantee: the distance from each feature to the points of the domain where its class (the
    label) does not lead the rival lies in [`distance_lower_bound`, `distance`], rounding included.
    Without `rival` this is the nearest over all rivals: those that were not solved have a proved
    distance of at least `distance`. A feature outside the domain is allowed: the label is that of
    the feature itself, and a point of the domain where the rival leads counts too.

    Args:
      features: inputs of the head, any leading batch.
      head: the linear head, kernel `(dim, num_classes)` and bias `(num_classes,)`.
      rival: the class to meet, one for all or one for each feature; by default the nearest of all.
      lower: lower bounds of the features, a number or `(dim,)`; 0 after a ReLU.
      upper: upper bounds, likewise. `lower` and `upper` make the domain a box.
      hull: points `(vertices, dim)` whose convex hull is the domain; not together with a box.
      rtol: the status is `CONVERGED` where (distance^2 - distance_lower_bound^2) / 2
        <= atol + rtol distance^2 / 2.
      atol: see `rtol`, squared units.

    Returns:
      a `BoundaryPoint`. Its status is `INFEASIBLE` where the class leads (the rival) in the whole
      domain, `PRECISION_LIMIT` where the tolerance is not proved, `NONFINITE` for features with
      NaN or infinity.

    Raises:
      ValueError: shapes, types or options that do not fit, `lower > upper`, a rival that is no
        class, a head or hull that is not finite.
    """
    planes.check_head(head)
    planes.check_features("features", features, head)
    dim, num_classes = head.kernel.shape
    domain.check(lower, upper, hull, dim)
    _check.nonnegative("rtol", rtol)
    _check.nonnegative("atol", atol)
    batch = features.shape[:-1]
    if rival is not None:
        _check_rival(rival, batch, num_classes)
    kind = domain.kind(lower, upper, hull)
    with _numerics.float64():
        wanted = jnp.broadcast_to(jnp.asarray(-1 if rival is None else rival, jnp.int32), batch)
        box = domain.box(lower, upper, dim)
        tolerances = (_wide(rtol), _wide(atol))
        return _nearest(features, wanted, head.kernel, head.bias, box, tolerances, kind)


def _wide(number: Any) -> Array:
    return jnp.asarray(number).astype(jnp.float64)


def _check_rival(rival: Any, batch: tuple[int, ...], num_classes: int) -> None:
    if not np.issubdtype(np.result_type(rival), np.integer):
        _check.fail("rival", rival, "to hold integers")
    if np.broadcast_shapes(np.shape(rival), batch) != batch:
        _check.fail("rival.shape", np.shape(rival), f"to broadcast to features.shape[:-1]={batch}")
    if _check.is_concrete(rival) and np.size(rival):
        low, high = int(np.min(rival)), int(np.max(rival))
        if low < 0 or high >= num_classes:
            _check.fail(
                "rival", low if low < 0 else high, f"to lie in [0, {num_classes - 1}]",
                "Rivals are indices of classes.",
            )  # fmt: skip


class _Meeting(NamedTuple):
    """The nearest point at which one rival is met; `multiplier` belongs to `k_j - k_c` itself."""

    rival: Int[Array, ""]
    point: Float[Array, " dim"]
    multiplier: Float[Array, ""]
    distance: Float[Array, ""]
    lower_bound: Float[Array, ""]
    residual: Float[Array, ""]


@jax.jit
def _nearest(features, wanted, kernel, bias, box, tolerances, kind) -> BoundaryPoint:
    dtype = features.dtype
    wide, kernel, bias = (jnp.asarray(x, jnp.float64) for x in (features, kernel, bias))
    dim, num_classes = kernel.shape
    batch = wide.shape[:-1]
    wide, wanted = wide.reshape(-1, dim), wanted.reshape(-1)
    lead = planes.lead(wide, kernel, bias)
    usable = jnp.where(lead.finite[:, None], wide, 0.0)
    columns = kernel.T

    def solve(row):
        query, wanted, label, proved = row
        classes = jnp.arange(num_classes, dtype=jnp.int32)
        asked = jnp.where(wanted < 0, classes != label, classes == wanted)
        bounds = jnp.where(asked, jnp.where(wanted == label, 0.0, proved), jnp.inf)
        return _over_rivals(query, label, bounds, columns, bias, box)

    rows = (usable, wanted, lead.label, lead.proved)
    best = planes.in_chunks(solve, rows, _CHUNK)
    return _answer(best, lead, kernel, tolerances, kind, dtype, box, batch)


def _over_rivals(query, label, bounds, columns, bias, box) -> _Meeting:
    """Rivals in the order of their bounds, until no bound is below the best distance."""

    def keep_going(state):
        best, bounds = state
        return jnp.min(bounds) < best.distance

    def next_rival(state):
        best, bounds = state
        rival = planes.first(bounds == jnp.min(bounds))
        normal, offset = columns[rival] - columns[label], bias[label] - bias[rival]
        found = _meet(query, rival, normal, offset, box)
        found = found._replace(lower_bound=jnp.maximum(found.lower_bound, bounds[rival]))
        lower_bound = jnp.minimum(best.lower_bound, found.lower_bound)
        unproved = jnp.isinf(best.distance) & (found.lower_bound < best.lower_bound)
        better = (found.distance < best.distance) | unproved
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)
        tried = jnp.arange(bounds.shape[0], dtype=jnp.int32) == rival
        return best._replace(lower_bound=lower_bound), jnp.where(tried, jnp.inf, bounds)

    nothing = 0.0 * query[0]
    start = _Meeting(
        rival=label,
        point=query + jnp.nan,
        multiplier=nothing,
        distance=nothing + jnp.inf,
        lower_bound=nothing + jnp.inf,
        residual=nothing + jnp.inf,
    )
    best, _ = lax.while_loop(keep_going, next_rival, (start, bounds))
    return best


class _Newton(NamedTuple):
    """Bracket [low, high] of the multiplier and where the iteration stands."""

    multiplier: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    step: Int[Array, ""]
    done: Bool[Array, ""]


def _meet(query, rival, normal, offset, box) -> _Meeting:
    """The nearest point of the box with `normal x >= offset`, for one query."""
    dim = query.shape[0]
    length = _numerics.norm(normal)
    divisor = jnp.where(length > 0, length, 1.0)
    unit, target = normal / divisor, offset / divisor
    rising, falling = unit > 0, unit < 0
    # Twice the rounding of `unit x - target`, with the rounding of both operands.
    rounding = 2 * (dim + 6) * UNIT

    def at(multiplier):
        free = query + multiplier * unit
        point = jnp.clip(free, box.lower, box.upper)
        value = jnp.sum(unit * point) - target
        return free, point, value, rounding * (jnp.sum(jnp.abs(unit * point)) + jnp.abs(target))

    ends = jnp.where(rising, box.upper, box.lower)
    reach = jnp.where(unit == 0, 0.0, unit * jnp.where(unit == 0, 0.0, ends))
    excess = jnp.sum(reach) - target
    impossible = excess < -rounding * (jnp.sum(jnp.abs(reach)) + jnp.abs(target))

    # Where coordinates that start outside the box have all come in.
    outside = jnp.where(rising, jnp.maximum(box.lower - query, 0.0), 0.0)
    outside += jnp.where(falling, jnp.maximum(query - box.upper, 0.0), 0.0)
    entered = jnp.max(outside / jnp.where(unit == 0, 1.0, jnp.abs(unit)))

    def keep_going(state):
        return ~state.done & (state.step < _MAX_STEPS)

    def newton(state):
        free, _, value, slack = at(state.multiplier)
        below = value < 2 * slack  # aim a little inside, so that the point provably qualifies
        low = jnp.where(below, state.multiplier, state.low)
        high = jnp.where(below, state.high, state.multiplier)
        # One-sided slopes: to the right where the value is too small, to the left otherwise.
        up = below == rising
        inside = jnp.where(
            up, (free >= box.lower) & (free < box.upper), (free > box.lower) & (free <= box.upper)
        )
        slope = jnp.sum(jnp.where(inside, unit * unit, 0.0))
        guess = state.multiplier + (2 * slack - value) / jnp.where(slope > 0, slope, 1.0)
        trusted = (slope > 0) & (guess > low) & (guess < high)
        halved = jnp.where(jnp.isinf(high), jnp.maximum(entered, 2 * low), 0.5 * (low + high))
        guess = jnp.where(trusted, guess, halved)
        done = (jnp.abs(value - 2 * slack) <= slack) | (guess == state.multiplier)
        done |= (state.multiplier == 0) & ~below
        guess = jnp.where(done, state.multiplier, guess)
        return _Newton(guess, low, high, state.step + 1, done)

    nothing = 0.0 * query[0]
    start = _Newton(nothing, nothing, nothing + jnp.inf, nothing.astype(jnp.int32), impossible)
    end = lax.while_loop(keep_going, newton, start)
    multiplier = jnp.where(end.done | jnp.isinf(end.high), end.multiplier, end.high)
    _, point, value, slack = at(multiplier)
    step = point - query
    distance = _numerics.norm(step)
    # Weak duality at this multiplier; the minimiser itself is rounded, which costs second order.
    half_square = 0.5 * distance * distance
    error = multiplier * (2 * slack) + half_square * (2 * (dim + 4) * UNIT)
    shift = 4 * UNIT * (_numerics.norm(query) + multiplier)
    dual = half_square - multiplier * value - error - shift * shift
    lower_bound = jnp.sqrt(jnp.maximum(2 * dual, 0.0)) * (1 - 4 * UNIT)
    lower_bound = jnp.where(jnp.isnan(lower_bound), 0.0, lower_bound)
    proved = value >= slack
    residual = jnp.where(multiplier > 0, jnp.abs(value), jnp.maximum(-value, 0.0))
    return _Meeting(
        rival=rival,
        point=jnp.where(impossible, jnp.nan, point),
        multiplier=multiplier / divisor,
        distance=jnp.where(proved, distance * (1 + 2 * (dim + 4) * UNIT), jnp.inf),
        lower_bound=jnp.where(impossible, jnp.inf, lower_bound),
        residual=jnp.where(impossible, jnp.inf, residual),
    )


def _answer(best: _Meeting, lead, kernel, tolerances, kind, dtype, box, batch) -> BoundaryPoint:
    """Statuses, and everything rounded to the type of the features."""
    rtol, atol = tolerances
    upper, lower = best.distance, best.lower_bound
    width = 0.5 * (upper - lower) * (upper + lower)
    converged = jnp.isfinite(upper) & (width <= atol + 0.5 * rtol * upper * upper)
    status = jnp.where(converged, jnp.int32(Status.CONVERGED), jnp.int32(Status.PRECISION_LIMIT))
    status = jnp.where(jnp.isinf(lower), jnp.int32(Status.INFEASIBLE), status)
    status = jnp.where(lead.finite, status, jnp.int32(Status.NONFINITE))
    classes = jnp.arange(kernel.shape[1], dtype=jnp.int32)[None, :]
    multipliers = jnp.where(classes == best.rival[:, None], best.multiplier[:, None], 0.0)
    multipliers -= jnp.where(classes == lead.label[:, None], best.multiplier[:, None], 0.0)
    nan = jnp.where(lead.finite, 0.0, jnp.nan)
    # Rounding must not leave the box.
    point = jnp.clip(
        best.point.astype(dtype),
        _numerics.round_up(box.lower, dtype)[None, :],
        _numerics.round_down(box.upper, dtype)[None, :],
    )
    answer = BoundaryPoint(
        point=point + nan[:, None].astype(dtype),
        distance=_numerics.round_up(upper + nan, dtype),
        distance_lower_bound=_numerics.round_down(lower + nan, dtype),
        label=lead.label,
        rival=best.rival,
        multipliers=(multipliers + nan[:, None]).astype(dtype),
        kkt_residual=_numerics.round_up(best.residual + nan, dtype),
        domain=jnp.zeros_like(lead.label) + jnp.asarray(kind, jnp.int32),
        status=status,
    )
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape[1:]), answer)
