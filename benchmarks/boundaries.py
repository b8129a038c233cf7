"""Nearest boundary points and ties against quadratic-programming solvers called in a loop.

    python -m benchmarks.boundaries --out results/boundaries.json

Nearest boundary: `--queries` (10,000) random features of 64 dimensions, a head of ten classes, the
box between 0 and 0.9 of each unit's maximum; every solver is asked for the nearest point of the box
at which another class takes over. Peers solve one quadratic program for each of the nine rivals,
as their users would: DAQP (dual active set, the best one known for such problems; also with the
rivals pruned by their planes, as we do), quadprog (Goldfarb and Idnani) and scipy's SLSQP, on as
many queries as fit into their time. Ties: the nearest point of the box at which a set of classes
ties, for random sets, DAQP in a loop.

All run in one process on the same problems; compiling is timed apart. A referee in float64 judges
every answer: the point clipped to the box, how far the rival is from leading there, relative to the
size of the logits, and the distance against the best of all solvers. Times are wall seconds, the
median of five runs for ours and one pass for the loops; run it on one core by
`taskset -c 1 python -m benchmarks.boundaries`. About ten minutes, most of it in the peers.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import daqp
import jax
import jax.numpy as jnp
import numpy as np
import quadprog
import scipy.optimize

from hullgeo import LinearHead, nearest_boundary_point, tie_point

DIM, CLASSES = 64, 10
SOLVERS = ("daqp", "daqp pruned", "quadprog", "slsqp")


class Problem(NamedTuple):
    """Features in a box, kernel and bias of a head, and the sides of the box."""

    features: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @property
    def head(self) -> LinearHead:
        """As hullgeo takes it."""
        return LinearHead(jnp.asarray(self.kernel), jnp.asarray(self.bias))


def problem(num_queries: int, seed: int = 0) -> Problem:
    """Nonnegative features, a quarter of them 0, whose nearest boundary points meet the box."""
    rng = np.random.default_rng(seed)
    features = np.maximum(rng.normal(0.7, 1.0, size=(num_queries, DIM)), 0.0)
    kernel = rng.normal(size=(DIM, CLASSES)) / np.sqrt(DIM)
    bias = 0.1 * rng.normal(size=CLASSES)
    upper = 0.9 * features.max(axis=0)
    return Problem(np.minimum(features, upper), kernel, bias, np.zeros(DIM), upper)


def conditions(given: Problem, row: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Label; of each rival the unit normal and offset in `normal x >= offset`, and |q - plane|."""
    logits = given.features[row] @ given.kernel + given.bias
    label = int(logits.argmax())
    normals = (given.kernel - given.kernel[:, [label]]).T
    lengths = np.linalg.norm(normals, axis=1)
    lengths[label] = 1.0
    offsets = (given.bias[label] - given.bias) / lengths
    planes = (logits[label] - logits) / lengths
    planes[label] = np.inf
    return label, normals / lengths[:, None], offsets, planes


def by_daqp(query, normal, offset, given):
    point, _, flag, _ = daqp.solve(
        np.eye(DIM), -query, normal[None].copy(), np.append(given.upper, 1e30),
        np.append(given.lower, offset),
    )  # fmt: skip
    return point if flag > 0 else None


def by_quadprog(query, normal, offset, given):
    matrix = np.column_stack([normal, np.eye(DIM), -np.eye(DIM)])
    right = np.concatenate([[offset], given.lower, -given.upper])
    try:
        return quadprog.solve_qp(np.eye(DIM), query, matrix, right)[0]
    except ValueError:
        return None


def by_slsqp(query, normal, offset, given):
    found = scipy.optimize.minimize(
        lambda x: 0.5 * np.sum((x - query) ** 2), query, jac=lambda x: x - query, method="SLSQP",
        bounds=scipy.optimize.Bounds(given.lower, given.upper),
        constraints={"type": "ineq", "fun": lambda x: normal @ x - offset, "jac": lambda x: normal},
        options={"ftol": 1e-12, "maxiter": 200},
    )  # fmt: skip
    return found.x if found.success else None


QP = {"daqp": by_daqp, "daqp pruned": by_daqp, "quadprog": by_quadprog, "slsqp": by_slsqp}


def nearest_in_loop(name: str, given: Problem, rows: range) -> list[tuple[np.ndarray, int]]:
    """Nearest point and rival of each query, one quadratic program after the other."""
    answers = []
    for row in rows:
        query = given.features[row]
        _, normals, offsets, planes = conditions(given, row)
        best, point, at = np.inf, np.full(DIM, np.nan), -1
        for rival in np.argsort(planes)[: CLASSES - 1]:
            if name == "daqp pruned" and planes[rival] >= best:
                break
            found = QP[name](query, normals[rival], offsets[rival], given)
            distance = np.inf if found is None else float(np.linalg.norm(found - query))
            if distance < best:
                best, point, at = distance, found, int(rival)
        answers.append((point, at))
    return answers


def judge(given: Problem, row: int, point: np.ndarray, tied: list[int]) -> tuple[float, float]:
    """Distance of the point after clipping, and how far its logits are from the tie asked for."""
    if not np.isfinite(point).all():
        return np.inf, np.inf
    wide = np.clip(point, given.lower, given.upper).astype(np.longdouble)
    logits = wide @ given.kernel.astype(np.longdouble) + given.bias
    label = int((given.features[row] @ given.kernel + given.bias).argmax())
    size = float(np.abs(logits).max())
    if len(tied) == 1:  # the rival leads the label
        miss = max(float(logits[label] - logits[tied[0]]), 0.0)
    else:
        miss = float(logits.max() - logits[tied].min())
    return float(np.linalg.norm(np.asarray(wide - given.features[row], np.float64))), miss / size


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def ours(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """The answer, seconds of the first call, and the median of five more."""
    result, first = timed(function)
    return result, first, float(np.median([timed(function)[1] for _ in range(5)]))


def nearest(num_queries: int, counts: dict[str, int]) -> list[dict[str, Any]]:
    given = problem(num_queries)
    head = given.head
    found, first, median = ours(
        lambda: nearest_boundary_point(given.features, head, lower=given.lower, upper=given.upper)
    )
    points, rivals = np.asarray(found.point), np.asarray(found.rival)
    answers = {"hullgeo": [(points[row], int(rivals[row])) for row in range(num_queries)]}
    seconds = {"hullgeo": median / num_queries}
    for name, count in counts.items():
        rows = range(min(count, num_queries))
        answers[name], took = timed(lambda name=name, rows=rows: nearest_in_loop(name, given, rows))
        seconds[name] = took / len(rows)
    lower = np.asarray(found.distance_lower_bound)
    upper = np.asarray(found.distance)
    rows = []
    for name, list_ in answers.items():
        judged = [judge(given, row, point, [rival]) for row, (point, rival) in enumerate(list_)]
        distance, miss = np.asarray(judged).T
        # Above 0: this answer is farther than the proved lower bound of the nearest.
        excess = distance / lower[: len(distance)] - 1
        rows.append({
            "task": "nearest boundary", "solver": name, "queries": len(list_),
            "seconds_per_query": seconds[name], "first_call": first if name == "hullgeo" else None,
            "ratio": seconds[name] / seconds["hullgeo"], "worst_miss": float(miss.max()),
            "worst_excess": float(excess.max()), "least_excess": float(excess.min()),
            "bracket": float(((upper - lower) / upper).max()),
        })  # fmt: skip
    return rows


def tie_by_daqp(given: Problem, row: int, members: np.ndarray) -> np.ndarray:
    first = int(np.flatnonzero(members)[0])
    others = np.delete(np.arange(CLASSES), first)
    kernel, bias = given.kernel, given.bias
    normals = (kernel[:, [first]] - kernel[:, others]).T
    lengths = np.linalg.norm(normals, axis=1)
    low = (bias[others] - bias[first]) / lengths
    high = np.where(members[others], low, 1e30)
    sense = np.append(np.zeros(DIM), np.where(members[others], 5, 0)).astype(np.int32)
    point, _, flag, _ = daqp.solve(
        np.eye(DIM), -given.features[row], normals / lengths[:, None],
        np.append(given.upper, high), np.append(given.lower, low), sense,
    )  # fmt: skip
    return point if flag > 0 else np.full(DIM, np.nan)


def ties(num_queries: int, count: int) -> list[dict[str, Any]]:
    given = problem(num_queries, seed=1)
    head = given.head
    rng = np.random.default_rng(2)
    sizes = rng.integers(2, 6, size=num_queries)
    sets = np.argsort(np.argsort(rng.uniform(size=(num_queries, CLASSES)))) < sizes[:, None]
    found, first, median = ours(
        lambda: tie_point(given.features, head, sets, lower=given.lower, upper=given.upper)
    )
    points = np.asarray(found.point)
    rows = range(min(count, num_queries))
    loop, took = timed(lambda: [tie_by_daqp(given, row, sets[row]) for row in rows])
    lower, upper = np.asarray(found.distance_lower_bound), np.asarray(found.distance)
    answers = {"hullgeo": (list(points), median / num_queries), "daqp": (loop, took / len(rows))}
    table = []
    for name, (list_, seconds) in answers.items():
        judged = [
            judge(given, row, point, np.flatnonzero(sets[row]).tolist())
            for row, point in enumerate(list_)
        ]
        distance, miss = np.asarray(judged).T
        excess = distance / lower[: len(distance)] - 1
        table.append({
            "task": "tie", "solver": name, "queries": len(list_), "seconds_per_query": seconds,
            "first_call": first if name == "hullgeo" else None,
            "ratio": seconds / answers["hullgeo"][1], "worst_miss": float(miss.max()),
            "worst_excess": float(excess.max()), "least_excess": float(excess.min()),
            "bracket": float(((upper - lower) / upper).max()),
        })  # fmt: skip
    return table


def summary(rows: list[dict[str, Any]]) -> str:
    """The table of `docs/boundaries.md`."""
    lines = [
        "| task | solver | queries | µs a query | against ours | tie missed by at most "
        "| farther than proved, at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['task']} | {row['solver']} | {row['queries']:,} "
        f"| {1e6 * row['seconds_per_query']:,.1f} | {row['ratio']:,.1f}x "
        f"| {row['worst_miss']:.0e} | {row['worst_excess']:.0e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/boundaries.json"))
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--ties", type=int, default=2_000)
    parser.add_argument("--counts", type=int, nargs=len(SOLVERS), default=(2000, 10_000, 500, 20),
                        help=f"queries for each of {', '.join(SOLVERS)}")  # fmt: skip
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = nearest(arguments.queries, dict(zip(SOLVERS, arguments.counts, strict=True)))
    rows += ties(arguments.ties, arguments.ties)
    packages = ("jax", "numpy", "scipy", "daqp", "quadprog")
    about = {name: metadata.version(name) for name in packages}
    about |= {"python": platform.python_version(), "machine": platform.machine()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(summary(rows))
    print(about)


if __name__ == "__main__":
    main()
