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
from hullgeo.domain import Found, Options
from hullgeo.dual_newton import Conditions
from hullgeo.features import LinearHead
from hullgeo.hull_dual import nearest_in_hull
from hullgeo.oracle import Hull
from hullgeo.planes import UNIT
from hullgeo.result import BoundaryPoint

_MAX_STEPS = 200
_CHUNK = 256


def nearest_boundary_point(
    features: Float[Array | np.ndarray, "*batch dim"],
    head: LinearHead,
    *,
    rival: Int[Array | np.ndarray, "*#batch"] | int | None = None,
    lower: Any = None,
    upper: Any = None,
    hull: Float[Array | np.ndarray, "vertices dim"] | Hull | None = None,
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
      hull: points `(vertices, dim)` whose convex hull is the domain, or a `Hull` from
        `prepare_hull`; not together with a box.
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
    with _numerics.float64():
        wanted = jnp.broadcast_to(jnp.asarray(-1 if rival is None else rival, jnp.int32), batch)
        options = domain.options(lower, upper, hull, dim, rtol, atol)
        if hull is not None:
            return _nearest_in_hull(features, wanted, head, hull, options)
        return _nearest_in_box(features, wanted, head.kernel, head.bias, options)


def _check_rival(rival: Any, batch: tuple[int, ...], num_classes: int) -> None:
    dtype = rival.dtype if hasattr(rival, "dtype") else np.result_type(rival)
    if not np.issubdtype(dtype, np.integer):
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


class _Pairs(NamedTuple):
    """Usable queries with the bounds of all classes, infinite for those that are not asked."""

    queries: Float[Array, "lanes dim"]
    lead: planes.Lead
    bounds: Float[Array, "lanes classes"]


def _pairs(features, wanted, kernel, bias) -> _Pairs:
    wide = jnp.asarray(features, jnp.float64).reshape(-1, kernel.shape[0])
    lead = planes.lead(wide, kernel, bias)
    wanted, label = wanted.reshape(-1, 1), lead.label[:, None]
    classes = jnp.arange(kernel.shape[1], dtype=jnp.int32)[None, :]
    asked = jnp.where(wanted < 0, classes != label, classes == wanted)
    bounds = jnp.where(wanted == label, 0.0, lead.proved)
    return _Pairs(
        jnp.where(lead.finite[:, None], wide, 0.0), lead, jnp.where(asked, bounds, jnp.inf)
    )


@jax.jit
def _nearest_in_box(features, wanted, kernel, bias, options: Options) -> BoundaryPoint:
    kernel, bias = (jnp.asarray(x, jnp.float64) for x in (kernel, bias))
    pairs = _pairs(features, wanted, kernel, bias)
    columns = kernel.T

    def solve(row):
        query, label, bounds = row
        return _over_rivals(query, label, bounds, columns, bias, options.box)

    rows = (pairs.queries, pairs.lead.label, pairs.bounds)
    best = planes.in_chunks(solve, rows, _CHUNK)
    found = Found(best.point, best.multiplier, best.distance, best.lower_bound, best.residual)
    return _answer(found, best.rival, pairs.lead, kernel, features, options)


def _answer(found: Found, rival, lead, kernel, features, options) -> BoundaryPoint:
    """The public answer, from multipliers of `k_rival - k_label` themselves."""
    classes = jnp.arange(kernel.shape[1], dtype=jnp.int32)[None, :]
    multiplier = found.multipliers[:, None]
    by_class = jnp.where(classes == rival[:, None], multiplier, 0.0)
    by_class -= jnp.where(classes == lead.label[:, None], multiplier, 0.0)
    return domain.boundary_point(
        found._replace(multipliers=by_class), rival, lead, options, features.dtype,
        features.shape[:-1],
    )  # fmt: skip


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


def _nearest_in_hull(features, wanted, head, hull, options: Options) -> BoundaryPoint:
    """The pairs of query and rival in two rounds: the nearest plane first, then what it leaves."""
    kernel, bias = (jnp.asarray(part).astype(jnp.float64) for part in head)
    pairs = _jitted_pairs(features, wanted, kernel, bias)
    num_queries, num_classes = pairs.bounds.shape
    rows = np.arange(num_queries, dtype=np.int32)
    if not num_queries:
        return _nearest_in_box(features, wanted, kernel, bias, options)
    if not _check.is_concrete(pairs.bounds):
        query, rival = np.indices((num_queries, num_classes), dtype=np.int32).reshape(2, -1)
        lanes = _solve_pairs(pairs, query, rival, kernel, bias, hull)
        return _best_of(lanes, pairs, kernel, features, options)
    bounds = np.array(pairs.bounds)
    rival = bounds.argmin(axis=1).astype(np.int32)
    nearest = _solve_pairs(pairs, rows, rival, kernel, bias, hull)
    bounds[rows, rival] = np.inf
    left = np.argwhere(bounds < np.asarray(nearest.found.distance)[:, None]).astype(np.int32)
    if len(left):
        left = np.resize(left, (-(-len(left) // num_queries) * num_queries, 2))
        rest = _solve_pairs(pairs, left[:, 0], left[:, 1], kernel, bias, hull)
        nearest = jax.tree.map(lambda *parts: jnp.concatenate(parts), nearest, rest)
    return _best_of(nearest, pairs, kernel, features, options)


class _Lanes(NamedTuple):
    """Solved pairs of query and rival; the multipliers are those of `k_rival - k_label`."""

    query: Int[Array, " lanes"]
    rival: Int[Array, " lanes"]
    found: Found


_jitted_pairs = jax.jit(_pairs)


def _solve_pairs(pairs: _Pairs, query, rival, kernel, bias, hull) -> _Lanes:
    queries, conditions, lengths, excluded = _pose_pairs(pairs, query, rival, kernel, bias)
    found = nearest_in_hull(queries, conditions, excluded, hull)
    multipliers = -found.multipliers[:, 0] / lengths
    lower_bound = jnp.maximum(found.lower_bound, pairs.bounds[query, rival])
    found = found._replace(multipliers=multipliers, lower_bound=lower_bound)
    return _Lanes(jnp.asarray(query), jnp.asarray(rival), found)


@jax.jit
def _pose_pairs(pairs: _Pairs, query, rival, kernel, bias):
    """`z_label - z_rival <= 0`, scaled; pairs that can never meet are excluded."""
    label = pairs.lead.label[query]
    normals = (kernel[:, label] - kernel[:, rival]).T
    lengths = _numerics.norm(normals)
    divisor = jnp.where(lengths > 0, lengths, 1.0)
    columns = (normals / divisor[:, None])[:, :, None]
    offsets = ((bias[label] - bias[rival]) / divisor)[:, None]
    used = (lengths > 0)[:, None]
    conditions = Conditions(columns, jnp.where(used, offsets, 0.0), used & False, used)
    return pairs.queries[query], conditions, divisor, jnp.isinf(pairs.bounds[query, rival])


@jax.jit
def _best_of(lanes: _Lanes, pairs: _Pairs, kernel, features, options: Options) -> BoundaryPoint:
    """The nearest over the rivals of each query; rivals left out are proved to be farther."""
    found, query = lanes.found, lanes.query
    none = jnp.full_like(pairs.bounds[:, 0], jnp.inf)
    distance = none.at[query].min(found.distance)
    lower_bound = none.at[query].min(found.lower_bound)
    wins = jnp.where(
        jnp.isinf(distance[query]),
        found.lower_bound == lower_bound[query],
        found.distance == distance[query],
    )
    lane = jnp.arange(query.shape[0], dtype=jnp.int32)
    last = jnp.full_like(pairs.lead.label, query.shape[0] - 1)
    winner = last.at[query].min(jnp.where(wins, lane, query.shape[0] - 1))
    best = jax.tree.map(lambda array: array[winner], found)
    rival = jnp.where(jnp.isinf(lower_bound), pairs.lead.label, lanes.rival[winner])
    return _answer(
        best._replace(lower_bound=lower_bound), rival, pairs.lead, kernel, features, options
    )
