"""What the report is told in: figures with their sentences, cards, certificates, and words.

Every figure comes with what is seen in *this* data, with its numbers, and how certain that is.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hullgeo.plots import percent, power_of_ten

Data = dict[str, dict[str, Any]]
UNIT = "of the diameter"


class Figure(NamedTuple):
    """Drawings under one another, what is seen in them, and how certain that is."""

    pictures: Sequence[dict[str, str]]
    alt: str
    seen: str
    certain: str


class Card(NamedTuple):
    """Pictures with their captions, a title, and lines of numbers."""

    pictures: Sequence[tuple[str, str]]
    title: str
    lines: Sequence[str]
    color: str
    wrong: bool = False


class Gallery(NamedTuple):
    """Cards under a sentence that says what they show and how certain it is."""

    cards: Sequence[Card]
    seen: str
    certain: str
    layout: str = "small"


class Certificate(NamedTuple):
    """One row of the table of certificates."""

    question: str
    proved: str
    widest: str
    open: str


class Section(NamedTuple):
    """One chapter of the report, and what it adds to the top and to the summary."""

    name: str
    label: str
    title: str
    lead: str
    blocks: Sequence[Figure | Gallery]
    findings: Sequence[str] = ()
    certificates: Sequence[Certificate] = ()
    summary: dict[str, Any] = {}  # noqa: RUF012


def of(count: int, total: int, noun: str = "") -> str:
    """A count with its share: '352 of 360 images (97.8 %)', 'all 360 images'."""
    noun = f" {noun}" if noun else ""
    if total and count == total:
        return f"all {total:,}{noun}"
    if count == 0:
        return f"none of {total:,}{noun}"
    return f"{count:,} of {total:,}{noun} ({percent(count / total, 3)})"


def times(counts: np.ndarray) -> str:
    """How often: `once`, or `1 to 3 times` where it differs."""
    least, most = int(counts.min()), int(counts.max())
    if least < most:
        return f"{least} to {most} times"
    return {0: "never", 1: "once", 2: "twice"}.get(most, f"{most} times")


def sentence(text: str) -> str:
    """With a capital letter at the start."""
    return text[:1].upper() + text[1:]


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    z, share = 1.959964, count / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def rank_probability(left: np.ndarray, right: np.ndarray) -> float | None:
    """Share of pairs in which the left value is larger, ties half; None without pairs."""
    if len(left) == 0 or len(right) == 0:
        return None
    ordered = np.sort(right)
    below = np.searchsorted(ordered, left, side="left")
    above = np.searchsorted(ordered, left, side="right")
    return float(np.mean(below + above) / (2 * len(right)))


def bracket(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower bounds of distances; infinity and 0 where a query failed."""
    upper, lower = (np.asarray(found[name], np.float64) for name in ("distance", "lower"))
    return np.where(np.isnan(upper), np.inf, upper), np.where(np.isnan(lower), 0.0, lower)


def median(values: np.ndarray) -> float:
    """The median, NaN of nothing."""
    return float(np.median(values)) if len(values) else math.nan


def width(relative: float) -> str:
    """A relative width, rounded up to one digit: '0.06 %', '3e-7' with a superscript."""
    if relative <= 0:
        return "0"
    exponent = math.floor(math.log10(relative))
    upward = math.ceil(relative / 10.0**exponent) * 10.0**exponent
    return percent(upward, 1) if exponent >= -5 else power_of_ten(upward)


def listed(names: Sequence[str]) -> str:
    """'“3”, “5” and “9”'."""
    quoted = [f"“{name}”" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
