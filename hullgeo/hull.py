"""Distance from queries to the convex hull of vertices, with proof.

    distance(q, V) = min |V' w - q|  over  w >= 0, sum w = 1.

arXiv:2202.04052 asks where images lie relative to the convex hull of a training set; this module
answers for pixels and features alike. `project_to_hull` finds the nearest point by a Frank-Wolfe
method in float64, and `certificate.py` encloses the true distance between two proved bounds.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hullgeo import _check, _numerics, certificate, frank_wolfe
from hullgeo.parallel import split_over_devices
from hullgeo.result import HullProjection, Membership, Status

# Scores of all vertices for a chunk of queries: at most 128 MiB in float64.
_SCORES = 2**24
_CHUNK = 256


def project_to_hull(
    queries: Float[Array | np.ndarray, "*batch dim"],
    vertices: Float[Array | np.ndarray, "vertices dim"],
    *,
    variant: str = "blended_pairwise",
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
    max_steps: int | Array = 2000,
    capacity: int | None = None,
    devices: Sequence[Any] | None = None,
) -> HullProjection:
    """The nearest point of a convex hull to each query, with a two-sided certificate.

    Guarantee: the true distance of the numbers passed lies in [`distance_lower_bound`, `distance`],
    rounding included, whatever the status. Both are computed in float64, also where the arrays are
    narrower and whatever `jax_enable_x64` says, and rounded outwards to the type of the answer, the
    wider of the two input types.

    A query is finished when (distance^2 - distance_lower_bound^2) / 2 <= atol + rtol distance^2 / 2
    (before rounding to a narrower type). Inside the hull the distance is 0 and no relative
    tolerance can be met: pass `atol`, or read the bracket of a query whose status is
    `PRECISION_LIMIT`.

    Args:
      queries: `(*batch, dim)`, any leading batch.
      vertices: `(vertices, dim)`, one vertex a row, in the same units.
      variant: a Frank-Wolfe variant: "blended_pairwise", "pairwise", "away" or "vanilla".
      rtol: relative tolerance of the squared distance.
      atol: absolute tolerance of half the squared distance, in squared units.
      max_steps: limit of Frank-Wolfe steps, each one pass over all vertices.
      capacity: slots for vertices of the support, at least two; by default as many as the distance
        may need in general position, dim + 1, between 64 and 512. Outside jit, queries that need
        more are run again with twice the slots.
      devices: devices over which the queries are split, the vertices being copied to each.

    Returns:
      a `HullProjection`. Status `CONVERGED`, `STEP_LIMIT`, `CAPACITY`, `PRECISION_LIMIT` or, for
      queries with NaN or infinity, `NONFINITE` (their numbers are NaN).

    Raises:
      ValueError: shapes, types or options that do not fit; a vertex that is not finite, unless
        traced (then every status is `NONFINITE`).

    Source: the variants as in `hullgeo.frank_wolfe`; the bracket is the Frank-Wolfe gap's, see
    `hullgeo.certificate`.
    """
    _check_arrays(queries, vertices)
    _check.one_of("variant", variant, frank_wolfe.VARIANTS)
    _check.nonnegative("rtol", rtol)
    _check.nonnegative("atol", atol)
    _check.at_least("max_steps", max_steps, 1)
    num_vertices, dim = vertices.shape
    slots = min(max(dim + 1, 64), 512) if capacity is None else capacity
    _check.at_least("capacity", slots, 2)
    slots = min(int(slots), num_vertices + 1)

    with _numerics.float64():
        queries, vertices = jnp.asarray(queries), jnp.asarray(vertices)
        batch = queries.shape[:-1]
        flat = queries.reshape(-1, dim)
        options = _Options(_wide(rtol), _wide(atol), jnp.asarray(max_steps).astype(jnp.int32))
        if flat.shape[0] == 0:
            flat = jnp.zeros((1, dim), queries.dtype)
        answer = _run(vertices, options, flat, variant, slots, devices)
        if _check.is_concrete(answer.status):
            while slots <= num_vertices and np.any(answer.status == Status.CAPACITY):
                slots = min(2 * slots, num_vertices + 1)
                answer = _run_again(answer, vertices, options, variant, slots, devices)
        size = int(np.prod(batch, dtype=int))
        return jax.tree.map(lambda array: array[:size].reshape(*batch, *array.shape[1:]), answer)


def membership(projection: HullProjection, *, atol: float | Array = 0.0) -> Int[Array, "*batch"]:
    """Whether each query lies in the hull, as far as the certificate proves it.

    Args:
      projection: from `project_to_hull`.
      atol: a query no farther than this from the hull counts as inside, in the units of the
        vertices; with 0 only what is proved does.

    Returns:
      an int32 `Membership` per query: `INSIDE`, `OUTSIDE` or `UNDECIDED`. `OUTSIDE` and, with atol
      0, `INSIDE` are proved for the numbers passed.

    Raises:
      ValueError: a negative or NaN tolerance.
    """
    _check.nonnegative("atol", atol)
    with _numerics.float64():
        near = _wide(projection.distance) <= _wide(atol)
        inside = (_wide(projection.interior_radius) > 0) | near
        outside = _wide(projection.distance_lower_bound) > 0
        verdict = jnp.where(outside, jnp.int32(Membership.OUTSIDE), jnp.int32(Membership.UNDECIDED))
        return jnp.where(inside, jnp.int32(Membership.INSIDE), verdict)


class _Options(NamedTuple):
    """Numbers that are traced, so that sweeping them does not compile again."""

    rtol: Array
    atol: Array
    max_steps: Array


def _wide(number: Any) -> Array:
    return jnp.asarray(number).astype(jnp.float64)


def _check_arrays(queries: Any, vertices: Any) -> None:
    _check.floating("queries", queries)
    _check.floating("vertices", vertices)
    _check.shape("vertices", vertices, (None, None), "(vertices, dim) with at least one vertex")
    _check.rank_at_least("queries", queries, 1, "(*batch, dim)")
    if queries.shape[-1] != vertices.shape[1]:
        _check.fail(
            "queries.shape", queries.shape, f"to end in dim={vertices.shape[1]} as in vertices"
        )
    if _check.is_concrete(vertices):
        with _numerics.float64(), jax.ensure_compile_time_eval():
            finite = bool(_all_finite(jnp.asarray(vertices)))
        if not finite:
            _check.all_finite("vertices", vertices, "Drop the row or repair it.")


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.all(jnp.isfinite(array))


def _run(
    vertices: Array, options: _Options, queries: Array, variant: str, capacity: int, devices: Any
) -> HullProjection:
    """All queries `(batch, dim)` in chunks, on one device or on several."""
    if devices is None:
        return _jitted(variant, capacity)((vertices, options), queries)
    devices = tuple(devices)
    if not devices:
        _check.fail("devices", devices, "to hold at least one device", "None uses the default one.")
    return split_over_devices(_solver(variant, capacity), (vertices, options), queries, devices)


def _run_again(
    answer: HullProjection, vertices: Array, options: _Options, variant: str, capacity: int,
    devices: Any,
) -> HullProjection:  # fmt: skip
    """The queries that ran out of slots, with more of them; padded to a power of two."""
    rows = np.flatnonzero(np.asarray(answer.status) == Status.CAPACITY).astype(np.int32)
    padded = np.resize(rows, 1 << (len(rows) - 1).bit_length())
    again = _run(vertices, options, answer.query[padded], variant, capacity, devices)
    extra = capacity - answer.support.shape[1]
    wide = answer._replace(
        support=jnp.pad(answer.support, ((0, 0), (0, extra)), mode="edge"),
        weights=jnp.pad(answer.weights, ((0, 0), (0, extra))),
    )
    return jax.tree.map(lambda old, new: old.at[padded].set(new), wide, again)


@lru_cache(maxsize=128)
def _solver(variant: str, capacity: int) -> Callable[[Any, Array], HullProjection]:
    """One function per static choice, so that repeated calls find their compiled program."""
    return partial(_solve, variant=variant, capacity=capacity)


@lru_cache(maxsize=128)
def _jitted(variant: str, capacity: int) -> Callable[[Any, Array], HullProjection]:
    return jax.jit(_solver(variant, capacity))


def _solve(
    replicated: tuple[Array, _Options], queries: Array, *, variant: str, capacity: int
) -> HullProjection:
    """Classic Frank-Wolfe for queries `(batch, dim)`: traced inside a float64 island."""
    vertices, options = replicated
    with _numerics.float64():
        hull = certificate.center_vertices(vertices)
        half_squares = 0.5 * jnp.sum(hull.rows**2, axis=1)
        lane = partial(_solve_one, hull, half_squares, options, variant, capacity)
        chunk = max(1, min(_CHUNK, _SCORES // vertices.shape[0]))
        return lax.map(lane, queries, batch_size=min(chunk, queries.shape[0]))


def _solve_one(
    hull: certificate.CenteredHull,
    half_squares: Array,
    options: _Options,
    variant: str,
    capacity: int,
    query: Array,
) -> HullProjection:
    """One query: Frank-Wolfe from the nearest vertex, then the certificate of its weights."""
    dtype = jnp.promote_types(query.dtype, hull.vertices.dtype)
    target = query.astype(jnp.float64) / hull.scale - hull.center
    atol = options.atol / hull.scale / hull.scale

    def unfinished(state: frank_wolfe.State) -> Array:
        length = _numerics.norm(state.gradient)
        lower = jnp.maximum(length - state.gap / length, 0)
        width = (length - lower) * (length + lower) / 2
        return width > 0.99 * (atol + options.rtol * length**2 / 2)

    nearest = _numerics.argmin(half_squares - _numerics.product(hull.rows, target))
    problem = frank_wolfe.Problem(
        lambda point: point - target, frank_wolfe.hull_oracle(hull.rows), smoothness=1.0
    )
    start = frank_wolfe.init(
        problem, frank_wolfe.Atom(nearest, hull.rows[nearest]), capacity=capacity
    )
    state = frank_wolfe.minimize(
        problem, start, variant=variant, unfinished=unfinished, max_steps=options.max_steps
    )
    heaviest = state.index[_numerics.argmin(-state.weights)]
    support = jnp.where(state.weights > 0, state.index, heaviest)
    proof = certificate.certify(hull, query, support, state.weights, dtype)

    upper, lower = proof.distance / hull.scale, proof.lower / hull.scale
    width = (upper - lower) * (upper + lower) / 2
    converged = width <= atol + options.rtol * upper**2 / 2
    distance = _numerics.round_up(proof.distance, dtype)
    lower_bound = _numerics.round_down(proof.lower, dtype)
    finite = jnp.all(jnp.isfinite(query)) & jnp.isfinite(distance)
    status = jnp.where(
        ~finite, jnp.int32(Status.NONFINITE),
        jnp.where(converged, jnp.int32(Status.CONVERGED),
        jnp.where(state.full, jnp.int32(Status.CAPACITY),
        jnp.where(state.num_steps >= options.max_steps, jnp.int32(Status.STEP_LIMIT),
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
