"""Whether a certificate of `project_to_hull` is ever false: 100,000 problems that try to break it.

    python -m benchmarks.honesty --problems 100000 --batch 256 --out results/honesty.json
    python -m benchmarks.honesty --problems 5000 --mutate

A bracket is false if a point of the hull is nearer than `distance_lower_bound`, or if a hyperplane
proves the hull farther than `distance`. The referee looks for such points and planes with solvers
of its own (numpy Wolfe, from the answer's support too), refines them in long double, and decides
every suspicion in exact rational arithmetic: what it reports false is false. A verdict is wrong if
a query called outside is a convex combination of vertices, exactly; or one called inside with
radius rho has a supporting hyperplane nearer than rho (all facets where the dimension is small).

These hulls are small, but every way that the engine goes with large ones, or on other machines, is
forced upon a part of them, as drawn for each seed (`Ways`).

With `--mutate` the bounds of rounding errors are taken away, and the run must find false brackets:
otherwise it would prove nothing. The exit status is 1 where the outcome is not the one wanted.

About an hour and a half of one core, nearly all of it compilation for 20 pairs of shape and types:
few seeds with many queries each (`--batch`) compile least, and `--part 1/2` and `--part 2/2` share
the pairs between two processes.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import hard_problems
from benchmarks.hard_problems import Batch
from benchmarks.hull import VARIANTS, versions
from benchmarks.peers import make_wolfe

LONG = np.longdouble


class Ruling(NamedTuple):
    """What the referee says about one query.

    Attributes:
      false: what is false about the answer, empty if nothing.
      upper: distance of the nearest point found.
      lower: best bound found.
    """

    false: tuple[str, ...]
    upper: float
    lower: float


def judge(batch: Batch, answer: Any) -> list[Ruling]:
    """Rulings over all queries of a batch."""
    vertices = batch.vertices.astype(np.float64)
    center, size = vertices.mean(axis=0), np.abs(vertices - vertices.mean(axis=0)).max()
    size = size if size > 0 else 1.0
    solve = make_wolfe((vertices - center) / size)
    facets = _facets(vertices)
    rulings = []
    for row, query in enumerate(batch.queries.astype(np.float64)):
        rows = vertices.astype(LONG) - query.astype(LONG)
        candidates = [(np.asarray(answer.support[row]), answer.weights[row].astype(np.float64))]
        candidates.append(solve((query - center) / size))
        points = [refined(rows, *candidate) for candidate in candidates]
        if batch.weights is not None:
            points.append(batch.weights[row].astype(LONG))
        rulings.append(_rule(vertices, query, rows, points, facets, _row(answer, row)))
    return rulings


def refined(rows: np.ndarray, support: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of all vertices, made optimal on their support in long double where that works."""
    full = np.zeros(len(rows))
    keep = np.isfinite(weights) & (weights > 0)
    np.add.at(full, support[keep], weights[keep])
    if not full.any():
        full[0] = 1
    full = full.astype(LONG) / full.astype(LONG).sum()
    active = np.flatnonzero(full)
    some = rows[active]
    scale = np.abs(some).max()
    if scale == 0:
        return full
    some = some / scale
    gram = np.asarray(some @ some.T + 1, np.float64)
    solution = np.zeros(len(active), LONG)
    for _ in range(4):
        defect = 1 - (some @ (some.T @ solution) + solution.sum())
        try:
            solution = solution + np.linalg.solve(gram, np.asarray(defect, np.float64))
        except np.linalg.LinAlgError:
            return full
    if not np.isfinite(np.asarray(solution, np.float64)).all() or solution.min() <= 0:
        return full
    better = np.zeros(len(rows), LONG)
    better[active] = solution / solution.sum()
    return better if _square(better @ rows) <= _square(full @ rows) else full


class _Answer(NamedTuple):
    distance: float
    lower: float
    radius: float
    status: int


def _row(answer: Any, row: int) -> _Answer:
    return _Answer(
        float(answer.distance[row]),
        float(answer.distance_lower_bound[row]),
        float(answer.interior_radius[row]),
        int(answer.status[row]),
    )


def _rule(
    vertices: np.ndarray,
    query: np.ndarray,
    rows: np.ndarray,
    points: list[np.ndarray],
    facets: np.ndarray,
    answer: _Answer,
) -> Ruling:
    residuals = [point @ rows for point in points]
    lengths = [_square(residual) ** LONG(0.5) for residual in residuals]
    nearest = int(np.argmin(lengths))
    directions = np.array([r for r, length in zip(residuals, lengths, strict=True) if length > 0])
    bounds = (
        (rows @ directions.T).min(axis=0) / np.sqrt((directions**2).sum(axis=1))
        if len(directions)
        else np.zeros(0, LONG)
    )
    best = int(np.argmax(bounds)) if len(bounds) else -1
    upper, lower = lengths[nearest], bounds[best] if len(bounds) else LONG(-np.inf)

    false = []
    if not (np.isfinite(answer.distance) and np.isfinite(answer.lower)):
        false.append("no numbers for a finite query")
    # Suspicions in long double, with room for its rounding; exact arithmetic decides.
    room = LONG(2) ** -58 * np.abs(rows).max() * rows.shape[1]
    if answer.lower > upper - room and answer.lower > 0:
        exact, total = _exact_point(vertices, query, points[nearest])
        if _dot(exact, exact) < (Fraction(answer.lower) * total) ** 2:
            false.append("outside" if not any(exact) else "lower bound")
    if answer.distance < lower + room:
        direction = [_fraction(x) for x in directions[best]]
        least = min(_dot(row, direction) for row in _exact_rows(vertices, query))
        square = _dot(direction, direction)
        if least > 0 and least**2 > Fraction(answer.distance) ** 2 * square:
            false.append("distance")
    if answer.radius > 0:
        if answer.distance != 0 or answer.lower != 0:
            false.append("inside, but not at distance 0")
        # The ball is meant in the coordinates in which the vertices and the query differ at all.
        varying = np.abs(rows).max(axis=0) > 0
        normals = np.concatenate([facets, np.asarray(residuals, np.float64)]) * varying
        normals = normals[np.abs(normals).max(axis=1) > 0].astype(LONG)
        normals = normals / np.sqrt((normals**2).sum(axis=1, keepdims=True))
        reach = np.minimum((normals @ rows.T).max(axis=1), -(normals @ rows.T).min(axis=1))
        if reach.min(initial=np.inf) < answer.radius - room:
            false.append("interior radius")
    return Ruling(tuple(false), float(upper), max(float(lower), 0.0))


def _square(vector: np.ndarray) -> Any:
    return (vector * vector).sum()


def _fraction(number: Any) -> Fraction:
    return Fraction(*number.as_integer_ratio())


def _exact_rows(vertices: np.ndarray, query: np.ndarray) -> list[list[Fraction]]:
    center = [Fraction(x) for x in query.tolist()]
    return [
        [Fraction(x) - c for x, c in zip(row, center, strict=True)] for row in vertices.tolist()
    ]


def _exact_point(
    vertices: np.ndarray, query: np.ndarray, weights: np.ndarray
) -> tuple[list[Fraction], Fraction]:
    """Sum of weights times `v - q`, and of the weights, for the weights as they are stored."""
    active = np.flatnonzero(weights)
    shares = [_fraction(weights[i]) for i in active]
    rows = _exact_rows(vertices[active], query)
    point = [_dot(shares, column) for column in zip(*rows, strict=True)]
    return point, sum(shares, Fraction(0))


def _dot(left: Sequence[Fraction], right: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(left, right, strict=True)), Fraction(0))


def _facets(vertices: np.ndarray) -> np.ndarray:
    """Normals of all facets in three dimensions, of the axes in any."""
    axes = np.eye(vertices.shape[1])
    if vertices.shape[1] > 3:
        return axes
    from scipy.spatial import ConvexHull, QhullError

    try:
        scale = np.abs(vertices - vertices.mean(axis=0)).max(axis=0)
        hull = ConvexHull((vertices - vertices.mean(axis=0)) / np.where(scale > 0, scale, 1))
    except QhullError:
        return axes
    return np.concatenate([axes, hull.equations[:, :-1] / np.where(scale > 0, scale, 1)])


class Tally:
    """Counts of one kind of problem."""

    def __init__(self) -> None:
        self.problems = self.undecided = self.exceptions = 0
        self.certified = {1e-6: 0, 1e-9: 0}
        self.false: dict[str, int] = {}
        self.widths: list[float] = []
        self.statuses: dict[int, int] = {}

    def add(self, answer: _Answer, ruling: Ruling, verdict: int, wide: bool) -> None:
        """Count one problem; `wide` where its bracket is in float64."""
        self.problems += 1
        self.undecided += verdict == 0
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        for what in ruling.false:
            self.false[what] = self.false.get(what, 0) + 1
        if not wide:
            return
        if answer.distance == 0:
            width = 0.0
        else:
            ratio = answer.lower / answer.distance
            width = (1 - ratio) * (1 + ratio)
        self.widths.append(width)
        for tolerance in self.certified:
            self.certified[tolerance] += width <= tolerance

    def summary(self) -> dict[str, Any]:
        """Counts and shares; widths and shares of those whose bracket is in float64."""
        measured = max(len(self.widths), 1)
        decided = [width for width in self.widths if width < 1]
        return {
            "problems": self.problems,
            "false": dict(self.false),
            "certified_1e-6": self.certified[1e-6] / measured,
            "certified_1e-9": self.certified[1e-9] / measured,
            "undecided": self.undecided / max(self.problems, 1),
            "worst_width": max(decided, default=0.0),
            "statuses": {str(code): count for code, count in sorted(self.statuses.items())},
        }


def take_bounds_away() -> None:
    """Set every bound of a rounding error to zero, in the classic variants and the engine."""
    from hullgeo import certificate, enclosure, oracle

    certificate._gamma = lambda terms: 0.0  # type: ignore[assignment]
    enclosure.U64 = 0.0
    oracle._U32 = 0.0


class Ways(NamedTuple):
    """Ways of the engine that depend on the size of a hull or on the machine.

    Attributes:
      bfloat16: candidates are named in bfloat16, as where it is multiplied faster than float32.
      components: naming begins in half of the principal components, as for images.
      long_rows: one product scores all vertices, supports are in all dimensions from the start.
      many: passes go over a sample first, over chunks, and over nearby vertices, as of thousands.
    """

    bfloat16: bool
    components: bool
    long_rows: bool
    many: bool


def ways_of(seed: int) -> Ways:
    """Drawn for each seed; every shape of the first twenty meets both sides of each."""
    drawn = np.random.default_rng([seed, 2]).random(4) < (1 / 2, 1 / 2, 1 / 3, 1 / 2)
    return Ways(*drawn.tolist())


@contextmanager
def forced(ways: Ways) -> Iterator[None]:
    """Thresholds of the engine lowered, for hulls prepared and programs traced inside."""
    from hullgeo import oracle, prepare

    with ExitStack() as lowered:
        if ways.long_rows:
            lowered.enter_context(mock.patch.object(oracle, "_LONG", 0))
        if ways.many:
            small = {"_SMALLEST_NEARBY": 0, "_UNROLLED": 2, "_SLICES": (2, 2), "_LONG_SLICES": 2}
            lowered.enter_context(mock.patch.multiple(oracle, **small))
            lowered.enter_context(mock.patch.object(prepare, "_SMALLEST_SAMPLED", 32))
        yield


def prepared(vertices: np.ndarray, ways: Ways) -> Any:
    """A hull that goes these ways."""
    import hullgeo

    hull = hullgeo.prepare_hull(
        vertices,
        naming_dtype="bfloat16" if ways.bfloat16 else "float32",
        num_components=min(vertices.shape) // 2 if ways.components else 0,
    )
    return hull._replace(left_out=hull.left_out[:0]) if ways.long_rows else hull


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All kinds in turn, in at least so many problems."""
    import jax

    import hullgeo

    if options.mutate:
        take_bounds_away()
    kinds: list[str] = options.kinds
    tallies = {kind: Tally() for kind in kinds}
    offenders: list[dict[str, Any]] = []
    start, done = time.perf_counter(), 0
    rounds = -(-options.problems // (options.batch * len(kinds)))

    def programs(seed: int) -> tuple[int, Ways]:
        return hard_problems.program(seed), ways_of(seed)

    # All problems of the same programs in turn: a process can hold only so many.
    seeds = sorted(range(options.seed, options.seed + rounds), key=programs)
    part, parts = options.part
    seeds = seeds[len(seeds) * (part - 1) // parts : len(seeds) * part // parts]
    if not seeds:
        raise SystemExit(f"--part {part}/{parts} of {rounds} seeds is none: ask for fewer parts")
    for (_, ways), group in itertools.groupby(seeds, key=programs):
        jax.clear_caches()
        for seed, kind in itertools.product(group, kinds):
            batch = hard_problems.make(kind, seed, options.batch)
            with forced(ways):
                hull: Any = batch.vertices
                if options.variant == "fully_corrective":
                    hull = prepared(hull, ways)
                answer = hullgeo.project_to_hull(
                    batch.queries, hull, variant=options.variant, rtol=options.rtol,
                    max_steps=options.max_steps,
                )  # fmt: skip
            verdicts = np.asarray(hullgeo.membership(answer))
            answer = jax.device_get(answer)
            wide = answer.distance.dtype == np.float64
            for row, ruling in enumerate(judge(batch, answer)):
                one = _row(answer, row)
                tallies[kind].add(one, ruling, int(verdicts[row]), wide)
                if ruling.false:
                    place = {"kind": kind, "seed": seed, "row": row}
                    offenders.append(place | one._asdict() | ruling._asdict())
            done += options.batch
            if options.progress:
                false = sum(sum(tally.false.values()) for tally in tallies.values())
                print(
                    f"{done} problems, {false} false, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    jax.clear_caches()  # of programs traced with lowered thresholds
    return {
        "problems": done,
        "seconds": time.perf_counter() - start,
        "kinds": {kind: tally.summary() for kind, tally in tallies.items()},
        "offenders": offenders[:50],
    }


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """The outcome by kind, in Markdown."""
    lines = [
        "| kind | problems | false | certified at 1e-6 | at 1e-9 | undecided | worst width |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in kinds.items():
        false = ", ".join(f"{count} {what}" for what, count in found["false"].items()) or "none"
        shares = [found[key] for key in ("certified_1e-6", "certified_1e-9", "undecided")]
        cells = [kind, str(found["problems"]), false, *(f"{100 * share:.1f} %" for share in shares)]
        lines.append(f"| {' | '.join(cells)} | {found['worst_width']:.0e} |")
    return "\n".join(lines)


def _part(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part, parts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=64, help="queries of one hull")
    parser.add_argument("--variant", default="fully_corrective", choices=VARIANTS)
    parser.add_argument("--rtol", type=float, default=1e-9)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="one of N shares")
    parser.add_argument(
        "--kinds", nargs="+", default=list(hard_problems.KINDS), choices=hard_problems.KINDS
    )
    parser.add_argument("--mutate", action="store_true", help="without bounds of rounding errors")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = versions() | run(options)
    found["options"] = {key: str(value) for key, value in vars(options).items()}
    print(table(found["kinds"]))
    count = sum(sum(kind["false"].values()) for kind in found["kinds"].values())
    print(
        f"\n{found['problems']} problems in {found['seconds']:.0f} s, {count} false; "
        f"{options.variant}, jax {found['versions']['jax']}, {found['date']}"
    )
    for offender in found["offenders"][:5]:
        print(offender)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = options.out.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(options.out)
    return int((count > 0) != options.mutate)


if __name__ == "__main__":
    raise SystemExit(main())
