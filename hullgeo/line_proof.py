"""Every change of class along a segment, proved for piecewise-linear networks.

Propagation (`propagation.py`) gives the logits as affine functions between the rows of a segment.
Between neighbouring rows the largest is the upper envelope of a few lines, and the margin of its
class is concave, hence smallest at the ends: classes, crossings and margins are read off, none is
sampled (`envelope.py`). What rounding can do to a margin is bounded by a slack; wherever the margin
stays above it, the class is proved.

Two kinds of proof. *Rigorous*: a running error bound (`rounding_bound.py`) is the slack; it needs a
network whose layers do not amplify much, and float64 throughout. *Up to rounding*: the slack is a
stated multiple of the largest logit, far above the rounding errors that occur, which are measured
on some rows. Then the sweep is float32, and what float32 leaves open (the windows where the margin
is below its slack) is swept again in float64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hullgeo import rounding_bound
from hullgeo.crossing import join_callable
from hullgeo.envelope import margins
from hullgeo.piecewise import read_program
from hullgeo.propagation import Line, Propagator, Rows
from hullgeo.result import Proof

# The slack of a proof up to rounding, in units of the largest logit. Errors measured on published
# networks are below a hundredth of it.
SLACK = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-10}
# A rigorous slack above this share of the largest logit is not worth the float64 sweep.
_RIGOROUS_SHARE = 1e-6
# Rows on which float32 is compared with float64, and how far below its slack it must stay.
_CHECKED_ROWS = 32
_SAFETY = 8


class Piecewise(NamedTuple):
    """The output of a network along one segment, affine between rows.

    Attributes:
      rows: all rows.
      slack: what rounding can do to a difference of two outputs, for each interval between rows.
      proof: the kind of proof.
    """

    rows: Rows
    slack: np.ndarray
    proof: Proof


class Prover:
    """One network, read once, compiled when first used."""

    def __init__(self, fixed: Any, arrays: list[Any], shape: tuple[int, ...], dtype: Any):
        """Read the network for images of this shape and type."""
        function = lambda arrays, image: join_callable(arrays, fixed)(image)  # noqa: E731
        self.program = read_program(function, arrays, jax.ShapeDtypeStruct((1, *shape), dtype))
        self.dtype = np.dtype(dtype)

    @functools.cached_property
    def narrow(self) -> Propagator:
        """The propagator in float32."""
        return Propagator(self.program, np.float32)

    @functools.cached_property
    def wide(self) -> Propagator:
        """The propagator in float64."""
        return Propagator(self.program, np.float64)

    @functools.cached_property
    def _error(self) -> Callable[..., np.ndarray]:
        """The running error bound of the float64 propagation."""
        return rounding_bound.error_function(self.program, np.float64)

    def sweep(
        self,
        arrays: list[Any],
        first: np.ndarray,
        last: np.ndarray,
        *,
        max_pieces: int,
        devices: Sequence[jax.Device] | None,
        progress: Callable[[float], None],
    ) -> Piecewise | None:
        """The output along one segment; None where there are more than `max_pieces`."""
        line = Line(0.0, 1.0, np.asarray(first, np.float64), np.asarray(last, np.float64))
        options = {"max_rows": max_pieces, "devices": devices}
        exact = self.wide.constants(arrays)
        rigorous = self._expects_rigour(exact, line)
        if self.dtype == np.float32 and not rigorous:
            swept = self.narrow.propagate(
                self.narrow.constants(arrays), [line], progress=progress, **options
            )
            if swept is None:
                return None
            rows = swept[0][0]
            slack = SLACK[self.dtype] * _scale(rows)
            if not slack < np.inf:
                return Piecewise(rows, np.full(len(rows.position) - 1, slack), Proof.SAMPLED)
            if _SAFETY * self._narrow_error(exact, line, rows) <= slack:
                spans = _windows(rows, slack)
                windows = [_piece(line, *rows.position[list(span)]) for span in spans]
                again = self.wide.propagate(exact, windows, **options)
                return again and _merge(rows, slack, spans, again[0])
        swept = self.wide.propagate(exact, [line], progress=progress, **options)
        if swept is None:
            return None
        rows, slack = swept[0][0], SLACK[np.dtype(np.float64)] * _scale(swept[0][0])
        if rigorous:
            slack = self._rigorous_slack(exact, line, swept[1], rows)
        kind = Proof.RIGOROUS if rigorous else Proof.UP_TO_ROUNDING
        return Piecewise(rows, np.full(len(rows.position) - 1, slack), kind)

    def _expects_rigour(self, constants, line):
        """Whether the running bound, estimated from a few images, is small enough to be of use."""
        if not rounding_bound.has_bound(self.program):
            return False
        images = _images(line, np.linspace(0, 1, 9))
        logits, reach = self.wide.evaluate(constants, images)
        rows = Rows(np.zeros(len(logits)), logits)
        slack = self._rigorous_slack(constants, line, reach, rows)
        return slack <= _RIGOROUS_SHARE * _scale(rows)

    def _rigorous_slack(self, constants, line, reach, rows):
        """Twice the error of a logit, and what reading off the envelope rounds."""
        pixels = np.maximum(np.abs(line.first), np.abs(line.last))
        error = self._error(constants, pixels, reach)
        return 2 * error.max() + 32 * float(np.finfo(np.float64).eps) * _scale(rows)

    def _narrow_error(self, constants, line, rows):
        """The largest difference from float64 on some rows, those of least margin included."""
        count = min(_CHECKED_ROWS // 2, len(rows.position))
        spread = np.linspace(0, len(rows.position) - 1, count).astype(int)
        some = np.union1d(spread, np.argsort(margins(rows.value), kind="stable")[:count])
        exact, _ = self.wide.evaluate(constants, _images(line, rows.position[some]))
        return np.abs(exact - rows.value[some]).max()


def _scale(rows):
    return float(np.abs(rows.value).max())


def _images(line, position):
    """Images between those of a line, `(positions, *image)`."""
    share = (position - line.start) / (line.stop - line.start)
    share = share.reshape(-1, *[1] * line.first.ndim)
    return (1 - share) * line.first + share * line.last


def _piece(line, start, stop):
    return Line(float(start), float(stop), *_images(line, np.asarray([start, stop])))


def _windows(rows, slack):
    """Pairs of rows around all that the slack leaves open: below it, or of another class."""
    label = rows.value.argmax(axis=1)
    low = margins(rows.value) <= slack
    open_ = low[1:] | low[:-1] | (label[1:] != label[:-1])
    # Beyond intervals of length zero, so that a window has a length.
    position, count = rows.position, len(rows.position)
    changes = np.diff(np.concatenate([[False], open_, [False]]).astype(int))
    spans: list[tuple[int, int]] = []
    for begin, end in zip(np.flatnonzero(changes > 0), np.flatnonzero(changes < 0), strict=True):
        begin, end = int(begin), int(end)
        while begin > 0 and position[begin - 1] == position[begin]:
            begin -= 1
        while end < count - 1 and position[end + 1] == position[end]:
            end += 1
        if position[begin] == position[end]:
            begin, end = max(begin - 1, 0), min(end + 1, count - 1)
        if spans and begin <= spans[-1][1]:
            begin = spans.pop()[0]
        spans.append((begin, end))
    return spans


def _merge(rows, slack, spans, windows):
    """The float32 rows, those of the windows replaced by float64 rows."""
    wide = SLACK[np.dtype(np.float64)] * _scale(rows)
    positions, values, slacks, done = [], [], [], 0
    for (begin, end), window in zip(spans, windows, strict=True):
        positions += [rows.position[done : begin + 1], window.position]
        values += [rows.value[done : begin + 1], window.value]
        # Where float32 and float64 meet there is an interval of length zero.
        slacks += [np.full(begin - done + 1, slack), np.full(len(window.position), wide)]
        done = end
    positions.append(rows.position[done:])
    values.append(rows.value[done:])
    slacks.append(np.full(len(rows.position) - done - 1, slack))
    merged = Rows(np.concatenate(positions), np.concatenate(values))
    return Piecewise(merged, np.concatenate(slacks), Proof.UP_TO_ROUNDING)
