"""Many queries through a classic Frank-Wolfe variant, each with its certificate.

For study: the iterates of `frank_wolfe.py` run in float64 on the centred vertices, one lane a
query, from the nearest vertex; the answer is what `certificate.py` proves of the final weights.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _check, _numerics, certificate, frank_wolfe
from hullgeo.bracket import Tolerances
from hullgeo.parallel import split_over_devices
from hullgeo.result import HullProjection, Status

# Scores of all vertices for a chunk of queries: at most 128 MiB in float64.
_SCORES = 2**24
_CHUNK = 256


def project(
    vertices: Float[Array, "vertices dim"],
    tolerances: Tolerances,
    queries: Float[Array, "batch dim"],
    *,
    variant: str,
    capacity: int | None,
    dtype: Any,
    devices: tuple[Any, ...] | None,
) -> HullProjection:
    """Project at least one query by a variant; runs inside a float64 island.

    Outside jit, queries that run out of slots are run again with twice as many.

    Args:
      vertices: in their own type.
      tolerances: traced.
      queries: in their own type.
      variant: one of `frank_wolfe.VARIANTS`.
      capacity: slots to begin with; by default dim + 1, between 64 and 512.
      dtype: type of the answer.
      devices: devices to split the queries over.
    """
    num_vertices, dim = vertices.shape
    slots = min(max(dim + 1, 64), 512) if capacity is None else int(capacity)
    slots = min(slots, num_vertices + 1)
    answer = _run(vertices, tolerances, queries, variant, slots, dtype, devices)
    if _check.is_concrete(answer.status):
        while slots <= num_vertices and np.any(answer.status == Status.CAPACITY):
            slots = min(2 * slots, num_vertices + 1)
            rows = np.flatnonzero(np.asarray(answer.status) == Status.CAPACITY).astype(np.int32)
            rows = np.resize(rows, 1 << (len(rows) - 1).bit_length())
            again = answer.query[rows]
            again = _run(vertices, tolerances, again, variant, slots, dtype, devices)
            answer = _replace_rows(answer, again, rows)
    return answer


def _run(
    vertices: Array,
    tolerances: Tolerances,
    queries: Array,
    variant: str,
    slots: int,
    dtype: Any,
    devices: tuple[Any, ...] | None,
) -> HullProjection:
    """All queries with one number of slots, on one device or on several."""
    solve, jitted = _solver(variant, slots, jnp.dtype(dtype))
    if devices is None:
        return jitted((vertices, tolerances), queries)
    return split_over_devices(solve, (vertices, tolerances), queries, devices)


@jax.jit
def _replace_rows(answer: HullProjection, again: HullProjection, rows: Array) -> HullProjection:
    """Rows of an answer replaced by others with more slots."""
    extra = again.support.shape[1] - answer.support.shape[1]
    wide = answer._replace(
        support=jnp.pad(answer.support, ((0, 0), (0, extra)), mode="edge"),
        weights=jnp.pad(answer.weights, ((0, 0), (0, extra))),
    )
    return jax.tree.map(lambda old, new: old.at[rows].set(new), wide, again)


@lru_cache(maxsize=128)
def _solver(variant: str, slots: int, dtype: Any) -> tuple[Callable, Callable]:
    """The same function, plain and jitted, per static choice: compiled programs are kept by it."""
    solve = partial(_solve, variant=variant, slots=slots, dtype=dtype)
    return solve, jax.jit(solve)


def _solve(
    replicated: tuple[Array, Tolerances], queries: Array, *, variant: str, slots: int, dtype: Any
) -> HullProjection:
    """Classic Frank-Wolfe for queries `(batch, dim)`: traced inside a float64 island."""
    vertices, tolerances = replicated
    with _numerics.float64():
        hull = certificate.center_vertices(vertices)
        half_squares = 0.5 * jnp.sum(hull.rows**2, axis=1)
        lanes = jax.vmap(partial(_solve_one, hull, half_squares, tolerances, variant, slots, dtype))
        batch, dim = queries.shape
        chunks = -(-batch // max(1, min(_CHUNK, _SCORES // vertices.shape[0])))
        size = -(-batch // chunks)
        padded = jnp.pad(queries, ((0, chunks * size - batch), (0, 0)), mode="edge")
        answer = lax.map(lanes, padded.reshape(chunks, size, dim))
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:batch], answer)


def _solve_one(
    hull: certificate.CenteredHull,
    half_squares: Array,
    tolerances: Tolerances,
    variant: str,
    slots: int,
    dtype: Any,
    query: Array,
) -> HullProjection:
    """One query: Frank-Wolfe from the nearest vertex, then the certificate of its weights."""
    target = query.astype(jnp.float64) / hull.scale - hull.center
    atol = tolerances.atol / hull.scale / hull.scale

    def unfinished(state: frank_wolfe.State) -> Array:
        length = _numerics.norm(state.gradient)
        lower = jnp.maximum(length - state.gap / length, 0)
        width = (length - lower) * (length + lower) / 2
        return width > 0.99 * (atol + tolerances.rtol * length**2 / 2)

    nearest = _numerics.argmin(half_squares - _numerics.product(hull.rows, target))
    problem = frank_wolfe.Problem(
        lambda point: point - target, frank_wolfe.hull_oracle(hull.rows), smoothness=1.0
    )
    start = frank_wolfe.init(problem, frank_wolfe.Atom(nearest, hull.rows[nearest]), capacity=slots)
    state = frank_wolfe.minimize(
        problem, start, variant=variant, unfinished=unfinished, max_steps=tolerances.max_steps
    )
    heaviest = state.keys[_numerics.argmin(-state.weights)]
    support = jnp.where(state.weights > 0, state.keys, heaviest)
    proof = certificate.certify(hull, query, support, state.weights, dtype)

    upper, lower = proof.distance / hull.scale, proof.lower / hull.scale
    width = (upper - lower) * (upper + lower) / 2
    converged = width <= atol + tolerances.rtol * upper**2 / 2
    distance = _numerics.round_up(proof.distance, dtype)
    lower_bound = _numerics.round_down(proof.lower, dtype)
    finite = jnp.all(jnp.isfinite(query)) & jnp.isfinite(distance) & jnp.isfinite(lower_bound)
    status = jnp.where(
        ~finite, jnp.int32(Status.NONFINITE),
        jnp.where(converged, jnp.int32(Status.CONVERGED),
        jnp.where(state.full, jnp.int32(Status.CAPACITY),
        jnp.where(state.num_steps >= tolerances.max_steps, jnp.int32(Status.STEP_LIMIT),
        jnp.int32(Status.PRECISION_LIMIT)))),
    )  # fmt: skip
    unknown = jnp.where(jnp.all(jnp.isfinite(query)), 0, jnp.nan).astype(dtype)
    return HullProjection(
        point=proof.point.astype(dtype) + unknown[None],
        distance=distance + unknown,
        distance_lower_bound=lower_bound + unknown,
        interior_radius=0 * unknown,
        support=support,
        weights=proof.weights + unknown[None],
        gap=_numerics.round_up(proof.gap, dtype) + unknown,
        num_steps=state.num_steps,
        status=status,
        query=query,
    )
