"""Nearest flips against other libraries' attacks, and inversion, on published CIFAR-10 networks.

    HULLGEO_DATA=... python -m benchmarks.pixels --out results --peers-python VENV/bin/python

The peers are those of AdvLib, foolbox, torchattacks and ART, run by `pixel_peers.py` with a Python
that has torch and adv-lib, and the others as far as they are installed (without `--peers-python`
all are left out). The images are the first correctly classified lossless test images. Budgets count
gradients per image. Success is checked on the returned arrays, in one batch and image by image, and
failures count as infinite; the best of all methods in the run is the reference of the ratios.
Answers are kept in `--out` as they come, and a run that was stopped goes on with those of the same
images. docs/pixels.md has the numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hullgeo
from experiments import data, networks

PEERS = (
    "DDN:100", "FMN:100", "ALMA:100", "DDN:300", "FMN:300", "ALMA:300", "DeepFool:50",
    "foolbox DDN:100", "foolbox FMN:100", "foolbox DeepFool:50", "foolbox-jax DDN:100",
    "torchattacks CW:100", "torchattacks DeepFool:50", "ART DeepFool:50", "ART CW:10",
)  # fmt: skip
TIMED_PEERS = ("DDN:100", "foolbox DDN:100", "foolbox-jax DDN:100")
CROWN_PEERS = ("DDN:100", "FMN:100", "ALMA:100", "DDN:300", "ALMA:300", "FAB:100")
OURS = {
    "hullgeo 100": {"budget": 100},
    "hullgeo 300": {"budget": 300},
    "hullgeo 300, 5 rivals": {"budget": 300, "num_rivals": 5},
    "hullgeo 300, 2 starts": {"budget": 300, "num_starts": 2},
}
PARTS = ("flips", "crown", "inversions", "throughput")
BLOCK = 5  # images inverted at once: the batch waits for its slowest row
MAKERS = {
    "resnet20_cifar10": networks.resnet20_linen,
    "crown_resnet2b": networks.resnet2b_linen,
}


def correct_images(classifier, count):
    images, labels = data.cifar10("test", lossless_only=True)
    images, labels = images[: 2 * count + 50], labels[: 2 * count + 50]
    right = np.asarray(jax.jit(classifier)(images)).argmax(1) == labels
    return images[right][:count], labels[right][:count]


def lower_median(values):
    return np.sort(values)[(len(values) - 1) // 2]


def referee(logits_fn, images, labels, found):
    """Distance of each answer, infinite unless it is a flip in the batch and alone, in bounds."""
    found = np.asarray(found)
    batch = np.asarray(logits_fn(found)).argmax(1)
    alone = np.array([int(np.asarray(logits_fn(image[None])).argmax()) for image in found])
    inside = (found >= 0).all((1, 2, 3)) & (found <= 1).all((1, 2, 3))
    distance = np.linalg.norm((found.astype(float) - images).reshape(len(images), -1), axis=1)
    return np.where((batch != labels) & (alone != labels) & inside, distance, np.inf)


def ask_peers(python, network, images, labels, names, out):
    """Answers and spent passes of the peers, by name; of those that are installed."""
    if not python:
        return {}
    out.mkdir(exist_ok=True)
    np.savez(out / f"images_{network}.npz", images=images, labels=labels)
    weights = Path(os.environ["HULLGEO_DATA"]) / f"{network}.npz"
    script = Path(__file__).with_name("pixel_peers.py")
    paths = [out / f"images_{network}.npz", weights, network, out / f"peers_{network}.npz"]
    command = [python, str(script), *map(str, paths), *names]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    print(done.stdout.strip(), flush=True)
    with np.load(paths[-1]) as stored:
        there = [name for name in names if f"{name}/images" in stored]
        return {name: (stored[f"{name}/images"], stored[f"{name}/spent"]) for name in there}


def flips(network, count, peers_python, out):
    module, variables = MAKERS[network](data.published_weights(network))
    images = data.cifar10("test").images[:8]
    classifier = hullgeo.from_linen(module, variables, images)
    logits_fn = jax.jit(classifier)
    images, labels = correct_images(classifier, count)
    rows, arrays = {}, {"images": images, "labels": labels}
    for name, options in OURS.items():
        search = partial(hullgeo.nearest_flip, classifier, images, **options)
        flip, seconds = kept(out / f"{network} {name}.npz", images, search)
        distance = referee(logits_fn, images, labels, flip.image)
        before = [int(np.asarray(logits_fn(image[None])).argmax()) for image in flip.image_before]
        width = 1 - flip.distance_before / flip.distance
        rows[name] = {
            "gradients": int(flip.num_gradients[0]),
            "forwards": int(flip.num_evaluations[0]),
            "seconds": float(seconds) / count,
            "confirmed": float(np.mean((flip.status == 0) & (np.array(before) == labels))),
            "bracket_median": float(np.median(width)),
            "bracket_largest": float(width.max()),
            "cosine_median": float(np.median(np.sqrt(1 - flip.kkt_residual**2))),
            "cosine_5_percent": float(np.quantile(np.sqrt(1 - flip.kkt_residual**2), 0.05)),
        }
        arrays |= {f"{name}/{field}": value for field, value in flip._asdict().items()}
        arrays[f"{name}/referee"] = distance
        summary(name, distance, rows[name])
    names = PEERS if network == "resnet20_cifar10" else CROWN_PEERS
    for name, (found, spent) in ask_peers(
        peers_python, network, images, labels, names, out
    ).items():
        distance = referee(logits_fn, images, labels, found)
        arrays[f"{name}/referee"] = distance
        rows[name] = {"gradients": spent[1], "forwards": spent[0], "seconds": spent[2]}
        summary(name, distance, rows[name])
    best = np.min([arrays[f"{name}/referee"] for name in rows], axis=0)
    for name, row in rows.items():
        distance = arrays[f"{name}/referee"]
        ratio = distance / best
        row |= {
            "success": float(np.isfinite(distance).mean()),
            "mean": float(distance.mean()),
            "lower_median": float(lower_median(distance)),
            "median": float(np.median(distance)),
            "mean_ratio": float(ratio.mean()),
            "within_1_percent": float((ratio < 1.01).mean()),
            "within_5_percent": float((ratio < 1.05).mean()),
        }
    np.savez(out / f"flips_{network}.npz", **{"best": best, **arrays})
    return rows


def throughput(count, peers_python, out):
    """Images a second of attacks with 100 gradients an image in one batch, compiling apart."""
    network = "resnet20_cifar10"
    module, variables = MAKERS[network](data.published_weights(network))
    classifier = hullgeo.from_linen(module, variables, data.cifar10("test").images[:8])
    images, labels = correct_images(classifier, count)

    def search():
        start = time.perf_counter()
        flip = jax.block_until_ready(hullgeo.nearest_flip(classifier, images, budget=100))
        return flip.image, time.perf_counter() - start

    (_, first), (found, seconds) = search(), search()
    logits_fn = jax.jit(classifier)
    answers = {"hullgeo 100": (found, (0, 0, seconds / count, first - seconds))}
    names = ("--twice", *TIMED_PEERS)
    answers |= ask_peers(peers_python, network, images, labels, names, out / "timed")
    rows = {}
    for name, (found, (*_, seconds, compiling)) in answers.items():
        distance = referee(logits_fn, images, labels, found)
        rows[name] = {
            "images_per_second": float(1 / seconds),
            "seconds_compiling": float(compiling),
            "mean": float(distance.mean()),
        }
        print(name, rows[name], flush=True)
    return rows


def kept(path, images, search) -> tuple[Any, float]:
    """The result of a search about these images, and its seconds, read back where stored."""
    if path.exists():
        with np.load(path) as stored:
            if np.array_equal(stored["asked"], images):
                kind = hullgeo.Flip if "tie_gap" in stored else hullgeo.Inversion
                return kind(**{name: stored[name] for name in kind._fields}), stored["seconds"]
    start = time.perf_counter()
    found = jax.tree.map(np.asarray, jax.block_until_ready(search()))
    seconds = time.perf_counter() - start
    np.savez(path, asked=images, seconds=seconds, **found._asdict())
    return found, seconds


def summary(name, distance, row):
    print(
        f"{name:14s} mean {distance.mean():.4f} lower median {lower_median(distance):.4f} "
        f"success {np.isfinite(distance).mean():.2f} {row}",
        flush=True,
    )


def inversions(count, out):
    """Own boundary point, another image's features, the midpoint; with and without the polish."""
    network = "resnet20_cifar10"
    module, variables = MAKERS[network](data.published_weights(network))
    images = data.cifar10("test").images[:8]
    classifier = hullgeo.from_linen(module, variables, images)
    images, _ = correct_images(classifier, 2 * count)
    phi = np.asarray(jax.jit(classifier.features)(images))
    near = hullgeo.nearest_boundary_point(phi[:count], classifier.head, lower=0.0)
    targets = {
        "own boundary point": np.asarray(near.point),
        "another image": phi[count:],
        "midpoint": (phi[:count] + phi[count:]) / 2,
    }
    rows, arrays = {}, {}
    for kind, target in targets.items():
        for name, options in {"": {}, ", no polish": {"polish_steps": 0}}.items():
            blocks = []
            for first in range(0, count, BLOCK):
                part = slice(first, first + BLOCK)
                search = partial(
                    hullgeo.invert_features,
                    classifier.features, jnp.asarray(target[part]), images[:count][part],
                    **options,
                )  # fmt: skip
                path = out / f"inversion {kind}{name} {first}.npz"
                blocks.append(kept(path, images[:count][part], search))
            seconds = sum(seconds for _, seconds in blocks)
            found = jax.tree.map(lambda *parts: np.concatenate(parts), *(b[0] for b in blocks))
            rows[kind + name] = {
                "median_residual": float(np.median(found.residual)),
                **{
                    f"below_{limit}": float((found.residual < float(limit)).mean())
                    for limit in ("1e-2", "1e-3", "1e-4")
                },
                "median_pixel_distance": float(np.median(found.pixel_distance)),
                "median_jacobians": float(np.median(found.num_gradients)) / phi.shape[1],
                "seconds": float(seconds) / count,
            }
            arrays |= {f"{kind}{name}/{key}": value for key, value in found._asdict().items()}
            print(kind + name, rows[kind + name], flush=True)
    np.savez(out / "inversions.npz", images=images[:count], **arrays)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="images for the flips")
    parser.add_argument("--inversions", type=int, default=32, help="images for the inversions")
    parser.add_argument("--peers-python", help="a Python with torch, adv-lib and the rest")
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    peers, results = options.peers_python, {}
    parts = {
        "flips": lambda: flips("resnet20_cifar10", options.count, peers, options.out),
        "crown": lambda: flips("crown_resnet2b", options.count, peers, options.out),
        "inversions": lambda: inversions(options.inversions, options.out),
        "throughput": lambda: throughput(options.count, peers, options.out),
    }
    print("jax", jax.__version__, "python", sys.version.split()[0], flush=True)
    for part in options.parts:
        results[part] = parts[part]()
        (options.out / "pixels.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
