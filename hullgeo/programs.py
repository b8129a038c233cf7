"""The programs of the engine: a batch in steps that the host drives, or as one traced loop.

Both run the same loops of `fully_corrective.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hullgeo import _numerics, active_set, bracket, fully_corrective, gram
from hullgeo.bracket import ACTIVE, BAD, ENDED, Lanes, Tolerances
from hullgeo.buckets import num_lanes
from hullgeo.oracle import SAMPLE, SKETCH, Oracle
from hullgeo.result import HullProjection


@partial(jax.jit, static_argnames=("slots",))
def begin(oracle: Any, queries: Array, start: Any, steps: Any = None, *, slots: int) -> Lanes:
    """Lanes without a support, or with a former one after so many steps."""
    with _numerics.float64():
        lanes = fully_corrective.start(oracle, queries, slots)
        lanes = lanes if steps is None else lanes._replace(steps=steps)
        return lanes if start is None else fully_corrective.warm_start(oracle, lanes, *start)


@partial(jax.jit, static_argnames=("slots",))
def begin_in_components(
    oracle: Any, queries: Array, tolerances: Tolerances, *, slots: int
) -> Lanes:
    """Lanes with the supports that principal components find."""
    with _numerics.float64():
        return fully_corrective.start_in_components(oracle, queries, tolerances, slots)


@partial(jax.jit, static_argnames=("slots",))
def name_by_gram(oracle: Any, queries: Array, *, slots: int) -> Lanes:
    """Lanes with the supports that the Gram matrix finds."""
    with _numerics.float64():
        lanes = fully_corrective.start(oracle, queries, slots)
        return gram.name_supports(oracle, lanes)


@partial(jax.jit, donate_argnames=("lanes",))
def name(oracle: Any, lanes: Lanes, tolerances: Tolerances, phase: Array, leave: Array) -> Lanes:
    """Passes from this phase on, until so many lanes at most are left."""
    with _numerics.float64():
        return fully_corrective.name_candidates(oracle, lanes, tolerances, phase=phase, leave=leave)


@partial(jax.jit, static_argnames=("slots", "dtype"))
def conclude(
    oracle: Any,
    lanes: Lanes,
    tolerances: Tolerances,
    rows: Array,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """Answers of these rows of a batch, which use so many slots at most."""
    with _numerics.float64():
        full = lanes.active.index.shape[1]
        lanes = lanes._replace(active=active_set.without_rows(lanes.active))
        lanes = jax.tree.map(lambda array: array[rows], lanes)
        lanes = lanes._replace(active=active_set.narrow(lanes.active, slots))
        decision = bracket.decide(oracle, lanes, tolerances, dtype, inside=False)
        return widened(bracket.answer(oracle, lanes, decision, tolerances, dtype), full)


@partial(jax.jit, static_argnames=("slots", "dtype"))
def finish_supports(
    oracle: Any,
    tolerances: Tolerances,
    queries: Array,
    index: Array,
    used: Array,
    steps: Array,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """Answers of the float64 loop, from the supports that float32 has left."""
    with _numerics.float64():
        lanes = fully_corrective.start(oracle, queries, index.shape[1])
        lanes = lanes._replace(
            active=lanes.active._replace(index=index, value=used.astype(jnp.float32)),
            steps=steps,
        )
        return _finish(oracle, tolerances, lanes, slots=slots, dtype=dtype)


def _finish(
    oracle: Oracle, tolerances: Tolerances, lanes: Lanes, *, slots: int, dtype: jnp.dtype
) -> HullProjection:
    lanes = fully_corrective.widen(oracle, lanes, slots)
    lanes = fully_corrective.finish(oracle, lanes, tolerances)
    decision = bracket.decide(oracle, lanes, tolerances, dtype, inside=True)
    return bracket.answer(oracle, lanes, decision, tolerances, dtype)


def widened(answer: HullProjection, slots: int) -> HullProjection:
    """Supports of so many slots."""
    extra = ((0, 0), (0, slots - answer.support.shape[1]))
    return answer._replace(
        support=jnp.pad(answer.support, extra, mode="edge"), weights=jnp.pad(answer.weights, extra)
    )


def project_traced(
    oracle: Oracle,
    tolerances: Tolerances,
    queries: Float[Array, "queries dim"],
    start: tuple[Array, Array] | None,
    *,
    slots: int,
    last_slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """Every query in one traced program; batches one after the other."""
    with _numerics.float64():
        number, dim = queries.shape
        lanes = num_lanes(number, slots, dim, oracle.num_vertices)
        batches = -(-number // lanes)
        padded = jax.tree.map(
            lambda array: jnp.pad(array, ((0, batches * lanes - number), (0, 0)), mode="edge"),
            (queries, start),
        )
        solve = partial(
            _solve_batch, oracle, tolerances, slots=slots, last_slots=last_slots, dtype=dtype
        )
        if batches == 1:
            answer = solve(padded)
        else:
            split = jax.tree.map(lambda array: array.reshape(batches, lanes, -1), padded)
            answer = lax.map(solve, split)
            answer = jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]), answer)
        return jax.tree.map(lambda out: out[:number], answer)


def _solve_batch(
    oracle: Oracle,
    tolerances: Tolerances,
    given: tuple[Array, tuple[Array, Array] | None],
    *,
    slots: int,
    last_slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    with _numerics.float64():
        lanes = begin(oracle, *given, slots=slots)
        lanes = fully_corrective.name_candidates(
            oracle, lanes, tolerances, phase=SAMPLE if given[1] is None else SKETCH
        )
        decision = bracket.decide(oracle, lanes, tolerances, dtype, inside=False)
        first = bracket.answer(oracle, lanes, decision, tolerances, dtype)
        first = widened(first, last_slots)
        decided = decision.converged | (lanes.code == BAD)

        def finish(lanes: Lanes) -> HullProjection:
            code = jnp.where(decided & (lanes.code != BAD), ENDED, lanes.code)
            code = jnp.where(decided, code, ACTIVE).astype(jnp.int32)
            answer = _finish(
                oracle, tolerances, lanes._replace(code=code), slots=last_slots, dtype=dtype
            )
            return jax.tree.map(
                lambda old, new: jnp.where(
                    decided.reshape(decided.shape + (1,) * (old.ndim - 1)), old, new
                ),
                first,
                answer,
            )

        return lax.cond(jnp.all(decided), lambda lanes: first, finish, lanes)
