"""The phases of a search for the nearest flip, on rows of flattened images; see `flip.py`.

Every phase takes `evaluate`, points `(n, pixels)` to logits `(n, num_classes)`, and a `Problem`. A
*lane* is one descent of one row: a rival and a start.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _box, _numerics
from hullgeo._convolution import canonical

Evaluate = Callable[[Any], Any]

_CUTS = 10  # linearisations kept by the polish
_ROUNDING = 16.0  # rounding of a logit, in units of eps times the largest logit
_BLIND_GROWTH = 1.3  # of the radius where the gradient is zero
_MULTIPLIER = 10.0  # first weight of the constraint; its optimum is 1 where margins are linear
_STIFFER = 1.02  # growth of the penalty until the constraint has been met
_RATE = 0.1  # first step per pixel, in units of the distance expected
_CALM = 0.01  # last step, relative to the first
_SEARCHES = 30  # evaluations to find the change of class on the ray
_WIDENINGS = 14
_ROUNDS = 3  # measurements of the rounding
FORWARD = _SEARCHES + _ROUNDS * (4 + 2 * _WIDENINGS)  # evaluations of the bracket per row


class Problem(NamedTuple):
    """One search per row: what is asked, and where a point may lie."""

    origin: Float[Array, "n pixels"]
    lower: Float[Array, "n pixels"]  # of points; equal to `upper` where a pixel is fixed
    upper: Float[Array, "n pixels"]
    leave: Int[Array, " n"]
    enter: Int[Array, " n"]  # the class to reach; -1 for any other
    basis: Float[Array, "k pixels"] | None  # orthonormal rows

    def rows(self, index: Array) -> "Problem":
        """The problems of some rows, in that order."""
        return self._replace(**{name: getattr(self, name)[index] for name in self._fields[:5]})

    def point(self, displacement: Array) -> Array:
        """The allowed point nearest to `origin + displacement`."""
        return jnp.clip(self.origin + displacement, self.lower, self.upper)

    def project(self, displacement: Array) -> Array:
        """The displacement made to fit bounds and subspace (by Dykstra's alternating method)."""
        low, high = self.lower - self.origin, self.upper - self.origin
        basis = self.basis
        if basis is None:
            return jnp.clip(displacement, low, high)

        def body(_, state):
            inside, correction = state
            spanned = _into_span(basis, inside)
            shifted = spanned + correction
            inside = jnp.clip(shifted, low, high)
            return inside, shifted - inside

        state = (displacement, jnp.zeros_like(displacement))
        return lax.fori_loop(0, 20, body, state)[0]

    def margin(self, logits: Array) -> Array:
        """Positive where the class has changed as asked."""
        others = jnp.where(is_class(self.leave, logits), -jnp.inf, logits).max(-1)
        free = others - take(logits, self.leave)
        rest = jnp.where(is_class(self.enter, logits), -jnp.inf, logits).max(-1)
        asked = take(logits, jnp.maximum(self.enter, 0)) - rest
        return jnp.where(self.enter >= 0, asked, free)

    def strongest(self, logits: Array) -> Array:
        """The class that has taken over, or is nearest to."""
        others = jnp.where(is_class(self.leave, logits), -jnp.inf, logits)
        return jnp.where(self.enter >= 0, self.enter, lax.argmax(others, 1, jnp.int32))

    def cotangent(self, logits: Array, rival: Array) -> Array:
        """The derivative of the margin towards one rival with respect to the logits."""
        rest = jnp.where(is_class(self.enter, logits), -jnp.inf, logits)
        strongest = lax.argmax(rest, 1, jnp.int32)
        below = jnp.where(self.enter >= 0, strongest, self.leave)
        return is_class(rival, logits).astype(logits.dtype) - is_class(below, logits).astype(
            logits.dtype
        )


def is_class(index: Array, logits: Array) -> Array:
    return index[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]


def take(logits: Array, index: Array) -> Array:
    return jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]


def _into_span(basis: Array, displacement: Array) -> Array:
    return _numerics.product(_numerics.product(displacement, basis.T), basis)


class Found(NamedTuple):
    """The best flip of each row so far.

    Attributes:
      point: a flip where `distance` is finite, otherwise where the search ended.
      distance: its distance, infinite without a flip.
      rival: the class descended to.
      sloped: whether any gradient differed from zero.
    """

    point: Float[Array, "n pixels"]
    distance: Float[Array, " n"]
    rival: Int[Array, " n"]
    sloped: Bool[Array, " n"]


def margin_and_gradient(
    evaluate: Evaluate, problem: Problem, points: Array, rival: Array
) -> tuple[Array, Array, Array]:
    """Logits, the margin towards one rival, and its gradient as far as it can be followed."""

    def compute(points):
        logits, pull = jax.vjp(evaluate, points)
        cotangent = problem.cotangent(logits, rival)
        return logits, (logits * cotangent).sum(-1), pull(cotangent)[0]

    logits, towards, gradient = canonical(compute)(points)
    gradient = jnp.where(problem.lower < problem.upper, gradient, 0)
    if problem.basis is not None:
        gradient = _into_span(problem.basis, gradient)
    return logits, towards, gradient


def nearest_rivals(
    evaluate: Evaluate, problem: Problem, logits: Array, candidates: int, num_rivals: int
) -> tuple[Array, Array]:
    """The classes at which the linearised logits tie nearest, and the distances.

    Each `(n, num_rivals)`; a class that the linearisation cannot reach is infinitely far.
    """
    inside = problem.point(jnp.zeros_like(problem.origin))
    left = jnp.where(is_class(problem.leave, logits), -jnp.inf, logits)
    classes = lax.top_k(left, candidates)[1].astype(jnp.int32)
    classes = jnp.where(problem.enter[:, None] >= 0, problem.enter[:, None], classes)

    def one(rival):
        _, towards, gradient = margin_and_gradient(evaluate, problem, inside, rival)
        gap = -towards + (gradient * (inside - problem.origin)).sum(-1)
        step = _project_origin(problem, gradient[:, None], gap[:, None])
        met = (gradient * step).sum(-1) >= gap - 0.01 * jnp.abs(gap)
        return jnp.where(met & (gradient != 0).any(-1), _numerics.norm(step), jnp.inf)

    distance = lax.map(one, classes.T)
    order = jnp.argsort(distance.T, axis=-1)[:, :num_rivals].astype(jnp.int32)
    reach = jnp.take_along_axis(distance.T, order, axis=1)
    return jnp.take_along_axis(classes, order, axis=1), reach


def descend(
    evaluate: Evaluate,
    problem: Problem,
    rival: Array,
    radius: Array,
    displacement: Array,
    num_steps: Array,
    key: Array,
    per_row: int,
) -> Found:
    """Decoupled direction and norm: rotate towards the gradient, shrink after a flip, else grow.

    The rotation and the change of the radius fall along a cosine. Where a gradient is zero the
    rotation is random and the radius grows fast. The first point is `origin + displacement`; each
    row has `per_row` lanes, with the same random numbers in every row.
    """
    lanes, pixels = displacement.shape

    def body(step, state):
        displacement, radius, found = state
        share = step.astype(radius.dtype) / jnp.maximum(num_steps, 1).astype(radius.dtype)
        fall = 0.5 * (1 + jnp.cos(math.pi * share))
        rotation, change = 0.05 + 0.95 * fall, 0.01 + 0.09 * fall
        points = problem.point(displacement)
        logits, _, gradient = margin_and_gradient(evaluate, problem, points, rival)
        distance = _numerics.norm(points - problem.origin)
        flipped = problem.margin(logits) > 0
        sloped = (gradient != 0).any(-1)
        reached = problem.strongest(logits)
        found = _better(found, points, jnp.where(flipped, distance, jnp.inf), reached, sloped)
        missed = ~jnp.isfinite(found.distance)
        found = found._replace(point=jnp.where(missed[:, None], points, found.point))
        own = jax.random.normal(jax.random.fold_in(key, step), (per_row, pixels), points.dtype)
        noise = jnp.tile(own, (lanes // per_row, 1))
        direction = _unit(jnp.where(sloped[:, None], gradient, noise))
        growth = jnp.where(sloped, 1 + change, _BLIND_GROWTH)
        radius = jnp.where(flipped, jnp.minimum(radius, distance) * (1 - change), radius * growth)
        moved = _unit(displacement + (rotation * radius)[:, None] * direction)
        return problem.project(moved * radius[:, None]), radius, found

    nowhere = jnp.full_like(radius, jnp.inf)
    found = Found(problem.point(displacement), nowhere, rival, jnp.zeros_like(radius, bool))
    return lax.fori_loop(0, num_steps, body, (displacement, radius, found))[-1]


def settle(
    evaluate: Evaluate, problem: Problem, logits: Array, scout: Found, num_steps: Array
) -> Found:
    """Augmented Lagrangian descent to one rival each, from the start again (Rony et al. 2021).

    Minimises |d| / |d_scout| + P(y; mu, rho) with y the margin towards the rival, negated, relative
    to that at the start, whose `logits` are given, and P = mu (y + rho y^2) where y >= 0,
    mu y / (1 - rho y) where y < 0 (arXiv:2011.11857). mu follows P' in a running average; each
    pixel's steps are divided by the root mean square of its last gradients and fall exponentially
    once a flip was found: first too large for any local minimum to hold them, at last small. A row
    without a flip starts where its scout ended.
    """
    met = jnp.isfinite(scout.distance)
    begin = jnp.where(met[:, None], 0, scout.point - problem.origin)
    unit = jnp.where(met, scout.distance, _numerics.norm(begin))
    unit = jnp.where(unit > 0, unit, 1)
    gap = jnp.abs((logits * problem.cotangent(logits, scout.rival)).sum(-1))
    gap = jnp.where(gap > 0, gap, 1)

    def body(step, state):
        displacement, square, momentum, weight, stiffness, hit, found = state
        points = problem.point(displacement)
        logits, towards, gradient = margin_and_gradient(evaluate, problem, points, scout.rival)
        distance = _numerics.norm(points - problem.origin)
        flipped = problem.margin(logits) > 0
        reached = problem.strongest(logits)
        sloped = (gradient != 0).any(-1)
        found = _better(found, points, jnp.where(flipped, distance, jnp.inf), reached, sloped)
        missed = ~jnp.isfinite(found.distance)
        found = found._replace(point=jnp.where(missed[:, None], points, found.point))
        hit = jnp.where(flipped, jnp.minimum(hit, step), hit)
        stiffness = jnp.where(hit > step, stiffness * _STIFFER, stiffness)
        missing = -towards / gap
        over, under = 1 + 2 * stiffness * missing, 1 / (1 + stiffness * jnp.abs(missing)) ** 2
        steepness = jnp.where(missing >= 0, over, under)
        weight = (weight + weight * steepness) / 2
        pull = (weight * steepness * unit / gap)[:, None] * gradient
        slope = _unit(displacement) - pull
        square = (square + slope**2) / 2
        momentum = momentum / 2 + slope / (jnp.sqrt(square) + 1e-8)
        share = jnp.maximum(step - hit, 0).astype(unit.dtype) / (num_steps - hit).astype(unit.dtype)
        rate = _RATE * _CALM**share * unit
        moved = displacement - rate[:, None] * momentum
        return problem.project(moved), square, momentum, weight, stiffness, hit, found

    one = jnp.ones_like(unit)
    never = jnp.zeros_like(scout.rival) + num_steps + 1
    state = (
        begin, jnp.ones_like(begin), jnp.zeros_like(begin), _MULTIPLIER * one, one, never, scout
    )  # fmt: skip
    return lax.fori_loop(0, num_steps, body, state)[-1]


def polish(evaluate: Evaluate, problem: Problem, found: Found, num_steps: Array) -> Found:
    """Sequential quadratic programming with the last linearisations of the rival's margin.

    Each point is pulled to the boundary along its ray by its own linearisation; the nearest such
    point is returned, close to the boundary, not yet a flip. Linearisations that exclude it are
    shifted to touch it, and a step that led to no nearer point halves the next one.
    """
    size = found.distance.shape[0]

    def body(step, state):
        points, normals, offsets, reach, found = state
        _, towards, gradient = margin_and_gradient(evaluate, problem, points, found.rival)
        displacement = points - problem.origin
        rise = (gradient * displacement).sum(-1)
        stretch = -towards / jnp.where(rise > 0, rise, 1)
        distance = _numerics.norm(displacement) * (1 + stretch)
        near = (rise > 0) & (jnp.abs(stretch) < 0.1)
        pulled = problem.point((1 + stretch)[:, None] * displacement)
        sloped = (gradient != 0).any(-1)
        distance = jnp.where(near, distance, jnp.inf)
        nearer = (distance < found.distance) | jnp.isinf(found.distance)
        reach = jnp.where(nearer, 1, reach / 2)
        found = _better(found, pulled, distance, found.rival, sloped)
        slot = step % _CUTS
        normals = lax.dynamic_update_index_in_dim(normals, gradient, slot, 1)
        offsets = lax.dynamic_update_index_in_dim(offsets, rise - towards, slot, 1)
        nearest = found.point - problem.origin
        touching = jnp.einsum("nkp,np->nk", normals, nearest, precision=_numerics.HIGHEST)
        used = (normals != 0).any(-1) & jnp.isfinite(found.distance)[:, None]
        shifted = jnp.where(used, jnp.minimum(offsets, touching), offsets)
        step_to = _project_origin(problem, normals, shifted)
        moved = problem.point(nearest + reach[:, None] * (step_to - nearest))
        return jnp.where(sloped[:, None], moved, points), normals, offsets, reach, found

    normals = jnp.zeros_like(problem.origin)[:, None] * jnp.ones((1, _CUTS, 1), found.point.dtype)
    offsets = jnp.broadcast_to(-jnp.ones_like(found.distance)[:, None], (size, _CUTS))
    state = (found.point, normals, offsets, jnp.ones_like(found.distance), found)
    return lax.fori_loop(0, num_steps, body, state)[-1]


def _project_origin(problem: Problem, normals: Array, offsets: Array) -> Array:
    """The shortest displacement with `normals @ d >= offsets` within bounds and subspace."""
    step = _box.least_norm(
        normals,
        offsets,
        problem.lower - problem.origin,
        problem.upper - problem.origin,
        ridge=1e-6,
        inequality=True,
        num_steps=12,
    )
    return step if problem.basis is None else problem.project(step)


def _better(found: Found, point: Array, distance: Array, rival: Array, sloped: Array) -> Found:
    nearer = distance < found.distance
    return Found(
        jnp.where(nearer[:, None], point, found.point),
        jnp.where(nearer, distance, found.distance),
        jnp.where(nearer, rival, found.rival),
        found.sloped | sloped,
    )


def _unit(vectors: Array) -> Array:
    length = _numerics.norm(vectors)[:, None]
    return vectors / jnp.where(length > 0, length, 1)


class Bracket(NamedTuple):
    """Both sides of the change of class on the ray through a point."""

    point: Float[Array, "n pixels"]
    before: Float[Array, "n pixels"]
    distance: Float[Array, " n"]
    distance_before: Float[Array, " n"]
    margin: Float[Array, " n"]
    rival: Int[Array, " n"]
    reached: Bool[Array, " n"]
    confirmed: Bool[Array, " n"]


class _Ends(NamedTuple):
    """Positions of both ends on the ray, and what was measured there."""

    low: Array
    high: Array
    margin: Array
    rival: Array
    confirmed: Array


def bracket(evaluate: Evaluate, problem: Problem, points: Array) -> Bracket:
    """Bisect along the ray, then move both ends until the margin exceeds the network's rounding.

    The rounding is taken as a few units in the last place of the largest logit, or as several
    times what the same points give evaluated alone, whichever is more.
    """
    size = points.shape[0]
    ray = points - problem.origin
    one = jnp.ones_like(ray[:, 0])
    both = problem.rows(jnp.tile(jnp.arange(size, dtype=jnp.int32), 2))

    def at(position):
        return problem.point(position[:, None] * ray)

    def search(step, state):
        """Grow beyond the point until the class has changed, then bisect."""
        low, high, reached = state
        growing = ~reached
        growth = jnp.where(step == 0, 1, 1 + 1e-4 * 3.0 ** step.astype(one.dtype))
        trial = jnp.where(growing, growth, low + (high - low) / 2)
        flipped = problem.margin(evaluate(at(trial))) > 0
        low = jnp.where(flipped, low, trial)
        high = jnp.where(flipped, trial, high)
        return low, high, reached | flipped

    state = (jnp.zeros_like(one), jnp.full_like(one, jnp.inf), one < 0)
    low, high, reached = lax.fori_loop(0, _SEARCHES, search, state)
    high = jnp.where(reached, high, one)

    def confirm(_, ends):
        points = jnp.concatenate([at(ends.low), at(ends.high)])
        logits = evaluate(points)
        alone = lax.map(lambda point: evaluate(point[None])[0], points)
        margin = both.margin(logits)
        noise = jnp.abs(both.margin(alone) - margin).reshape(2, size).max(0)
        unit = jnp.finfo(margin.dtype).eps * jnp.abs(logits).max(-1).reshape(2, size).max(0)
        need = jnp.maximum(_ROUNDING * unit, 8 * noise)
        before, after = margin.reshape(2, size)
        done_low = (before <= -need) | (ends.low == 0)
        done_high = after >= need

        def widen(step, state):
            low, high, done_low, done_high = state
            width = jnp.finfo(margin.dtype).eps * 2.0 ** step.astype(one.dtype)
            low = jnp.where(done_low, low, jnp.maximum(low * (1 - width), 0))
            high = jnp.where(done_high, high, high * (1 + width))
            moved = both.margin(evaluate(jnp.concatenate([at(low), at(high)])))
            before, after = moved.reshape(2, size)
            return low, high, done_low | (before <= -2 * need), done_high | (after >= 2 * need)

        state = (ends.low, ends.high, done_low, done_high)
        low, high, *_ = lax.fori_loop(0, _WIDENINGS, widen, state)
        rival = problem.strongest(logits[size:])
        return _Ends(low, high, after, rival, done_low & done_high)

    rival = jnp.zeros_like(problem.leave)
    ends = _Ends(low, high, jnp.zeros_like(one), rival, one < 0)
    ends = lax.fori_loop(0, _ROUNDS, confirm, ends)
    point, before = at(ends.high), at(ends.low)
    return Bracket(
        point=point,
        before=before,
        distance=_numerics.norm(point - problem.origin),
        distance_before=_numerics.norm(before - problem.origin),
        margin=ends.margin,
        rival=ends.rival,
        reached=reached,
        confirmed=ends.confirmed,
    )


def kkt_residual(evaluate: Evaluate, problem: Problem, points: Array, rival: Array) -> Array:
    """Relative distance from the displacement to the shortest one of its linearised margin."""
    _, _, gradient = margin_and_gradient(evaluate, problem, points, rival)
    displacement = points - problem.origin
    rise = (gradient * displacement).sum(-1)
    shortest = _project_origin(problem, gradient[:, None], rise[:, None])
    length = _numerics.norm(displacement)
    ratio = _numerics.norm(displacement - shortest) / jnp.where(length > 0, length, 1)
    return jnp.where(rise > 0, jnp.minimum(ratio, 1), jnp.where(length > 0, 1, 0))


def orthonormal(vectors: Float[Array, "k pixels"]) -> Float[Array, "k pixels"]:
    """Orthonormal rows with the same span; zero rows where the vectors depend on each other."""
    _, length, rows = jnp.linalg.svd(vectors, full_matrices=False)
    limit = jnp.finfo(length.dtype).eps * sum(vectors.shape) * length.max()
    return jnp.where((length > limit)[:, None], rows, 0)
