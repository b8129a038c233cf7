"""Gauss-Newton inside a box: phi(x) = t at least change, then towards the start along the manifold.

Each step solves min |x + d - a|^2 with J d = t - phi(x) and x + d in the box (`_box.least_norm`),
for the Jacobian at x, for a running average of Jacobians, which sees past the kinks of ReLU, and
twice with damping (Levenberg and Marquardt), which comes nearer to targets that no image in the box
has; the best of several step lengths is kept, damped only where the others gain next to nothing:
the least residual after each step is not the shortest way to none. The anchor a is x itself while
the residual is too large (the shortest step that would repair it), and the start x0 once it is
small (the projection of x0 onto the linearised solution set: a walk along the null space of J
towards the start).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hullgeo import _box, _numerics
from hullgeo._convolution import canonical

_RIDGES = (1e-6, 1e-6, 1e-4, 1e-2)  # of the two exact systems, and of two damped ones
_LENGTHS = tuple(2.0**-k for k in range(10))
_MEMORY = 0.7  # weight of the former average of Jacobians
_WORTHWHILE = 0.98  # residual after an exact step, relative, above which the damped ones count too
_CHUNK = 16  # rows of the Jacobian computed at once
_SLACK = 10.0  # growth of the residual allowed to a step along the manifold
_PATIENCE = 3  # repairs after which such a step counts as failed


class Answer(NamedTuple):
    """The best point of each row: nearest to the start among those reached, else least residual."""

    point: Float[Array, "n pixels"]
    residual: Float[Array, " n"]
    distance: Float[Array, " n"]
    stationarity: Float[Array, " n"]
    stopped: Any
    num_jacobians: Int[Array, " n"]


class _State(NamedTuple):
    step: Array
    points: Array
    average: Array
    best: Array
    residual: Array  # of `best`
    distance: Array  # of `best` to the start
    stationarity: Array
    trust: Array  # share of the way towards the start that is tried
    repairs: Array  # since the last point that was reached
    failures: Array  # steps in a row without progress
    stopped: Array
    spent: Array


def jacobian(evaluate: Callable[[Any], Any], points: Array) -> tuple[Array, Array]:
    """Features `(n, dim)` and their Jacobians `(n, dim, pixels)`, some rows at a time."""

    def compute(points, cotangents):
        features, pull = jax.vjp(evaluate, points)
        spread = jax.vmap(lambda row: jnp.broadcast_to(row[None], features.shape))(cotangents)
        return features, jax.vmap(lambda cotangent: pull(cotangent)[0])(spread)

    shape = jax.eval_shape(evaluate, points)
    dim = shape.shape[-1]
    chunks = -(-dim // _CHUNK)
    unit = jnp.eye(dim, dtype=shape.dtype)
    padded = jnp.pad(unit, ((0, chunks * _CHUNK - dim), (0, 0))).reshape(chunks, _CHUNK, dim)
    features, rows = lax.map(lambda chunk: canonical(compute)(points, chunk), padded)
    rows = rows.reshape(chunks * _CHUNK, *points.shape)[:dim]
    return features[0], rows.transpose(1, 0, 2).astype(points.dtype)


def solve(
    evaluate: Callable[[Any], Any],
    goal: Float[Array, "n dim"],
    scale: Float[Array, " n"],
    start: Float[Array, "n pixels"],
    origin: Float[Array, "n pixels"],
    lower: Float[Array, "n pixels"],
    upper: Float[Array, "n pixels"],
    rtol: Array,
    max_steps: Array,
    polish_steps: Array,
    key: Array,
) -> Answer:
    """Points with `|phi(x) - goal| <= rtol * scale` near `origin`, searched from `start`.

    At most `max_steps` Jacobians per row, of which at most `polish_steps` once it is reached.
    """
    lengths = jnp.asarray(_LENGTHS, start.dtype)
    undamped = (jnp.arange(len(_RIDGES) * len(_LENGTHS)) < 2 * len(_LENGTHS))[:, None]
    size = start.shape[0]

    def relative(features):
        return _numerics.norm((features - goal) / scale[:, None])

    def running(state):
        return (state.step < max_steps) & ~state.stopped.all()

    def body(state):
        points = state.points
        features, matrix = jacobian(evaluate, points)
        error = goal - features
        residual = relative(features)
        distance = _numerics.norm(points - origin)
        reached = residual <= rtol
        nearer = jnp.where(
            state.residual <= rtol, reached & (distance < state.distance), residual < state.residual
        )
        gain = jnp.where(state.residual <= rtol, 1e-3 * state.distance, 0)
        progress = nearer & (distance < state.distance - gain)
        best = jnp.where(nearer[:, None], points, state.best)
        best_residual = jnp.where(nearer, residual, state.residual)
        best_distance = jnp.where(nearer, distance, state.distance)
        stationarity = jnp.where(
            nearer, _stationarity(matrix, error, points, lower, upper), state.stationarity
        )
        arrived = best_residual <= rtol
        repairs = jnp.where(reached | ~arrived, 0, state.repairs + 1)
        lost = repairs > _PATIENCE
        idle = reached & ~progress & (state.residual <= rtol)
        trust = jnp.where(lost | idle, state.trust / 4, state.trust)
        trust = jnp.where(progress & (state.residual <= rtol), jnp.minimum(2 * trust, 1), trust)
        towards = reached & ~lost
        first = state.step == 0
        average = jnp.where(first, matrix, _MEMORY * state.average + (1 - _MEMORY) * matrix)
        anchor = jnp.where(towards[:, None], origin, points)

        def step_of(system):
            matrix, ridge = system
            back = jnp.einsum("ndp,np->nd", matrix, points - anchor, precision=_numerics.HIGHEST)
            move = _box.least_norm(
                matrix, error + back, lower - anchor, upper - anchor,
                ridge=ridge, inequality=False, num_steps=6,
            )  # fmt: skip
            return anchor + move - points

        systems = jnp.stack([matrix, average, *([matrix] * (len(_RIDGES) - 2))])
        directions = lax.map(step_of, (systems, jnp.asarray(_RIDGES, points.dtype)))
        reach = jnp.where(towards, trust, 1)
        trial = points[None, None] + directions[:, None] * (
            lengths[None, :, None, None] * reach[None, None, :, None]
        )
        trial = jnp.clip(trial, lower[None, None], upper[None, None]).reshape(-1, *points.shape)
        values = lax.map(lambda point: relative(evaluate(point)), trial)
        values = jnp.where(jnp.isfinite(values), values, jnp.inf)
        far = jax.vmap(lambda point: _numerics.norm(point - origin))(trial)
        allowed = values <= _SLACK * rtol
        exact = jnp.where(undamped, values, jnp.inf).min(0) < _WORTHWHILE * residual
        values = jnp.where(exact[None] & ~undamped, jnp.inf, values)
        merit = jnp.where(towards[None], jnp.where(allowed, far, jnp.inf), values)
        choice = lax.argmin(merit, 0, jnp.int32)
        chosen = jnp.take_along_axis(trial, choice[None, :, None], axis=0)[0]
        value = jnp.take_along_axis(merit, choice[None], axis=0)[0]
        improved = value < jnp.where(towards, distance, residual) * (1 - 1e-4)
        fresh = jax.random.fold_in(key, state.step)
        noise = jax.random.normal(fresh, points.shape[1:], points.dtype)  # whatever the other rows
        length = _numerics.norm(directions[0])[:, None] / jnp.sqrt(points.shape[-1] * 1.0)
        jitter = (0.1 * length).astype(points.dtype) * noise[None]
        jittered = jnp.clip(points + jitter, lower, upper)
        failures = jnp.where(improved, 0, state.failures + 1)
        stay = jnp.where((towards & ~improved)[:, None], points, jittered)
        moved = jnp.where(improved[:, None], chosen, stay)
        moved = jnp.where(lost[:, None], best, moved)
        repairs = jnp.where(lost, 0, repairs)
        polishing = jnp.where(arrived, state.spent[1] + 1, 0)
        stopped = state.stopped | (arrived & ((trust < 1e-2) | (polishing > polish_steps)))
        stopped |= towards & ~improved
        stopped |= ~arrived & (failures > 8)
        frozen = state.stopped

        def keep(new, old):
            return jnp.where(frozen.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        return _State(
            step=state.step + 1,
            points=keep(moved, points),
            average=average,
            best=keep(best, state.best),
            residual=keep(best_residual, state.residual),
            distance=keep(best_distance, state.distance),
            stationarity=keep(stationarity, state.stationarity),
            trust=keep(trust, state.trust),
            repairs=keep(repairs, state.repairs),
            failures=keep(failures, state.failures),
            stopped=stopped,
            spent=jnp.stack(
                [state.spent[0] + (~frozen).astype(jnp.int32), keep(polishing, state.spent[1])]
            ),
        )

    zero = jnp.zeros_like(scale)
    count = jnp.zeros_like(scale, jnp.int32)
    dim = goal.shape[-1]
    state = _State(
        step=jnp.zeros_like(max_steps),
        points=start,
        average=jnp.zeros_like(start)[:, None] * jnp.ones((1, dim, 1), start.dtype),
        best=start,
        residual=jnp.full_like(zero, jnp.inf),
        distance=jnp.full_like(zero, jnp.inf),
        stationarity=jnp.full_like(zero, jnp.nan),
        trust=jnp.ones_like(zero),
        repairs=count,
        failures=count,
        stopped=zero > 0,
        spent=jnp.zeros((2, size), jnp.int32) + count[None],
    )
    final = lax.while_loop(running, body, state)
    return Answer(
        final.best,
        final.residual,
        final.distance,
        final.stationarity,
        final.stopped,
        final.spent[0],
    )


def _stationarity(matrix, error, points, lower, upper):
    """Norm of the projected gradient of |phi - t|^2 / 2, relative to |J| |phi - t|."""
    descent = jnp.einsum("ndp,nd->np", matrix, error, precision=_numerics.HIGHEST)
    blocked = ((points <= lower) & (descent < 0)) | ((points >= upper) & (descent > 0))
    size = _numerics.norm(matrix.reshape(matrix.shape[0], -1)) * _numerics.norm(error)
    free = _numerics.norm(jnp.where(blocked, 0, descent))
    return free / jnp.where(size > 0, size, 1)
