"""Every linear piece of a piecewise-linear network along a segment, by exact propagation.

Along x(t) = (1 - t) start + t end each unit of the network is a piecewise-linear function of t. Its
knots are carried through the network as rows: an affine step maps the rows alone; at a kink, where
the difference d of a unit changes sign between the neighbouring rows t_i and t_{i+1}, the row

    t = t_i + w (t_{i+1} - t_i),    w = d_i / (d_i - d_{i+1})

is inserted by interpolation, with d set to exactly 0, before the kink is applied. At the end the
output is affine between neighbouring rows. Values that skip a kink (residual connections) are
interpolated to the rows of the place where they are read. The exact slices of SplineCam (Humayun et
al., arXiv:2302.12828) are related, and do not treat residual networks.

Rows are worked on depth first in parts of limited size, so that memory stays bounded whatever the
number of pieces; the parts are independent and shared among threads or devices.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hullgeo import _check, _numerics
from hullgeo.piecewise import Block, Program, Value

# Bytes of one stored value of a part, and of the rows worked on at a time.
_PART_BYTES = 1 << 24
_TILE_BYTES = 1 << 20
_MAX_ROWS = 4096
# Rows whose sign changes are listed at a time.
_COMPARED = 32


class Line(NamedTuple):
    """A piece of a segment: two positions and the images there, `(*image)`."""

    start: float
    stop: float
    first: np.ndarray
    last: np.ndarray


class Rows(NamedTuple):
    """Rows of the output in ascending order of position: affine between neighbours.

    Attributes:
      position: float64, `(rows,)`; twice the same where two parts meet.
      value: float64, `(rows, dim)`.
    """

    position: np.ndarray
    value: np.ndarray


class _Stored(NamedTuple):
    """Row r of a part is array[index[r]] + weight[r] (array[index[r] + 1] - array[index[r]])."""

    array: Any
    index: np.ndarray
    weight: np.ndarray


class _Part(NamedTuple):
    """Neighbouring rows on their way through the network, next to enter a block."""

    line: int
    block: int
    position: np.ndarray
    unit: np.ndarray  # the unit of the kink that changes sign at a row; -1 where none does
    stored: dict[Value, _Stored]


class Propagator:
    """The blocks of one program in one real type, compiled when first used."""

    def __init__(self, program: Program, dtype: Any):
        """Sizes of parts and tiles, from the largest value of the network."""
        self.program, self.dtype = program, np.dtype(dtype)
        largest = max(
            math.prod(value.shape)
            for block in program.blocks
            for value in [*block.inputs, *block.outputs]
        )
        row_bytes = largest * self.dtype.itemsize
        self.tile = int(2 ** np.clip(np.log2(_TILE_BYTES / row_bytes) // 1, 3, 8))
        rows = int(np.clip(_PART_BYTES / row_bytes, 4 * self.tile, _MAX_ROWS))
        self.rows = -(-rows // self.tile) * self.tile
        # Blocks of equal structure (most of a residual network's) share one compiled function.
        compiled: dict[Any, Callable] = {}
        for block in program.blocks:
            run = functools.partial(_run_block, block, self.dtype, self.rows, self.tile)
            compiled.setdefault(block.signature, jax.jit(run))
        self._functions = [compiled[block.signature] for block in program.blocks]
        self._read_later: list[set[Value]] = [set()]
        for block in reversed(program.blocks[1:]):
            self._read_later.insert(0, self._read_later[0] | set(block.inputs))

    def constants(self, arrays: list[Any]) -> dict[int, Any]:
        """What the blocks read besides rows, in this type."""
        with _numerics.float64():
            folded = self.program.fold(arrays)
            return {
                key: value.astype(self.dtype) if value.dtype == np.float64 else value
                for key, value in folded.items()
            }

    def propagate(
        self,
        constants: dict[int, Any],
        lines: Sequence[Line],
        *,
        max_rows: int,
        devices: Sequence[jax.Device] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[list[Rows], dict[int, np.ndarray]] | None:
        """All rows of the output along each line.

        Args:
          constants: those of the network's arrays.
          lines: where to go.
          max_rows: give up beyond this many rows.
          devices: one thread each; by default one per processor, all on the default device.
          progress: called with the share of the lines' length that is done.

        Returns:
          the rows of each line, and the reach of each unit of the differences by the index of the
          value: the largest -d and d met, `(2, *shape)`; None beyond `max_rows`.
        """
        devices = devices or [jax.local_devices()[0]] * (os.cpu_count() or 1)
        parts = []
        for number, line in enumerate(lines):
            # The last row is repeated, since every row needs a next one.
            ends = np.stack([line.first, line.last, line.last]).astype(self.dtype)[:, None]
            stored = _Stored(ends, np.arange(2, dtype=np.int32), np.zeros(2))
            position = np.asarray([line.start, line.stop])
            unit = np.full(2, -1, np.int32)
            parts.append(_Part(number, 0, position, unit, {self.program.image: stored}))
        length = sum(line.stop - line.start for line in lines) or 1.0
        run = _Run(self, constants, max_rows, lambda done: progress(done / length))
        return run.drain(parts, len(lines), devices)

    def evaluate(
        self, constants: dict[int, Any], images: np.ndarray
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The output at some images `(rows, *image)`, and reaches as of `propagate`."""
        found, reaches = [], []
        device = jax.local_devices()[0]
        with _numerics.float64(), jax.default_device(device):
            constants = jax.device_put(constants, device)
            for begin in range(0, len(images), self.rows):
                some = images[begin : begin + self.rows, None].astype(self.dtype)
                here = np.arange(len(some), dtype=np.int32), np.zeros(len(some))
                unit = np.full(len(some), -1, np.int32)
                stored = {self.program.image: _Stored(np.concatenate([some, some[-1:]]), *here)}
                outputs = {}
                for number, block in enumerate(self.program.blocks):
                    part = _Part(0, number, here[1], unit, stored)
                    outputs, _, reach, _ = self._run(part, constants, device)
                    stored |= {value: _Stored(array, *here) for value, array in outputs.items()}
                    if block.difference is not None:
                        reaches.append({block.difference.index: np.asarray(reach, np.float64)})
                output = np.asarray(outputs[self.program.output], np.float64)
                found.append(output[: len(some)].reshape(len(some), -1))
        return np.concatenate(found), _largest(reaches)

    def _run(self, part, constants, device):
        """The compiled block on a part."""
        block = self.program.blocks[part.block]
        count = len(part.position)
        inputs = [part.stored[value] for value in block.inputs]
        extra = (0, self.rows - count)
        outputs, *rest = self._functions[part.block](
            [constants[value.index] for value in block.constants],
            [jax.device_put(stored.array, device) for stored in inputs],
            np.stack([np.pad(stored.index, extra, mode="edge") for stored in inputs]),
            np.stack([np.pad(stored.weight, extra, mode="edge") for stored in inputs]).astype(
                self.dtype
            ),
            np.pad(part.unit, extra, mode="edge"),
            np.int32(-(-count // self.tile)),
        )
        return dict(zip(block.outputs, outputs, strict=True)), *rest

    def step(
        self, part: _Part, constants: dict[int, Any], device: jax.Device
    ) -> tuple[Any, dict[int, np.ndarray]]:
        """One block on one part: the parts that follow, or rows of the output; reaches."""
        block = self.program.blocks[part.block]
        count = len(part.position)
        outputs, changes, reach, jump = self._run(part, constants, device)
        if block.kink is not None and block.kink.rule == "select":
            _check_continuity(np.asarray(jump)[:count], self.dtype)
        if block.difference is None:
            output = np.asarray(outputs[self.program.output], np.float64)[:count]
            return Rows(part.position, output.reshape(count, -1)), {}
        later = self._read_later[part.block]
        stored = {value: kept for value, kept in part.stored.items() if value in later}
        for value in block.outputs:
            here = np.arange(count, dtype=np.int32), np.zeros(count)
            stored[value] = _Stored(outputs[value], *here)
        affected = np.flatnonzero(np.asarray(changes)[: count - 1])
        knots = _sign_changes(outputs[block.difference], affected)
        reach_of = {block.difference.index: np.asarray(reach, np.float64)}
        return self._insert(part, stored, *knots), reach_of

    def _insert(self, part, stored, row, unit, fraction):
        """The rows with the knots inserted, cut into parts that share their end rows."""
        count, total = len(part.position), len(part.position) + len(row)
        order = np.lexsort((fraction, row))
        old = np.arange(count, dtype=np.int32)
        # A knot of interval r comes between row r and row r + 1.
        is_knot = np.ones(total, bool)
        is_knot[old + np.searchsorted(row[order], old)] = False
        index, weight, units = np.zeros(total, np.int32), np.zeros(total), np.full(total, -1)
        index[~is_knot], index[is_knot] = old, row[order]
        weight[is_knot], units[is_knot] = fraction[order], unit[order]
        following = np.minimum(index + 1, count - 1)
        position = part.position[index] + weight * (part.position[following] - part.position[index])
        moved = {value: _compose(kept, index, weight) for value, kept in stored.items()}
        pieces = max(1, -(-(total - 1) // (self.rows - 1)))
        edges = np.linspace(0, total - 1, pieces + 1).round().astype(int)
        parts = []
        for begin, end in zip(edges[:-1], edges[1:] + 1, strict=True):
            cut = {
                value: _Stored(kept.array, kept.index[begin:end], kept.weight[begin:end])
                for value, kept in moved.items()
            }
            unit = units[begin:end].astype(np.int32)
            parts.append(_Part(part.line, part.block + 1, position[begin:end], unit, cut))
        return parts


def _compose(stored, index, weight):
    """The places in the stored array of rows inserted between the present ones."""
    following = np.minimum(index + 1, len(stored.index) - 1)
    begin, first = stored.index[index], stored.weight[index]
    last = np.where(stored.index[following] > begin, 1.0, stored.weight[following])
    return _Stored(stored.array, begin, np.clip(first + weight * (last - first), 0, 1))


class _Run:
    """Threads that take parts from one stack, the deepest first."""

    def __init__(self, propagator, constants, max_rows, progress):
        self._propagator, self._constants = propagator, constants
        self._max_rows, self._progress = max_rows, progress
        self._lock = threading.Condition()
        self._busy = self._count = 0
        self._done = 0.0
        self._error: BaseException | None = None
        self._reach: dict[int, np.ndarray] = {}

    def drain(self, parts, num_lines, devices):
        self._stack = parts[::-1]
        self._found: list[list[Rows]] = [[] for _ in range(num_lines)]
        workers = [threading.Thread(target=self._work, args=(device,)) for device in devices]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except BaseException as error:  # the caller was interrupted
            self._error = error
            raise
        if self._error is not None:
            raise self._error
        if self._count > self._max_rows:
            return None
        ordered = [sorted(found, key=lambda rows: rows.position[0]) for found in self._found]
        return [Rows(*map(np.concatenate, zip(*found, strict=True))) for found in ordered], (
            self._reach
        )

    def _work(self, device):
        with _numerics.float64(), jax.default_device(device):
            constants = jax.device_put(self._constants, device)
            while (part := self._take()) is not None:
                try:
                    self._give(part, *self._propagator.step(part, constants, device))
                except BaseException as error:
                    with self._lock:
                        self._error = error
                        self._lock.notify_all()

    def _take(self):
        with self._lock:
            while not self._stack and self._busy and not self._stopped():
                self._lock.wait()
            if self._stopped() or not self._stack:
                return None
            self._busy += 1
            return self._stack.pop()

    def _stopped(self):
        return self._error is not None or self._count > self._max_rows

    def _give(self, part, result, reach):
        with self._lock:
            self._busy -= 1
            if isinstance(result, Rows):
                self._found[part.line].append(result)
                self._count += len(result.position)
                self._done += float(result.position[-1] - result.position[0])
                self._progress(self._done)
            else:
                self._stack.extend(reversed(result))
                self._reach = _largest([self._reach, reach])
            self._lock.notify_all()


def _largest(reaches):
    """Entrywise maxima of dictionaries of arrays."""
    result: dict[int, np.ndarray] = {}
    for some in reaches:
        for key, array in some.items():
            result[key] = np.maximum(result[key], array) if key in result else array
    return result


def _opposite(first, second):
    return ((first < 0) & (second > 0)) | ((first > 0) & (second < 0))


@jax.jit
def _interval_changes(difference, rows):
    """Where d changes sign between each row and the next, and the fraction there."""
    first, second = difference[rows], difference[rows + 1]
    size = (rows.shape[0], -1)
    first, second = first.reshape(size), second.reshape(size)
    changes = _opposite(first, second)
    return changes, jnp.where(changes, first / (first - second), 0)


def _sign_changes(difference, rows):
    """Rows, units and fractions of all sign changes after the given rows."""
    found = []
    for begin in range(0, len(rows), _COMPARED):
        some = rows[begin : begin + _COMPARED]
        padded = np.pad(some, (0, _COMPARED - len(some)), mode="edge").astype(np.int32)
        changes, fraction = map(np.asarray, _interval_changes(difference, padded))
        row, unit = np.nonzero(changes[: len(some)])
        found.append((some[row].astype(np.int32), unit.astype(np.int32), fraction[row, unit]))
    if not found:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0)
    row, unit, fraction = map(np.concatenate, zip(*found, strict=True))
    return row, unit, fraction.astype(np.float64)


def _run_block(
    block: Block, dtype, rows: int, tile: int, constants, arrays, index, weight, unit, tiles
):
    """A block on the first tiles of a part's rows.

    Returns:
      the outputs, one row longer than the part; whether any unit changes sign between each row and
      the next; the reach of each unit; the relative jump of a selection.
    """

    def network(unit, values, ends):
        known = dict(zip(block.inputs, values, strict=True)) | constants
        jump = jnp.zeros((), dtype)
        if block.kink is not None:
            d, *others = block.kink.inputs
            here = lax.broadcasted_iota(jnp.int32, (known[d].size,), 0) == unit
            zeroed = jnp.where(here.reshape(d.shape), 0, known[d])
            arguments = [zeroed, *(known[value] for value in others)]
            (known[block.kink.outputs[0]],) = block.kink.apply(dtype, *arguments)
            if block.kink.rule == "select":
                sides = dict(zip(block.inputs, ends, strict=True))
                jump = _jump(block, known | {d: zeroed}, sides)
        for step in block.steps:
            outputs = step.apply(dtype, *(known[value] for value in step.inputs))
            known |= dict(zip(step.outputs, outputs, strict=True))
        return [known[value] for value in block.outputs], jump

    constants = dict(zip(block.constants, constants, strict=True))
    write = lax.dynamic_update_slice_in_dim

    def apply(number, carry):
        outputs, jump = carry
        begin = number * tile
        units = lax.dynamic_slice_in_dim(unit, begin, tile)
        values, ends = [], []
        for position, array in enumerate(arrays):
            lower = lax.dynamic_slice_in_dim(index[position], begin, tile)
            share = lax.dynamic_slice_in_dim(weight[position], begin, tile)
            first, second = array[lower], array[lower + 1]
            share = share.reshape(-1, *[1] * (array.ndim - 1))
            values.append(first + share * (second - first))
            ends.append((first, second))
        made, jumps = jax.vmap(network)(units, values, ends)
        outputs = [write(*pair, begin, 0) for pair in zip(outputs, made, strict=True)]
        return outputs, write(jump, jumps, begin, 0)

    def compare(number, carry):
        changes, reach = carry
        begin = number * tile
        first = lax.dynamic_slice_in_dim(difference, begin, tile)
        second = lax.dynamic_slice_in_dim(difference, begin + 1, tile)
        changed = jnp.any(_opposite(first, second).reshape(tile, -1), axis=1)
        ends = jnp.stack([-jnp.min(first, axis=0), jnp.max(first, axis=0)])
        return write(changes, changed, begin, 0), jnp.maximum(reach, ends)

    # Rows beyond the part repeat its last, but for those of the tiles never reached.
    outputs = [jnp.zeros((rows + 1, *value.shape), dtype) for value in block.outputs]
    outputs, jump = lax.fori_loop(0, tiles, apply, (outputs, jnp.zeros(rows, dtype)))
    changes, reach = jnp.zeros(rows, bool), jnp.zeros((), dtype)
    if block.difference is not None:
        difference = outputs[block.outputs.index(block.difference)]
        reach = jnp.full((2, *block.difference.shape), -jnp.inf, dtype)
        changes, reach = lax.fori_loop(0, tiles, compare, (changes, reach))
    return outputs, changes, reach, jump


def _jump(block, known, ends):
    """|a - b| wherever d = 0 in where(d > 0, a, b), relative to a and b next to it."""
    d, *branches = block.kink.inputs
    shape = block.kink.outputs[0].shape
    a, b = (jnp.broadcast_to(known[value], shape) for value in branches)
    scale = jnp.zeros(shape, a.dtype)
    for value in branches:
        for side in ends.get(value, [known[value]]):
            scale = scale + jnp.broadcast_to(jnp.abs(side), shape)
    relative = jnp.abs(a - b) / jnp.where(scale > 0, scale, 1)
    return jnp.max(jnp.where(jnp.broadcast_to(known[d] == 0, shape), relative, 0))


def _check_continuity(jump, dtype):
    if np.any(jump > 64 * np.finfo(dtype).eps):
        _check.fail(
            "an operation of logits_fn",
            "select_n between values that differ where its condition changes",
            "to be continuous in the image",
            "Only continuous piecewise-linear networks can be proved; proof=False samples any.",
        )
