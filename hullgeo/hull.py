"""Distance from queries to the convex hull of vertices, with proof.

    distance(q, V) = min |V' w - q|  over  w >= 0, sum w = 1.

arXiv:2202.04052 asks where images lie relative to the convex hull of a training set; this module
answers for pixels and features alike. `project_to_hull` finds the nearest point by batched
fully-corrective Frank-Wolfe (`fully_corrective.py`) or, for study, by a classic variant, and
encloses the true distance between two proved bounds. `docs/hull.md` derives both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hullgeo import _check, _numerics, batching, classic, frank_wolfe
from hullgeo.bracket import Tolerances
from hullgeo.oracle import Hull
from hullgeo.prepare import prepare_hull
from hullgeo.result import HullProjection, Membership, Status

# Queries whose support rows are gathered at once for a derivative.
_CHUNK = 256


def project_to_hull(
    queries: Float[Array | np.ndarray, "*batch dim"],
    vertices: Float[Array | np.ndarray, "vertices dim"] | Hull,
    *,
    variant: str = "fully_corrective",
    rtol: float | Array = 1e-6,
    atol: float | Array = 0.0,
    max_steps: int | Array = 2000,
    verdict_only: bool = False,
    start: HullProjection | None = None,
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
      vertices: `(vertices, dim)`, one vertex a row, in the same units; or a `Hull` from
        `prepare_hull`, where the same vertices are asked again.
      variant: "fully_corrective", the engine: batched, the problem on the support solved exactly,
        queries inside the hull proved to be so. For study, the classic Frank-Wolfe variants
        "blended_pairwise", "pairwise", "away" and "vanilla": thousands of passes for its few.
      rtol: relative tolerance of the squared distance.
      atol: absolute tolerance of half the squared distance, in squared units.
      max_steps: limit of Frank-Wolfe steps, each one pass over all vertices.
      verdict_only: finish a query as soon as it is proved to be outside, however wide the bracket:
        for `membership` alone.
      start: a former answer for these queries, to begin from its supports: after the vertices or
        the queries moved a little, or to go on with a smaller tolerance. What it says is not
        trusted, so that any will do.
      capacity: slots for vertices of the support, at least two; by default enough for most queries.
        Outside jit, queries that need more are given twice the slots; inside, a query inside the
        hull needs dim + 1 for its proof.
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
    hull = vertices if isinstance(vertices, Hull) else None
    vertices = vertices.vertices if isinstance(vertices, Hull) else vertices
    _check_arrays(queries, vertices, known_finite=hull is not None)
    _check.one_of("variant", variant, ("fully_corrective", *frank_wolfe.VARIANTS))
    _check.nonnegative("rtol", rtol)
    _check.nonnegative("atol", atol)
    _check.at_least("max_steps", max_steps, 1)
    if capacity is not None:
        _check.at_least("capacity", capacity, 2)
    if start is not None:
        _check.shape(
            "start.support",
            start.support,
            (*queries.shape[:-1], None),
            "(*batch, slots), as queries",
        )
    if variant != "fully_corrective" and (verdict_only or start is not None):
        _check.fail("variant", variant, "to be 'fully_corrective' for verdict_only and start")
    if devices is not None and not tuple(devices):
        _check.fail("devices", devices, "to hold at least one device", "None uses the default one.")

    with _numerics.float64():
        queries, vertices = jnp.asarray(queries), jnp.asarray(vertices)
        batch, dim = queries.shape[:-1], vertices.shape[1]
        size = int(np.prod(batch, dtype=int))
        flat = queries.reshape(-1, dim) if size else jnp.zeros((1, dim), queries.dtype)
        tolerances = Tolerances(
            _wide(rtol),
            _wide(atol),
            jnp.asarray(max_steps).astype(jnp.int32),
            jnp.asarray(verdict_only),
        )
        options: dict[str, Any] = {
            "capacity": capacity,
            "dtype": _wider(flat.dtype, vertices.dtype),
            "devices": None if devices is None else tuple(devices),
        }
        if variant == "fully_corrective":
            hull = prepare_hull(vertices) if hull is None else hull
            if start is not None and size:
                known = (start.support, start.weights)
                options["start"] = tuple(jnp.asarray(x).reshape(size, -1) for x in known)
            answer = batching.project(hull, tolerances, flat, **options)
        else:
            answer = classic.project(vertices, tolerances, flat, variant=variant, **options)
        if batch == (len(flat),):
            return answer
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


def half_squared_distance(
    queries: Float[Array | np.ndarray, "*batch dim"],
    vertices: Float[Array | np.ndarray, "vertices dim"],
    **options: Any,
) -> Float[Array, "*batch"]:
    """Half the squared distance to a convex hull, differentiable in queries and vertices.

    With the nearest point x = sum w_i v_i, the envelope theorem gives the derivatives

        d/dq = q - x,    d/dv_i = w_i (x - q),

    which are continuous everywhere, inside the hull included. First derivatives only: a second
    derivative, which would need the change of the support, silently comes out wrong. The error of
    a derivative is about the square root of the gap.

    Args:
      queries: `(*batch, dim)`, any leading batch.
      vertices: `(vertices, dim)`, one vertex a row, in the same units.
      **options: those of `project_to_hull`.

    Returns:
      `distance**2 / 2` in squared units, never below the true one. Where a query is not finite it
      is NaN, with derivatives 0.

    Raises:
      ValueError: as `project_to_hull`.

    Source: J. Danskin, "The theory of max-min, with applications", SIAM J. Appl. Math. 14, 1966.
    """
    return _by_envelope(lambda distance: distance * distance / 2, queries, vertices, options)


def hull_distance(
    queries: Float[Array | np.ndarray, "*batch dim"],
    vertices: Float[Array | np.ndarray, "vertices dim"],
    **options: Any,
) -> Float[Array, "*batch"]:
    """The distance to a convex hull, differentiable in queries and vertices outside the hull.

    With the nearest point x = sum w_i v_i and the unit vector n = (q - x) / |q - x|, the envelope
    theorem gives d/dq = n and d/dv_i = -w_i n. First derivatives only, as for
    `half_squared_distance`. Inside the hull the computed q - x is rounding noise and so is its
    direction, although it still has length 1: use `half_squared_distance` where that can happen.

    Args:
      queries: `(*batch, dim)`, any leading batch.
      vertices: `(vertices, dim)`, one vertex a row, in the same units.
      **options: those of `project_to_hull`.

    Returns:
      `distance` of the projection, never below the true one. Where it is exactly 0 the derivatives
      are 0; where a query is not finite it is NaN, with derivatives 0.

    Raises:
      ValueError: as `project_to_hull`.

    Source: as `half_squared_distance`.
    """
    return _by_envelope(lambda distance: distance, queries, vertices, options)


def _wider(one: Any, other: Any) -> Any:
    """The type of the answer, also where the caller forbids implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def _wide(number: Any) -> Array:
    return jnp.asarray(number).astype(jnp.float64)


def _by_envelope(
    function: Callable[[Array], Array], queries: Any, vertices: Any, options: dict[str, Any]
) -> Array:
    """`function` of the distance, with the derivatives that the fixed weights give."""
    with _numerics.float64():
        queries, vertices = jnp.asarray(queries), jnp.asarray(vertices)
        answer = project_to_hull(lax.stop_gradient(queries), lax.stop_gradient(vertices), **options)
        dim, dtype = queries.shape[-1], answer.point.dtype
        known = (answer.status != Status.NONFINITE)[..., None]
        wide = vertices.astype(dtype)

        def lane(inputs: tuple[Array, ...]) -> Array:
            weights, support, query = inputs
            value = function(
                _numerics.norm(_numerics.product(weights, wide[support] - query[None]))
            )
            return value - lax.stop_gradient(value)

        inputs = (
            jnp.where(known, answer.weights, 0).reshape(-1, answer.weights.shape[-1]),
            answer.support.reshape(-1, answer.weights.shape[-1]),
            jnp.where(known, queries, 0).astype(dtype).reshape(-1, dim),
        )
        zero = lax.map(lane, inputs, batch_size=_CHUNK).reshape(queries.shape[:-1])
        return function(answer.distance) + zero


def _check_arrays(queries: Any, vertices: Any, *, known_finite: bool = False) -> None:
    _check.floating("queries", queries)
    _check.floating("vertices", vertices)
    _check.shape("vertices", vertices, (None, None), "(vertices, dim) with at least one vertex")
    _check.rank_at_least("queries", queries, 1, "(*batch, dim)")
    if queries.shape[-1] != vertices.shape[1]:
        _check.fail(
            "queries.shape", queries.shape, f"to end in dim={vertices.shape[1]} as in vertices"
        )
    if not known_finite and _check.is_concrete(vertices):
        with _numerics.float64(), jax.ensure_compile_time_eval():
            finite = bool(_all_finite(jnp.asarray(vertices)))
        if not finite:
            _check.all_finite("vertices", vertices, "Drop the row or repair it.")


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.all(jnp.isfinite(array))
