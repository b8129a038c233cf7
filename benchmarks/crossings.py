"""Crossings along segments between CIFAR-10 test images, through two published networks.

    HULLGEO_DATA=<folder> python -m benchmarks.crossings --out results/crossings.jsonl

Evaluations: `find_crossing` against bisection to the same width, on the same 200 segments.

Proofs: `trace_segment(..., proof=True)` on `--resnet2b` and `--resnet20` segments, and with images
in float64 on `--float64` segments of each, against 20, 100, 1,000 and 20,000 equidistant samples:
how many changes of class they miss, what either takes, and whether any sample contradicts a proof
(a class other than the proved one, farther than 1e-5 from a crossing, since float32 evaluation
moves it by about 1e-6). Programs are compiled beforehand, on a segment that is not counted. Times
are CPU seconds of the whole process beside wall seconds, since a shared machine stretches those.

One line a segment is appended to `--out`; a run that was stopped goes on where it was. About three
CPU minutes a segment of ResNet-20, one second for ResNet-2b. `--summary` prints the tables of
`docs/lines.md` from the file.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import data, networks
from hullgeo import Proof, Status, find_crossing, trace_segment

SAMPLES = (20, 100, 1000, 20000)
NETWORKS = ("resnet2b", "resnet20")
Network = Callable[[Any], Any]


def load(name: str) -> Network:
    if name == "resnet20":
        module, variables = networks.resnet20_linen(data.published_weights("resnet20_cifar10"))
        return lambda x: module.apply(variables, x, train=False)
    module, variables = networks.resnet2b_linen(data.published_weights("crown_resnet2b"))
    return lambda x: module.apply(variables, x)


def pairs(images: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Disjoint pairs of images, the same every time; the first `count` of a fixed order."""
    order = np.random.default_rng(0).permutation(len(images)).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in order[:count]]


def measured(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = jax.block_until_ready(function())
    seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return result, seconds


def bisection(function: Network, start: np.ndarray, end: np.ndarray, width: float) -> int:
    """Evaluations of bisection for one crossing on each segment, the two ends included."""
    classes = jax.jit(lambda x: function(x).argmax(-1))
    lower, upper = np.zeros(len(start), np.float32), np.ones(len(start), np.float32)
    first, steps = np.asarray(classes(start)), 2
    while (upper - lower).max() > width:
        middle = (lower + upper) / 2
        share = middle[:, None, None, None]
        before = np.asarray(classes((1 - share) * start + share * end)) == first
        lower, upper = np.where(before, middle, lower), np.where(before, upper, middle)
        steps += 1
    return steps


def evaluations(name: str, function: Network, images: np.ndarray) -> dict[str, Any]:
    chosen = np.asarray(pairs(images, 200))
    start, end = images[chosen[:, 0]], images[chosen[:, 1]]
    found = find_crossing(function, start, end)
    crossed = np.asarray(found.status) == Status.CONVERGED
    count = np.asarray(found.num_evaluations)[crossed]
    return {
        "kind": "evaluations",
        "network": name,
        "segments": int(crossed.sum()),
        "mean": float(count.mean()),
        "median": float(np.median(count)),
        "most": int(count.max()),
        "within_12": float((count <= 12).mean()),
        "widest": float(np.asarray(found.upper - found.lower)[crossed].max()),
        "bisection": bisection(function, start[crossed], end[crossed], 1e-6),
    }


def sampled(
    function: Callable[..., Any], start: np.ndarray, end: np.ndarray, count: int
) -> np.ndarray:
    """Classes at equidistant positions."""
    where = np.linspace(0, 1, count, dtype=np.float32)
    labels = []
    for begin in range(0, count, 200):
        some = np.pad(where[begin : begin + 200], (0, max(0, begin + 200 - count)), mode="edge")
        labels.append(np.asarray(function(start, end, some))[: count - begin])
    return np.concatenate(labels)


def contradictions(trace: Any, labels: np.ndarray) -> int:
    where = np.linspace(0, 1, len(labels), dtype=np.float32)
    count = int(trace.num_crossings[0])
    lower, upper = np.asarray(trace.lower[0, :count]), np.asarray(trace.upper[0, :count])
    before, after = np.searchsorted(lower - 1e-5, where), np.searchsorted(upper + 1e-5, where)
    clear = before == after
    return int((labels != np.asarray(trace.classes[0])[after])[clear].sum())


def segment(
    name: str, function: Network, classes: Callable[..., Any], pair: Any, images: Any, dtype: Any
):
    start, end = (images[[row]].astype(dtype) for row in pair)
    trace, seconds = measured(lambda: trace_segment(function, start, end, proof=True))
    row = {
        "kind": "proof",
        "network": name,
        "dtype": np.dtype(dtype).name,
        "pair": pair,
        "seconds": seconds,
        "crossings": int(trace.num_crossings[0]),
        "pieces": int(trace.num_pieces[0]),
        "proof": Proof(int(trace.proof[0])).name,
        "slack": float(trace.slack[0]),
        "status": Status(int(trace.status[0])).name,
        "widest": float(np.asarray(trace.upper - trace.lower).max(initial=0)),
        "shortest_stay": float(np.diff(trace.lower[0]).min(initial=1)),
        "margin": float(np.asarray(trace.margin).min()),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "samples": {},
    }
    if np.dtype(dtype) == np.float32:
        for count in SAMPLES:
            labels, seconds = measured(lambda n=count: sampled(classes, start[0], end[0], n))
            row["samples"][str(count)] = {
                "seconds": seconds,
                "missed": row["crossings"] - int((labels[1:] != labels[:-1]).sum()),
                "contradictions": contradictions(trace, labels),
            }
    return row


def run(arguments: argparse.Namespace) -> None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(arguments.out) if arguments.out.exists() else []
    finished = {
        (row["kind"], row["network"], row.get("dtype"), str(row.get("pair"))) for row in done
    }
    images = data.cifar10("test", lossless_only=True).images[:1000]
    jax.config.update("jax_enable_x64", True)

    def save(row):
        row |= {"jax": jax.__version__, "machine": platform.processor() or platform.machine()}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: row[key] for key in list(row)[:9]}), flush=True)

    for name in NETWORKS:
        function = load(name)
        if ("evaluations", name, None, "None") not in finished:
            save(evaluations(name, function, images))
        one = lambda start, end, share, f=function: f(  # noqa: E731
            (1 - share[:, None, None, None]) * start[None] + share[:, None, None, None] * end[None]
        ).argmax(-1)
        classes = jax.jit(one)
        for dtype, count in (
            (np.float32, getattr(arguments, name)),
            (np.float64, arguments.float64),
        ):
            kind = np.dtype(dtype).name
            left = [
                pair
                for pair in pairs(images, count)
                if ("proof", name, kind, str(list(pair))) not in finished
            ]
            if left:  # compile on a short piece of another segment
                start, end = images[[left[0][1]]], images[[left[0][0]]]
                end = start + np.float32(0.01) * (end - start)
                trace_segment(function, start.astype(dtype), end.astype(dtype), proof=True)
                sampled(classes, start[0], end[0], 20)
            for pair in left:
                save(segment(name, function, classes, list(pair), images, dtype))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(values: list[float], form: str = "{:,.3g}") -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return " / ".join(form.format(value) for value in (low, middle, high))


def summary(rows: list[dict[str, Any]]) -> None:
    print("| network | segments that cross | mean | median | most | bisection | widest |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if row["kind"] == "evaluations":
            print(
                f"| {row['network']} | {row['segments']} | {row['mean']:.2f} | {row['median']:.0f} "
                f"| {row['most']} | {row['bisection']} | {row['widest']:.1e} |"
            )
    print()
    print(
        "| network, images | segments | crossings | pieces | CPU s | wall s | proof | slack |",
        end="",
    )
    print(" not proved | contradictions | peak GB |")
    print("| --- " * 11 + "|")
    proofs = [row for row in rows if row["kind"] == "proof"]
    groups = dict.fromkeys((row["network"], row["dtype"]) for row in proofs)
    chosen = {
        group: [row for row in proofs if (row["network"], row["dtype"]) == group]
        for group in groups
    }
    for (name, dtype), some in chosen.items():
        checks = [check for row in some for check in row["samples"].values()]
        contradicted = sum(check["contradictions"] for check in checks) if checks else "-"
        print(
            f"| {name}, {dtype} | {len(some)} | {sum(row['crossings'] for row in some)} "
            f"| {spread([row['pieces'] for row in some], '{:,.0f}')} "
            f"| {spread([row['seconds']['cpu'] for row in some])} "
            f"| {spread([row['seconds']['wall'] for row in some])} "
            f"| {', '.join(sorted({row['proof'] for row in some}))} "
            f"| {max(row['slack'] for row in some):.1e} "
            f"| {sum(row['status'] != 'CONVERGED' for row in some)} | {contradicted} "
            f"| {max(row['peak_gb'] for row in some):.2f} |"
        )
    print()
    print(
        "| network | crossings | samples | missed | in segments | CPU s a segment | proof CPU s |"
    )
    print("| --- " * 7 + "|")
    for (name, dtype), some in chosen.items():
        for count in SAMPLES if dtype == "float32" else ():
            checks = [row["samples"][str(count)] for row in some]
            print(
                f"| {name} | {sum(row['crossings'] for row in some)} | {count:,} "
                f"| {sum(check['missed'] for check in checks)} "
                f"| {sum(check['missed'] > 0 for check in checks)} "
                f"| {np.median([check['seconds']['cpu'] for check in checks]):.3g} "
                f"| {np.median([row['seconds']['cpu'] for row in some]):.3g} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/crossings.jsonl"))
    parser.add_argument("--resnet2b", type=int, default=300, help="segments")
    parser.add_argument("--resnet20", type=int, default=20, help="segments")
    parser.add_argument("--float64", type=int, default=1, help="segments with images in float64")
    parser.add_argument("--summary", action="store_true", help="print tables, compute nothing")
    arguments = parser.parse_args()
    if not arguments.summary:
        run(arguments)
    summary(read(arguments.out))


if __name__ == "__main__":
    main()
