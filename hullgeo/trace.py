"""All changes of class along segments of images: those that samples meet, or all of them, proved.

Along x(t) = (1 - t) start + t end a network changes its class where the largest logit changes.
Sampling finds the changes between neighbouring samples of different classes and misses a class
entered and left between two samples. For piecewise-linear networks the logits are piecewise affine
in t, and all changes are found by carrying every breakpoint through the network (`line_proof.py`;
the idea: Sotoudeh and Thakur, "Computing linear restrictions of neural networks", NeurIPS 2019,
arXiv:1908.06214).
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from hullgeo import _check, _numerics
from hullgeo.crossing import blend, check_segments, find_crossings, join_callable, split_callable
from hullgeo.envelope import ClassesAlong, dips, margins, read_classes
from hullgeo.line_proof import Piecewise, Prover
from hullgeo.result import Proof, SegmentPath, SegmentTrace, Status

# Samples evaluated at a time.
_BATCH = 256
# Refinements of one gap between samples: each finds the next change of class inside.
_ROUNDS = 16
# How far the caller's own logits may be from the proved ones, in units of the largest: rounding,
# however coarse the caller's precision, and no more.
_AGREEMENT = 2e-2


def trace_segment(
    logits_fn: Callable[[Any], Array],
    start: Shaped[Array | np.ndarray, "..."],
    end: Shaped[Array | np.ndarray, "..."],
    *,
    num_probes: int = 100,
    xtol: float = 1e-6,
    proof: bool = False,
    max_pieces: int = 1_000_000,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> SegmentTrace:
    """All crossings along segments of images, found by samples or proved complete.

    With `proof=True` the function's jaxpr is interpreted along the segment: convolution, dense
    layers, batch norm in evaluation mode, ReLU and leaky ReLU, absolute values, maxima, max and
    mean pooling, sums, concatenation, padding, reshapes, slices, transposes. Anything else is
    refused by its name. Works on the host, hence not under `jit` or `vmap`; batches of segments are
    welcome. The same `logits_fn` is read and compiled once (see `find_crossing`).

    Args:
      logits_fn: images `(*batch, *image)` -> logits `(*batch, num_classes)`, any leading batch; row
        by row, hence in evaluation mode.
      start: images at position 0, `(*batch, height, width, channels)` or any other image shape.
      end: images at position 1, of the same shape and dtype.
      num_probes: equidistant samples per segment, both ends included, at least 2; without `proof`,
        or where a proof is given up.
      xtol: largest width of a sampled crossing's bracket, in units of the segment's length.
      proof: find all crossings. Images in float32 are swept in float32 first and in float64 where
        the margin is small; images in float64 in float64 throughout.
      max_pieces: give the proof of a segment up beyond this many linear pieces; it is sampled then,
        with status `STEP_LIMIT`.
      devices: devices that share a proof; by default the first one, with a thread per processor.
      progress: show a bar for a proof.

    Returns:
      a `SegmentTrace` with fields `(*batch, ...)`. Status `PRECISION_LIMIT`: the margin stays
      within the slack somewhere without a single clear change of class, or a sampled crossing
      cannot be bracketed to `xtol`.

    Raises:
      ValueError: for shapes, dtypes, options, and operations that are not piecewise linear.

    Guarantee: see `SegmentTrace`; `Proof` says what each kind means.
    """
    _check.at_least("num_probes", num_probes, 2)
    _check.nonnegative("xtol", xtol)
    _check.at_least("max_pieces", max_pieces, 1)
    segments = _segments(logits_fn, start, end, proof)
    found = _sampled(segments, num_probes, xtol) if not proof else []
    if proof:
        with _progress_bar(segments, progress) as report:
            for row in range(len(segments.start)):
                swept = _swept(segments, row, max_pieces, devices, functools.partial(report, row))
                found.append(_read(segments, swept, row, num_probes, xtol))
    return _packed(found, segments)


def segment_path(
    function: Callable[[Any], Array],
    start: Shaped[Array | np.ndarray, "..."],
    end: Shaped[Array | np.ndarray, "..."],
    *,
    max_pieces: int = 1_000_000,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> SegmentPath:
    """The exact path of a segment of images through the space of a piecewise-linear function.

    With `function=classifier.features` this is the path through feature space: a polygon whose
    corners are returned.

    Args:
      function: images `(1, *image)` -> values `(1, dim)`, piecewise linear (see `trace_segment`).
      start: the image at position 0, `(height, width, channels)` or any other shape.
      end: the image at position 1, of the same shape and dtype.
      max_pieces: give up beyond this many linear pieces.
      devices: devices that share the work; by default the first one, with a thread per processor.
      progress: show a bar.

    Returns:
      a `SegmentPath`. Status `STEP_LIMIT` beyond `max_pieces`, with the two ends as the only knots;
      `NONFINITE` where the values are not finite.

    Raises:
      ValueError: for shapes, dtypes, options, and operations that are not piecewise linear.

    Guarantee: between neighbouring knots the function is affine, up to the slack, for the network
    in real arithmetic with the parameters as stored.
    """
    _check.at_least("max_pieces", max_pieces, 1)
    segments = _segments(function, np.asarray(start)[None], np.asarray(end)[None], True)
    with _progress_bar(segments, progress) as report:
        swept = _swept(segments, 0, max_pieces, devices, functools.partial(report, 0))
    status = Status.CONVERGED
    if swept is None:
        status = Status.STEP_LIMIT
        value = _evaluated(segments, np.zeros(2, int), np.asarray([0.0, 1.0]))
        position, slack, proof = np.asarray([0.0, 1.0]), np.inf, Proof.SAMPLED
    else:
        kept = np.append(np.flatnonzero(np.diff(swept.rows.position)), len(swept.slack))
        position, value = swept.rows.position[kept], swept.rows.value[kept]
        slack, proof = swept.slack.max(), swept.proof
    if not np.isfinite(value).all():
        status = Status.NONFINITE
    with _numerics.float64():
        dtype = segments.dtype
        return SegmentPath(
            jnp.asarray(position, dtype),
            jnp.asarray(value, dtype),
            jnp.asarray(slack, dtype),
            jnp.int32(proof),
            jnp.int32(status),
        )


class _Segments(NamedTuple):
    """Segments in one leading axis, and the function in parts."""

    fixed: Any
    arrays: list[Any]
    start: np.ndarray
    end: np.ndarray
    batch: tuple[int, ...]
    dtype: Any


class _Found(NamedTuple):
    """What is known about one segment."""

    classes: ClassesAlong
    proof: Proof
    num_pieces: int
    slack: float
    num_evaluations: int
    status: Status


def _segments(logits_fn, start, end, proof):
    for name, images in (("start", start), ("end", end)):
        if not _check.is_concrete(images):
            _check.fail(name, images, "to be an array with values", "Call this outside jit.")
    wide = proof and getattr(start, "dtype", None) == np.float64
    with _wide(wide):
        start, end, batch = check_segments(logits_fn, start, end)
        dtype = np.dtype(start.dtype)
        if proof and dtype not in (np.float32, np.float64):
            _check.fail("start.dtype", str(dtype), "to be float32 or float64 for a proof")
        arrays, fixed = split_callable(logits_fn)
        shape = (-1, *start.shape[len(batch) :])
        start, end = (np.asarray(images).reshape(shape) for images in (start, end))
    return _Segments(fixed, arrays, start, end, batch, dtype)


def _wide(wide):
    return _numerics.float64() if wide else contextlib.nullcontext()


@contextlib.contextmanager
def _progress_bar(segments, show):
    if not show:
        yield lambda row, share: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=len(segments.start), desc="segments", bar_format=_BAR) as bar:

        def report(row, share):
            bar.n = row + share
            bar.refresh()

        yield report


_BAR = "{desc}: {percentage:3.0f}% |{bar}| {n:.2f}/{total_fmt} [{elapsed}]"


@functools.lru_cache(maxsize=8)
def _prover(fixed, shapes, shape, dtype):
    arrays = [jax.ShapeDtypeStruct(*array) for array in shapes]
    return Prover(fixed, arrays, shape, dtype)


def _swept(segments, row, max_pieces, devices, progress) -> Piecewise | None:
    """The output along one segment."""
    arrays = segments.arrays
    shapes = tuple((np.shape(array), array.dtype) for array in arrays)
    with _wide(segments.dtype == np.float64):
        prover = _prover(segments.fixed, shapes, segments.start.shape[1:], segments.dtype)
    return prover.sweep(
        arrays,
        segments.start[row],
        segments.end[row],
        max_pieces=max_pieces,
        devices=devices,
        progress=progress,
    )


def _read(segments, swept, row, num_probes, xtol) -> _Found:
    """Classes from the proof, or from samples with the status that tells why."""
    if swept is None:
        return _given_up(segments, row, num_probes, xtol, Status.STEP_LIMIT)
    if not np.isfinite(swept.rows.value).all():
        return _given_up(segments, row, num_probes, xtol, Status.NONFINITE)
    if not _agrees(segments, swept, row):
        return _given_up(segments, row, num_probes, xtol, Status.PRECISION_LIMIT)
    classes = read_classes(swept.rows.position, swept.rows.value, swept.slack)
    with np.errstate(over="ignore"):
        lower, upper = _outwards(classes, segments.dtype)
    apart = (upper[:-1] <= lower[1:]).all()
    status = Status.CONVERGED if classes.proved and apart else Status.PRECISION_LIMIT
    num_pieces = int(np.count_nonzero(np.diff(swept.rows.position)))
    slack = float(swept.slack.max())
    classes = classes._replace(lower=lower, upper=upper)
    count = len(swept.rows.position)
    return _Found(classes, swept.proof, num_pieces, slack, count, status)


def _given_up(segments, row, num_probes, xtol, status):
    (found,) = _sampled(segments, num_probes, xtol, [row])
    return found._replace(status=status)


def _outwards(classes, dtype):
    """Brackets in the type of the images, rounded outwards."""
    with _numerics.float64():
        lower = _numerics.round_down(jnp.asarray(classes.lower), dtype)
        upper = _numerics.round_up(jnp.asarray(classes.upper), dtype)
        return np.asarray(lower, np.float64), np.asarray(upper, np.float64)


def _agrees(segments, swept, row):
    """Whether the caller's own function, at some positions, is the one that was read."""
    position = np.linspace(0, 1, 17)
    own = _evaluated(segments, np.full(17, row), position)
    rows, value = swept.rows
    read = np.stack([np.interp(position, rows, column) for column in value.T], axis=1)
    return np.abs(own - read).max() <= _AGREEMENT * np.abs(value).max()


@functools.partial(jax.jit, static_argnums=0)
def _logits(fixed, arrays, start, end, position):
    return join_callable(arrays, fixed)(blend(start, end, position))


@functools.partial(jax.jit, static_argnums=0)
def _slopes(fixed, arrays, start, end, position, before, after):
    """Derivative of z_after - z_before in the position."""

    def difference(position):
        logits = join_callable(arrays, fixed)(blend(start, end, position))
        pick = lambda label: jnp.take_along_axis(logits, label[:, None], 1)  # noqa: E731
        return jnp.sum(pick(after) - pick(before))

    return jax.grad(difference)(position)


def _batches(segments, function, rows, position, *others):
    """A compiled function of segments and positions, on batches of one size, in float64."""
    size = min(_BATCH, 1 << (len(rows) - 1).bit_length())
    dtype = np.float64 if segments.dtype == np.float64 else np.float32
    found = []
    with _wide(segments.dtype == np.float64):
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            extra = (0, size - len(rows[part]))
            padded = [np.pad(array[part], extra, mode="edge") for array in (rows, *others)]
            places = np.pad(position[part].astype(dtype), extra, mode="edge")
            ends = segments.start[padded[0]], segments.end[padded[0]]
            result = function(segments.fixed, segments.arrays, *ends, places, *padded[1:])
            kept = slice(len(rows[part]))
            found.append(jax.tree.map(lambda a, kept=kept: np.asarray(a)[kept], result))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _evaluated(segments, rows, position):
    """The caller's own logits, `(rows, num_classes)`."""
    return _batches(segments, _logits, rows, position).astype(np.float64)


class _Lanes(NamedTuple):
    """Gaps to be refined: a segment, two positions and the classes sampled there."""

    row: np.ndarray
    begin: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _sampled(segments, num_probes, xtol, chosen=None) -> list[_Found]:
    """Classes at equidistant positions, and every change between two of them refined."""
    chosen = np.arange(len(segments.start)) if chosen is None else np.asarray(chosen)
    position = np.linspace(0, 1, num_probes, dtype=_position_type(segments))
    rows = np.repeat(chosen, num_probes)
    logits = _evaluated(segments, rows, np.tile(position, len(chosen)))
    finite = np.isfinite(logits).all(axis=1).reshape(-1, num_probes)
    label = logits.argmax(axis=1).reshape(-1, num_probes)
    margin = margins(logits).reshape(-1, num_probes)
    differ = (label[:, :-1] != label[:, 1:]) & finite[:, :-1] & finite[:, 1:]
    place, gap = np.nonzero(differ)
    lanes = _Lanes(
        chosen[place], position[gap], position[gap + 1], label[place, gap], label[place, gap + 1]
    )
    crossings = _refine(segments, lanes, xtol)
    found = []
    for number, row in enumerate(chosen):
        own = [crossing for crossing in crossings if crossing.row == row]
        own.sort(key=lambda crossing: crossing.lower)
        found.append(_assemble(own, position, label[number], margin[number], finite[number]))
    return found


def _position_type(segments):
    return np.float64 if segments.dtype == np.float64 else np.float32


class _Change(NamedTuple):
    """One refined change of class."""

    row: int
    lower: float
    upper: float
    before: int
    after: int
    slope: float
    num_evaluations: int
    status: int


def _refine(segments, lanes, xtol) -> list[_Change]:
    """All changes of class that are known to lie in the gaps, one batch a round."""
    changes: list[_Change] = []
    for _ in range(_ROUNDS):
        if not len(lanes.row):
            return changes
        found = _batches(
            segments,
            functools.partial(_bracket, xtol=xtol),
            lanes.row,
            lanes.begin,
            lanes.stop,
        )
        agree = found.status == Status.NO_CROSSING  # the ends are too close to a tie
        lower = np.where(agree, lanes.begin, found.lower)
        upper = np.where(agree, lanes.stop, found.upper)
        before = np.where(agree, lanes.first, found.class_lower).astype(np.int32)
        after = np.where(agree, lanes.last, found.class_upper).astype(np.int32)
        status = np.where(agree, Status.PRECISION_LIMIT, found.status)
        slope = _batches(segments, _slopes, lanes.row, (lower + upper) / 2, before, after)
        columns = (lanes.row, lower, upper, before, after, slope, found.num_evaluations, status)
        # Next to a tie another batch may round to the class before: that change is known already.
        fresh = agree | (before == lanes.first) | (after != lanes.first)
        rows = zip(*(column[fresh] for column in columns), strict=True)
        changes += [_Change(*(value.item() for value in row)) for row in rows]
        more = (after != lanes.last) & (status == Status.CONVERGED) & (upper < lanes.stop)
        lanes = _Lanes(lanes.row, upper, lanes.stop, after, lanes.last)
        lanes = _Lanes(*(field[more] for field in lanes))
    return [change._replace(status=int(Status.STEP_LIMIT)) for change in changes]


def _bracket(fixed, arrays, start, end, lower, upper, *, xtol):
    xtol = jnp.asarray(xtol, lower.dtype)
    return find_crossings(fixed, arrays, start, end, lower, upper, xtol, np.int32(64))


def _assemble(changes, position, label, margin, finite) -> _Found:
    """The classes along one segment from its samples and the changes between them."""
    classes = [int(label[0]), *(change.after for change in changes)]
    lower = np.asarray([change.lower for change in changes])
    upper = np.asarray([change.upper for change in changes])
    nodes = np.concatenate([position, (lower + upper) / 2])
    order = np.argsort(nodes, kind="stable")
    values = np.concatenate([np.where(finite, margin, np.inf), np.zeros(len(changes))])
    values = values[order]
    around = np.concatenate([[np.inf], values, [np.inf]])
    is_dip = (values <= around[:-2]) & (values <= around[2:])
    dip = dips(nodes[order], values, is_dip, lower, upper)
    status = next((change.status for change in changes if change.status), Status.CONVERGED)
    if any(change.before != known for change, known in zip(changes, classes, strict=False)):
        status = Status.PRECISION_LIMIT
    if not finite.all():
        status = Status.NONFINITE
    slope = np.asarray([change.slope for change in changes])
    along = ClassesAlong(lower, upper, slope, np.asarray(classes), dip, False)
    count = len(position) + sum(change.num_evaluations for change in changes)
    return _Found(along, Proof.SAMPLED, 0, np.inf, count, Status(status))


def _packed(found: list[_Found], segments) -> SegmentTrace:
    """One result for all segments, as long as the one with most crossings."""
    most = max(len(item.classes.lower) for item in found)
    dtype = _position_type(segments)

    def column(name, size, empty, kind):
        rows = np.full((len(found), size), empty, kind)
        for row, item in zip(rows, found, strict=True):
            values = getattr(item.classes, name)
            row[: len(values)] = values
            row[len(values) :] = values[-1] if len(values) else empty
        return rows

    counts = np.asarray([len(item.classes.lower) for item in found], np.int32)
    fields = (
        column("lower", most, 1, dtype),
        column("upper", most, 1, dtype),
        column("slope", most, 0, dtype),
        column("classes", most + 1, 0, np.int32),
        column("margin", most + 1, np.inf, dtype),
        counts,
        np.asarray([item.num_pieces for item in found], np.int32),
        np.asarray([item.slack for item in found], dtype),
        np.asarray([item.proof for item in found], np.int32),
        np.asarray([item.num_evaluations for item in found], np.int32),
        np.asarray([item.status for item in found], np.int32),
    )
    with _wide(segments.dtype == np.float64):
        return SegmentTrace(
            *(jnp.asarray(field.reshape((*segments.batch, *field.shape[1:]))) for field in fields)
        )
