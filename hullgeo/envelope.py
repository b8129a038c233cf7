"""Classes along a segment whose logits are affine between rows.

With z(t) affine between neighbouring rows and a slack s that bounds what errors can do to any
z_a - z_j there, class a is proved at t if z_a(t) - z_j(t) > s for all j != a. Cutting the
intervals at the breakpoints of the upper envelope max_j z_j(t) leaves one largest class a in each;
its margin is a minimum of affine functions, so what is not proved lies next to the interval's ends.
Between two proved stretches of different classes lies a crossing.
"""

from typing import NamedTuple

import numpy as np

_ROUNDING = 2.0**-50  # of a position in [0, 1]; brackets are widened by it


class ClassesAlong(NamedTuple):
    """Classes and what separates them, in ascending order of position.

    Attributes:
      lower: where the class before each crossing is last proved, `(crossings,)`.
      upper: where the class after it is first proved.
      slope: derivative of the logit of the class after minus that of the class before.
      classes: classes between the crossings, `(crossings + 1,)`.
      margin: smallest local minimum of the margin inside each class; infinite without one.
      proved: outside of [lower, upper] the classes are proved, and inside is one change.
    """

    lower: np.ndarray
    upper: np.ndarray
    slope: np.ndarray
    classes: np.ndarray
    margin: np.ndarray
    proved: bool


class _Pieces(NamedTuple):
    """Intervals with one largest class each."""

    begin: np.ndarray  # (n,)
    end: np.ndarray
    first: np.ndarray  # logits at begin, (n, classes)
    last: np.ndarray
    slack: np.ndarray
    label: np.ndarray

    def rivals(self):
        """Differences to the other classes at both ends; infinite for the class itself."""
        rows = np.arange(len(self.label))
        pair = []
        for value in (self.first, self.last):
            gap = value[rows, self.label, None] - value
            gap[rows, self.label] = np.inf
            pair.append(gap)
        return pair


def margins(value: np.ndarray) -> np.ndarray:
    """Largest minus second largest logit of each row; infinite for a single class."""
    if value.shape[1] == 1:
        return np.full(len(value), np.inf)
    top = np.partition(value, -2, axis=1)
    return top[:, -1] - top[:, -2]


def read_classes(position: np.ndarray, value: np.ndarray, slack: np.ndarray) -> ClassesAlong:
    """Read the classes off the rows.

    Args:
      position: ascending float64, `(rows,)`; twice the same where two parts meet.
      value: logits in float64, finite, `(rows, classes)`.
      slack: for each interval between rows, `(rows - 1,)`.
    """
    pieces = _cut(position, value, slack)
    begin, end = _proved_part(pieces)
    kept = np.flatnonzero(begin < end)
    if not len(kept):
        middle = (pieces.first[0] + pieces.last[0]) / 2
        empty = np.zeros(0)
        label = np.asarray([middle.argmax()])
        return ClassesAlong(empty, empty, empty, label, np.asarray([0.0]), False)
    label = pieces.label[kept]
    # Stretches follow each other; a gap is open, or separates two classes.
    before, after = kept[:-1], kept[1:]
    change = label[:-1] != label[1:]
    open_ = (end[before] < begin[after]) & ~change
    touching = end[before] >= begin[after]
    turns = np.concatenate([[0], np.cumsum(pieces.label[1:] != pieces.label[:-1])])
    once = turns[after] - turns[before] == 1
    covered = begin[kept[0]] <= position[0] and end[kept[-1]] >= position[-1]
    proved = covered and not open_.any() and not (change & (touching | ~once)).any()
    before, after = before[change], after[change]
    lower, upper = end[before], begin[after]
    classes = np.concatenate([label[:1], pieces.label[after]])
    slope = _slopes(pieces, before, after)
    return ClassesAlong(lower, upper, slope, classes, _dips(pieces, lower, upper), bool(proved))


def _cut(position, value, slack):
    """Intervals of positive length, cut at the breakpoints of the upper envelope."""
    kept = np.flatnonzero(position[1:] > position[:-1])
    begin, end = position[:-1][kept], position[1:][kept]
    first, last, slack = value[:-1][kept], value[1:][kept], slack[kept]
    label = ((first + last) / 2).argmax(axis=1)
    rows = np.arange(len(label))
    simple = (first[rows, label] >= first.max(axis=1)) & (last[rows, label] >= last.max(axis=1))
    parts = []
    done = 0
    for row in np.flatnonzero(~simple):
        whole = slice(done, row)
        parts.append([field[whole] for field in (begin, end, first, last, slack, label)])
        share, order = _envelope(first[row], last[row])
        at = begin[row] + share * (end[row] - begin[row])
        at[-1] = end[row]
        logits = (1 - share)[:, None] * first[row] + share[:, None] * last[row]
        parts.append(
            [at[:-1], at[1:], logits[:-1], logits[1:], np.full(len(order), slack[row]), order]
        )
        done = row + 1
    parts.append([field[done:] for field in (begin, end, first, last, slack, label)])
    return _Pieces(*map(np.concatenate, zip(*parts, strict=True)))


def _envelope(first, last):
    """Shares in [0, 1] at which the largest line changes, the ends included, and the classes."""
    slope = last - first
    best = np.flatnonzero(first == first.max())
    label = best[np.argmax(slope[best])]
    shares, order = [0.0], [label]
    while True:
        steeper = np.flatnonzero(slope > slope[label])
        if not len(steeper):
            break
        at = (first[label] - first[steeper]) / (slope[steeper] - slope[label])
        nearest = at.min()
        if not nearest < 1:
            break
        tied = steeper[at == nearest]
        label = tied[np.argmax(slope[tied])]
        shares.append(max(nearest, shares[-1]))
        order.append(label)
    return np.asarray([*shares, 1.0]), np.asarray(order)


def _proved_part(pieces):
    """Where in each piece every margin exceeds the slack; empty if begin >= end."""
    left, right = pieces.rivals()
    slack = pieces.slack[:, None]
    length = (pieces.end - pieces.begin)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(left == right, 0, (slack - left) / (right - left))
    at = pieces.begin[:, None] + np.clip(np.nan_to_num(share), 0, 1) * length
    begin = np.where(left > slack, pieces.begin[:, None], at + _ROUNDING).max(axis=1)
    end = np.where(right > slack, pieces.end[:, None], at - _ROUNDING).min(axis=1)
    never = ((left <= slack) & (right <= slack)).any(axis=1)
    return np.where(never, pieces.end, begin), np.where(never, pieces.begin, end)


def _slopes(pieces, before, after):
    """Slope of the difference of two classes where the last change between two pieces is."""
    found = np.zeros(len(before))
    for number, (start, stop) in enumerate(zip(before, after, strict=True)):
        turns = np.flatnonzero(pieces.label[start + 1 : stop + 1] != pieces.label[start:stop])
        left = start + turns[-1]
        a, b = pieces.label[start], pieces.label[stop]
        rise = pieces.last[left + 1] - pieces.first[left]
        found[number] = (rise[b] - rise[a]) / (pieces.end[left + 1] - pieces.begin[left])
    return found


def _dips(pieces, lower, upper):
    """`dips` at the ends of the pieces, between which the margin is concave."""
    left, right = pieces.rivals()
    with np.errstate(invalid="ignore"):
        slope = np.where(np.isinf(left), np.inf, right - left)
    first, last = left.min(axis=1), right.min(axis=1)
    rises = np.where(left == first[:, None], slope, np.inf).min(axis=1) >= 0
    falls = np.where((right == last[:, None]) & (slope < np.inf), slope, -np.inf).max(axis=1) <= 0
    node = np.concatenate([first[:1], np.minimum(last[:-1], first[1:]), last[-1:]])
    dip = np.concatenate([rises[:1], falls[:-1] & rises[1:], falls[-1:]])
    return dips(np.concatenate([pieces.begin, pieces.end[-1:]]), node, dip, lower, upper)


def dips(
    position: np.ndarray,
    margin: np.ndarray,
    is_dip: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
) -> np.ndarray:
    """The smallest local minimum of a margin between crossings.

    Args:
      position: ascending.
      margin: there.
      is_dip: whether it has a local minimum there.
      lower: where the crossings begin, ascending.
      upper: where they end.

    Returns:
      one number per class, infinite where the margin has no local minimum.
    """
    lowest = np.where(is_dip, margin, np.inf)
    first = np.searchsorted(position, np.concatenate([[-np.inf], upper]))
    last = np.searchsorted(position, np.concatenate([lower, [np.inf]]), side="right")
    return np.asarray([lowest[a:b].min(initial=np.inf) for a, b in zip(first, last, strict=True)])
