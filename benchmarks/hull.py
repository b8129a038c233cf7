"""Distance to a convex hull: `project_to_hull` against the best that users could pick instead.

    python -m benchmarks.hull --problems a b c d e r p --queries 256 --out results/hull.json

Per query, CPU time of one pinned core, float32 data, programs compiled beforehand, medians over
repeats for as long as a peer has. The rival is the fastest of DAQP, numpy Wolfe, quadprog and
scipy.nnls in their best formulations (`peers.py`), run in the same process on the same numbers in
float64; slow peers get fewer queries, as many as fit into `--peer-seconds`, and the table says how
many. One float64 referee outside all solvers recomputes every distance and gap from the returned
weights and checks that no bracket excludes what any solver reached.

Only ratios of one run count: times vary by half between runs on a shared machine, and within one.
So our own takes turns with the queries of every peer; ms/query and the ratio are of the turns with
the best one. Problems a to d take about a minute each, e, r and p ten; r and p need HULLGEO_DATA
(`problems.py`).

On an accelerator our times are wall times and batches should be large (`--queries 4096`); the
rivals stay on one core of its host.

Columns: floors = time over the time of one float32 pricing pass in its best layout; certified = all
that the caller asked for is proved; widest = widest bracket (upper^2 - lower^2) / upper^2 of the
same problem answered in float64; verdict = time and passes where only inside or outside is asked
for (`verdict_only`); both cores = wall time of a fresh process that is not pinned, and
that process' peak memory above its memory before the first call; one = one query alone.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import peers, problems

# Read by numpy's BLAS when it is imported; JAX follows the affinity instead.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
TURNS = 5  # that our own solver takes between the queries of each peer
VARIANTS = ("fully_corrective", "blended_pairwise", "pairwise", "away", "vanilla")


class Judgement(NamedTuple):
    """What the referee finds about one answer, in float64.

    Attributes:
      upper: distance of the point of the weights.
      lower: best bound from the direction to that point, 0 if there is none.
      gap: Frank-Wolfe gap over the squared distance.
      support: number of positive weights.
    """

    upper: float
    lower: float
    gap: float
    support: int


def judge(
    vertices: np.ndarray, queries: np.ndarray, answers: Sequence[peers.Answer]
) -> list[Judgement]:
    """Recompute distance, bound and gap of returned weights from the caller's numbers."""
    points = np.full((len(answers), vertices.shape[1]), np.nan)
    queries = queries[: len(answers)].astype(np.float64)
    for row, (index, weights) in enumerate(answers):
        weights = np.asarray(weights, np.float64)
        if np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0:
            gathered = vertices[np.asarray(index)].astype(np.float64) - queries[row]
            points[row] = weights / weights.sum() @ gathered
    score = np.full(len(answers), np.inf)
    for first in range(0, len(vertices), 4096):
        block = vertices[first : first + 4096].astype(np.float64)
        score = np.minimum(score, (block @ points.T).min(axis=0))
    score -= np.einsum("ij,ij->i", points, queries)
    return [
        _ruling(float(point @ point), float(least), int((np.asarray(weights) > 0).sum()))
        for point, least, (_, weights) in zip(points, score, answers, strict=True)
    ]


def _ruling(square: float, score: float, support: int) -> Judgement:
    """For the squared norm of a point less the query, and its least product with a vertex."""
    if np.isnan(square):
        return Judgement(np.inf, 0.0, np.inf, 0)
    if square == 0:
        return Judgement(0.0, 0.0, 0.0, support)
    upper = square**0.5
    return Judgement(upper, max(score / upper, 0.0), (square - score) / square, support)


def median_times(
    function: Callable[[], Any], repeats: int, seconds: float = 0.0
) -> tuple[float, float]:
    """Median CPU and wall time of a call that is repeated so often and so long at least."""
    times = []
    began = time.perf_counter()
    while len(times) < repeats or time.perf_counter() - began < seconds:
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = np.median(times, axis=0)
    return float(cpu), float(wall)


def _chosen(cpu: float, wall: float) -> float:
    """Of both times the one that counts here: on an accelerator the host only waits."""
    import jax

    return cpu if jax.default_backend() == "cpu" else wall


def make_ours(problem: problems.Problem, options: argparse.Namespace) -> Callable[..., Any]:
    """The call that is measured: queries to a finished projection."""
    import jax

    import hullgeo

    if options.variant == "fully_corrective":
        hull = hullgeo.prepare_hull(problem.vertices, naming_dtype=options.naming)
        vertices = jax.block_until_ready(hull)
    else:
        vertices = jax.numpy.asarray(problem.vertices)
    project = functools.partial(
        hullgeo.project_to_hull, vertices=vertices, variant=options.variant,
        max_steps=options.max_steps,
    )  # fmt: skip
    return lambda queries, rtol=options.rtol, **more: jax.block_until_ready(
        project(queries, rtol=rtol, **more)
    )


def measure_ours(problem: problems.Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Times of our projection, and its answers for the referee."""
    import jax

    start = time.process_time()
    ours = make_ours(problem, options)
    prepared = time.process_time()
    queries = jax.numpy.asarray(problem.queries)
    answer = ours(queries)
    first = time.process_time() - prepared
    cpu, wall = median_times(lambda: ours(queries), options.repeats, options.peer_seconds)
    single = jax.numpy.asarray(problem.queries[0])
    ours(single)
    _, one_wall = median_times(lambda: ours(single), max(20, options.repeats))
    wide = ours(problem.queries.astype(np.float64), 1e-9)
    upper, lower = np.asarray(wide.distance), np.asarray(wide.distance_lower_bound)
    width = (upper - lower) * (upper + lower) / np.maximum(upper, 1e-300) ** 2
    status = np.asarray(answer.status)
    count = len(problem.queries)
    verdict = {}
    if options.variant == "fully_corrective":
        verdict_only = functools.partial(ours, queries, verdict_only=True)
        verdict["verdict_passes"] = float(np.mean(verdict_only().num_steps))
        times = median_times(verdict_only, options.repeats, options.peer_seconds)
        verdict["verdict_ms"] = 1e3 * _chosen(*times) / count
    return verdict | {
        "ms": 1e3 * _chosen(cpu, wall) / count,
        "cpu_ms": 1e3 * cpu / count,
        "wall_ms": 1e3 * wall / count,
        "compile_s": first - cpu,
        "prepare_s": prepared - start,
        "one_ms": 1e3 * one_wall,
        "floors": _chosen(cpu, wall) / pricing_pass(problem, options.repeats),
        "passes_mean": float(np.mean(answer.num_steps)),
        "passes_max": int(np.max(answer.num_steps)),
        "certified": float(np.mean(status == 0)),
        "certified_1e-9": float(np.mean(np.asarray(wide.status) == 0)),
        "statuses": {str(code): int((status == code).sum()) for code in np.unique(status)},
        "widest": float(width.max()),
        "answer": jax.device_get(answer),
        "again": lambda: _chosen(*median_times(lambda: ours(queries), 1)) / count,
    }


def pricing_pass(problem: problems.Problem, repeats: int) -> float:
    """Time of one float32 product of all vertices and queries with a minimum, best layout."""
    import jax
    import jax.numpy as jnp

    vertices, directions = jnp.asarray(problem.vertices), jnp.asarray(problem.queries)
    blocks = [vertices[start : start + 8192] for start in range(0, len(vertices), 8192)]
    layouts = [
        lambda v, _, r: jnp.min(v @ r.T, axis=0),
        lambda v, _, r: jnp.min(r @ v.T, axis=1),
        lambda _, b, r: functools.reduce(
            jnp.minimum, [jnp.min(block @ r.T, axis=0) for block in b]
        ),
    ]
    best = np.inf
    for layout in layouts:
        call = functools.partial(jax.jit(layout), vertices, blocks, directions)
        jax.block_until_ready(call())
        times = median_times(lambda call=call: jax.block_until_ready(call()), repeats)
        best = min(best, _chosen(*times))
    return best


def measure_peer(
    peer: peers.Peer, problem: problems.Problem, seconds: float, ours: Callable[[], float]
) -> tuple[dict[str, Any], list[peers.Answer]]:
    """Time per query of a peer on as many of the first queries as fit into the seconds.

    `ours`, the time per query of our own, is asked for in turn with the peer's queries: what else
    the machine does slows both.
    """
    turns: list[float] = []
    vertices, queries = problem.vertices.astype(np.float64), problem.queries.astype(np.float64)
    if reason := peer.missing():
        return {"name": peer.name, "skipped": reason}, []
    if vertices.size > peer.largest:
        return {"name": peer.name, "skipped": f"more than {peer.largest:.0e} entries"}, []
    try:
        solve = peer.make(vertices)
        if peer.batched:
            batch = queries[:4]
            solve(batch)
            turns.append(ours())
            start = time.process_time()
            answers = solve(batch)
            times = [(time.process_time() - start) / len(batch)]
        else:
            solve(queries[0])
            answers, times = [], []
            while len(answers) < len(queries) and sum(times) < seconds:
                done = max(sum(times) / seconds, len(answers) / len(queries))
                if done >= len(turns) / TURNS:
                    turns.append(ours())
                start = time.process_time()
                answers.append(solve(queries[len(answers)]))
                times.append(time.process_time() - start)
    except Exception as error:
        return {"name": peer.name, "skipped": f"{type(error).__name__}: {error}"[:200]}, []
    found = {
        "name": peer.name,
        "rival": peer.rival,
        "cpu_ms": 1e3 * float(np.mean(times)),
        "median_ms": 1e3 * float(np.median(times)),
        "ours_ms": 1e3 * float(np.median(turns)),
        "queries": len(answers),
    }
    return found, answers


def run_problem(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: ours, the peers, and the referee over all."""
    problem = problems.load(name, options.queries)
    row: dict[str, Any] = {
        "problem": name,
        "shape": list(problem.vertices.shape),
        "queries": len(problem.queries),
    }
    row |= measure_ours(problem, options)
    answer, ours = row.pop("answer"), row.pop("again")
    size = float(np.abs(problem.vertices).max() * problem.vertices.shape[1] ** 0.5)
    weighted = [
        (support[weights > 0], weights[weights > 0])
        for support, weights in zip(answer.support, answer.weights, strict=True)
    ]
    judged = judge(problem.vertices, problem.queries, weighted)
    row["support_mean"] = float(np.mean([one.support for one in judged]))
    row["support_max"] = max(one.support for one in judged)
    row["gap_max"] = max(one.gap for one in judged)
    least = np.array([one.upper for one in judged])
    bound = np.array([one.lower for one in judged])

    row["peers"] = []
    for peer in peers.PEERS:
        if options.peers and peer.name.split(",")[0] not in options.peers:
            continue
        found, answers = measure_peer(peer, problem, options.peer_seconds, ours)
        rulings = judge(problem.vertices, problem.queries, answers)
        if rulings:
            found["gap_max"] = max(ruling.gap for ruling in rulings)
            found["gap_median"] = float(np.median([ruling.gap for ruling in rulings]))
        for place, ruling in enumerate(rulings):
            least[place] = min(least[place], ruling.upper)
            bound[place] = max(bound[place], ruling.lower)
        row["peers"].append(found)
        print(f"  {name}: {describe_peer(found)}", flush=True)

    rounding = 1e-14 * size
    false = (answer.distance_lower_bound > least + rounding) | (answer.distance < bound - rounding)
    row["false_brackets"] = int(false.sum())
    # A rival is an exact solver: one that missed the tolerance does not count.
    fast = [
        one for one in row["peers"] if one.get("rival") and one.get("gap_max", 1) <= options.rtol
    ]
    if fast:
        best = min(fast, key=lambda one: one["cpu_ms"])
        row |= {"best_peer": best["name"], "best_peer_ms": best["cpu_ms"], "ms": best["ours_ms"]}
        row["ratio"] = best["cpu_ms"] / row["ms"]
    if options.wall:
        row |= run_apart(name, options)
    return row


def run_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Wall time on all cores and peak memory, in a fresh process that is not pinned."""
    command = [sys.executable, "-m", "benchmarks.hull", "--apart", "--problems", name]
    for key in ("queries", "variant", "rtol", "max_steps", "repeats"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    command += ["--naming", options.naming] if options.naming else []
    command += ["--cores", *map(str, options.cores)]
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        return {"apart_failed": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the fresh process of `run_apart` does."""
    os.sched_setaffinity(0, options.cores)
    import jax

    problem = problems.load(name, options.queries)
    ours = make_ours(problem, options)
    queries = jax.numpy.asarray(problem.queries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(queries)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, wall = median_times(lambda: ours(queries), options.repeats)
    return {
        "both_cores_ms": 1e3 * wall / len(problem.queries),
        "peak_mb": (peak - before) / 1024,
        "data_mb": problem.vertices.nbytes / 2**20,
    }


def describe_peer(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"{found['name']}: skipped, {found['skipped']}"
    return (
        f"{found['name']}: {found['cpu_ms']:.3g} ms a query over {found['queries']} queries, "
        f"relative gap {found['gap_median']:.0e} median, {found['gap_max']:.0e} at most"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    columns = {
        "": lambda r: r["problem"],
        "n x d": lambda r: " x ".join(map(str, r["shape"])),
        "queries": lambda r: r["queries"],
        "ms/query": lambda r: f"{r['ms']:.3g}",
        "best peer": lambda r: f"{r['best_peer']} {r['best_peer_ms']:.3g}",
        "ratio": lambda r: f"**{r['ratio']:.3g}**",
        "floors": lambda r: f"{r['floors']:.3g}",
        "passes": lambda r: f"{r['passes_mean']:.1f} / {r['passes_max']}",
        "verdict ms": lambda r: f"{r['verdict_ms']:.3g} ({r['verdict_passes']:.1f})",
        "support": lambda r: f"{r['support_mean']:.0f} / {r['support_max']}",
        "certified": lambda r: f"{100 * r['certified']:.4g} %",
        "at 1e-9": lambda r: f"{100 * r['certified_1e-9']:.4g} %",
        "widest": lambda r: f"{r['widest']:.0e}",
        "false": lambda r: r["false_brackets"],
        "compile s": lambda r: f"{r['compile_s']:.1f}",
        "peak MB (data)": lambda r: f"{r['peak_mb']:.0f} ({r['data_mb']:.0f})",
        "both cores ms": lambda r: f"{r['both_cores_ms']:.3g}",
        "one ms (DAQP)": lambda r: f"{r['one_ms']:.3g} ({_daqp(r):.3g})",
    }
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        cells = []
        for cell in columns.values():
            try:
                cells.append(str(cell(row)))
            except KeyError:
                cells.append("")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _daqp(row: dict[str, Any]) -> float:
    return {peer["name"]: peer.get("median_ms", np.nan) for peer in row["peers"]}["DAQP"]


def versions() -> dict[str, Any]:
    """What a number depends on: packages, processor, date."""
    import importlib.metadata

    import jax

    packages = "jax", "numpy", "scipy", "daqp", "quadprog", "qpax", "clarabel", "osqp", "polytopax"
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {
        "versions": found,
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in named.get("flags", "")]
    return f"{named.get('model name', '')} ({', '.join(flags)})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=["a", "b", "c"], choices=problems.NAMES)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--variant", default="fully_corrective", choices=VARIANTS)
    parser.add_argument("--naming", choices=("float32", "bfloat16"), help="default: by measurement")
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-seconds", type=float, default=10.0, help="for each peer")
    parser.add_argument("--peers", nargs="*", help="names as in the table; default all")
    parser.add_argument("--no-wall", dest="wall", action="store_false", help="pinned core only")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    import jax

    options = parse(arguments)
    if options.apart:
        print(json.dumps(measure_apart(options.problems[0], options)))
        return []
    os.sched_setaffinity(0, {max(options.cores)})
    try:
        about = versions() | {"options": {key: str(x) for key, x in vars(options).items()}}
        if about["device"] != "cpu":
            os.sched_setaffinity(0, options.cores)
        print(json.dumps(about), flush=True)
        rows = []
        for name in options.problems:
            rows.append(run_problem(name, options))
            # Programs of seven problems take more memory maps than Linux grants a process.
            jax.clear_caches()
            print(table(rows[-1:]), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                unfinished = options.out.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(about | {"rows": rows}, indent=1))
                unfinished.replace(options.out)
    finally:
        os.sched_setaffinity(0, options.cores)
    shown = about["versions"]
    places = f"{about['device']}, {about['processor']}"
    print(f"\njax {shown['jax']}, Python {shown['python']}, {places}, {about['date']}")
    print(table(rows))
    return rows


if __name__ == "__main__":
    if not ONE_THREAD.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.hull", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ONE_THREAD)
    if "--apart" not in sys.argv:
        import jax

        # On one core a thread that only waits for another takes time from it.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    main()
