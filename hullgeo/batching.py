"""Many queries through the engine: one traced program, or batches driven from the host.

The host form is faster, since it can look at the lanes between programs: lanes that need more
passes than most are gathered into fuller batches, and queries left undecided are finished together,
with more slots where they need them. Programs are compiled per bucket (lanes, slots), never per
number of queries.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hullgeo import _check, _numerics, fully_corrective, gram, programs, sketch
from hullgeo.bracket import ACTIVE, Lanes, Tolerances
from hullgeo.buckets import LANES, default_slots, finishing_slots, num_decided, num_lanes
from hullgeo.oracle import COARSE, NEARBY, SAMPLE, SKETCH, Hull, Oracle
from hullgeo.parallel import split_over_devices
from hullgeo.pool import Pool
from hullgeo.result import HullProjection, Status

_MANY_VERTICES = 2**14  # from here on passes cost so much that even most of a batch is left over
# Eighths of a batch: lanes of a smaller batch for the last queries, and how many may be left over.
_LEFT, _LEFT_MANY = (2, 2), (4, 7)
_SLOT_STEP = 8  # slots of a decision are a multiple of it, and of twice that from 33 on


def project(
    oracle: Oracle,
    tolerances: Tolerances,
    queries: Float[Array, "queries dim"],
    *,
    capacity: int | None,
    dtype: jnp.dtype,
    devices: tuple[Any, ...] | None,
    start: tuple[Array, Array] | None = None,
) -> HullProjection:
    """Choose the form: from the host where values are known, else one traced program.

    `start` holds supports and weights to begin with, one row a query.
    """
    number, dim = oracle.num_vertices, queries.shape[1]
    slots = min(capacity or default_slots(number, dim), number + 1)
    given = (queries, start)
    leaves = jax.tree.leaves((oracle, tolerances, given))
    if devices is None and all(map(_check.is_concrete, leaves)):
        with _numerics.float64():
            answer = project_on_host(oracle, tolerances, *given, slots=slots, dtype=dtype)
            return jax.device_put(answer)  # all arrays at once, which is much faster
    last_slots = slots if capacity else finishing_slots(number, dim, slots)
    solve = _traced(slots, last_slots, dtype)
    if devices is None:
        return solve((oracle, tolerances), given)
    return split_over_devices(solve, (oracle, tolerances), given, devices)


@lru_cache(maxsize=64)
def _traced(slots: int, last_slots: int, dtype: jnp.dtype) -> Any:
    """One function per static choice, so that pmap finds its compiled program."""

    def solve(shared: tuple[Oracle, Tolerances], given: tuple[Array, Any]) -> HullProjection:
        return programs.project_traced(
            *shared, *given, slots=slots, last_slots=last_slots, dtype=dtype
        )

    return jax.jit(solve)


def _conclusions(
    oracle: Any, lanes: Lanes, tolerances: Tolerances, rows: np.ndarray, *, dtype: jnp.dtype
) -> Iterator[tuple[np.ndarray, HullProjection]]:
    """Decide these lanes a few at a time, by the slots they use: empty ones cost as much."""
    used = np.asarray(lanes.active.used).sum(axis=1)
    slots, dim = lanes.active.index.shape[1], lanes.query.shape[1]
    size = num_decided(len(used), slots, dim, oracle.num_vertices)
    rows = rows[np.argsort(used[rows], kind="stable")]
    for first in range(0, len(rows), size):
        group = rows[first : first + size]
        most = max(int(used[group[-1]]), 1)
        step = _SLOT_STEP if most <= 4 * _SLOT_STEP else 2 * _SLOT_STEP
        most = min(slots, -(-most // step) * step)
        padded = np.resize(group, size).astype(np.int32)
        yield group, programs.conclude(oracle, lanes, tolerances, padded, slots=most, dtype=dtype)


def _block(arrays: Any, first: int, size: int) -> Any:
    """So many rows of each array, the last one repeated past the end; cut on the host."""

    def cut(array: Array) -> np.ndarray:
        rows = np.asarray(array)[first : first + size]
        extra = ((0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1))
        return rows if len(rows) == size else np.pad(rows, extra, mode="edge")

    return jax.tree.map(cut, arrays)


class _Answers:
    """Collects the rows of results in the order of the queries, on the host."""

    def __init__(self, number: int):
        self.number = number
        self.parts: list[tuple[np.ndarray, HullProjection]] = []

    def add(self, ids: np.ndarray, answer: HullProjection) -> None:
        """Results of these queries, the first rows of the answer."""
        self.parts.append((ids, jax.tree.map(lambda array: np.asarray(array)[: len(ids)], answer)))

    def merge(self) -> HullProjection:
        """Later parts replace earlier ones; supports are padded to the widest."""
        width = max(answer.support.shape[1] for _, answer in self.parts)

        def widened(answer: HullProjection) -> HullProjection:
            extra = ((0, 0), (0, width - answer.support.shape[1]))
            if not extra[1][1]:
                return answer
            return answer._replace(
                support=np.pad(answer.support, extra, mode="edge"),
                weights=np.pad(answer.weights, extra),
            )

        first = self.parts[0][1]
        merged = jax.tree.map(
            lambda array: np.empty((self.number, *array.shape[1:]), array.dtype), widened(first)
        )
        for ids, answer in self.parts:
            for target, source in zip(merged, widened(answer), strict=True):
                target[ids] = source
        return merged


def project_on_host(
    oracle: Oracle,
    tolerances: Tolerances,
    queries: Float[Array, "queries dim"],
    start: tuple[Array, Array] | None,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """Every query, batches driven from the host; runs inside a float64 island."""
    number, dim = oracle.num_vertices, queries.shape[1]
    # A verdict alone takes fewer passes than a support.
    if start is None and gram.serves(oracle) and not bool(tolerances.verdict):
        answer = _project_by_gram(oracle, tolerances, queries, slots=slots, dtype=dtype)
    else:
        answer = _project_batches(
            oracle, tolerances, queries, start, None, slots=slots, dtype=dtype
        )
    most = min(number, dim + 1 + fully_corrective.num_candidates(number))
    while slots < most:
        full = answer.status == Status.CAPACITY
        full = np.flatnonzero(full & (answer.num_steps < int(tolerances.max_steps)))
        if not len(full):
            break
        slots = min(2 * slots, most)
        support, weights, steps = (
            jnp.asarray(array[full]) for array in (answer.support, answer.weights, answer.num_steps)
        )
        wider = _project_batches(
            oracle, tolerances, queries[full], (support, weights), steps, slots=slots, dtype=dtype
        )
        answer = _with(answer, full, wider)
    return _finish_undecided(oracle, tolerances, queries, answer, slots=slots, dtype=dtype)


def _project_by_gram(
    oracle: Hull,
    tolerances: Tolerances,
    queries: Float[Array, "queries dim"],
    *,
    slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """Supports named by the Gram matrix and decided at once; passes for what that leaves."""
    number = len(queries)
    answers = _Answers(number)
    lanes = next((size for size in LANES if size >= number), LANES[-1])
    for first in range(0, number, lanes):
        named = programs.name_by_gram(oracle, _block(queries, first, lanes), slots=slots)
        rows = np.arange(min(lanes, number - first))
        for group, answer in _conclusions(oracle, named, tolerances, rows, dtype=dtype):
            answers.add(first + group, answer)
    answer = answers.merge()
    left = (answer.status != Status.CONVERGED) & (answer.status != Status.NONFINITE)
    left = np.flatnonzero(left & (answer.num_steps < int(tolerances.max_steps)))
    if not len(left):
        return answer
    start = jax.tree.map(jnp.asarray, (answer.support[left], answer.weights[left]))
    steps = jnp.asarray(answer.num_steps[left])
    later = _project_batches(
        oracle, tolerances, queries[left], start, steps, slots=slots, dtype=dtype
    )
    return _with(answer, left, later)


def _with(answer: HullProjection, ids: np.ndarray, newer: HullProjection) -> HullProjection:
    """The answer with some queries answered anew."""
    answers = _Answers(len(answer.status))
    for rows, part in ((np.arange(answers.number), answer), (ids, newer)):
        answers.add(rows, part)
    return answers.merge()


def _project_batches(
    oracle: Oracle,
    tolerances: Tolerances,
    queries: Float[Array, "queries dim"],
    start: tuple[Array, Array] | None,
    steps: Int[Array, " queries"] | None,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """What float32 passes and a decision in float64 give, in so many slots; `steps` were made."""
    number, dim = queries.shape
    lanes = num_lanes(number, slots, dim, oracle.num_vertices)
    max_steps = int(tolerances.max_steps)
    answers = _Answers(number)
    # Moving lanes costs rows of their slots, a pass for few lanes those of all vertices. One batch
    # alone leaves none over: a smaller one would be compiled.
    few, most_left = _LEFT_MANY if oracle.num_vertices >= _MANY_VERTICES else _LEFT
    few, most_left = few * lanes // 8, most_left * lanes // 8 if number > lanes else 0
    pool = Pool(2 * lanes)

    def conclude(batch: Lanes, ids: np.ndarray, done: np.ndarray) -> None:
        rows = np.flatnonzero(done & (ids >= 0))
        for group, answer in _conclusions(oracle, batch, tolerances, rows, dtype=dtype):
            answers.add(ids[group], answer)

    def advance(batch: Lanes, ids: np.ndarray, *, phase: int, leave: int) -> None:
        batch = programs.name(oracle, batch, tolerances, np.int32(phase), np.int32(leave))
        active = (np.asarray(batch.code) == ACTIVE) & (np.asarray(batch.steps) < max_steps)
        active &= ids >= 0
        conclude(batch, ids, ~active)
        if active.any():
            pool.put(batch, ids, np.flatnonzero(active), leave)

    # A verdict alone needs a direction rather than a support.
    in_components = start is None and sketch.serves(oracle) and not bool(tolerances.verdict)
    first_phase = COARSE if in_components else SAMPLE if start is None else SKETCH
    for first in range(0, number, lanes):
        ids = np.arange(first, min(first + lanes, number))
        block = _block((queries, start, steps), first, lanes)
        ids = np.pad(ids, (0, lanes - len(ids)), constant_values=-1)
        if in_components:
            batch = programs.begin_in_components(oracle, block[0], tolerances, slots=slots)
        else:
            batch = programs.begin(oracle, *block, slots=slots)
        advance(batch, ids, phase=first_phase, leave=most_left)
        while len(pool) >= lanes:
            advance(*pool.take(oracle, lanes), phase=NEARBY, leave=most_left)
    while len(pool):
        many = len(pool) > lanes // 2
        size, leave = (lanes, few) if many else (few, 0)
        advance(*pool.take(oracle, size), phase=NEARBY, leave=leave)

    return answers.merge()


def _finish_undecided(
    oracle: Oracle,
    tolerances: Tolerances,
    queries: Array,
    answer: HullProjection,
    *,
    slots: int,
    dtype: jnp.dtype,
) -> HullProjection:
    """The float64 loop for what float32 left, with twice the slots as often as they overflow."""
    number, dim = queries.shape
    status = answer.status
    left = np.flatnonzero((status != Status.CONVERGED) & (status != Status.NONFINITE))
    steps = answer.num_steps
    left = left[steps[left] < int(tolerances.max_steps)]
    capacity = finishing_slots(oracle.num_vertices, dim, slots)
    while len(left):
        lanes = num_lanes(len(left), 2 * capacity, dim, oracle.num_vertices)
        collected = _Answers(number)
        collected.add(np.arange(number), answer)
        for first in range(0, len(left), lanes):
            ids = left[first : first + lanes]
            padded = np.resize(ids, lanes)
            index = answer.support[padded]
            used = answer.weights[padded] > 0
            result = programs.finish_supports(
                oracle,
                tolerances,
                queries[padded],
                jnp.asarray(index),
                jnp.asarray(used),
                jnp.asarray(steps[padded]),
                slots=max(capacity, index.shape[1]),
                dtype=dtype,
            )
            collected.add(ids, result)
        answer = collected.merge()
        full = answer.status[left] == Status.CAPACITY
        if not full.any() or capacity >= oracle.num_vertices:
            break
        left = left[full]
        capacity = min(2 * capacity, oracle.num_vertices)
    return answer
