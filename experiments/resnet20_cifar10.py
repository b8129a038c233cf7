"""The feature space of two published CIFAR-10 networks: where 2,000 test images lie in it.

    HULLGEO_DATA=<folder> python -m experiments.resnet20_cifar10 --out results/resnet20
    HULLGEO_DATA=<folder> python -m experiments.resnet20_cifar10 --network resnet2b --out results/2b

All 50,000 training features span the hull; 2,000 test images are located relative to it.
`--network resnet20_nnx` is the same network in NNX, with the same features up to float32 rounding.
A run that was stopped goes on where it was.

What to expect (`--network`, features, test accuracy on all 10,000 images as published):

- resnet20, 64 features, 91.73 %: all 2,000 test images provably outside the hull, 4.0 % of its
  diameter away (median), 13 % at most; the nearest class hull classifies 91.5 % correctly.
- resnet2b, adversarially trained, 100 features, 69.25 %: all 2,000 provably outside, 8.4 %
  (median), 24 % at most; the nearest class hull classifies 70.5 % correctly.

With `--num-test 10000` all 10,000 are provably outside, 4.1 % (median; 15 % at most) and 8.5 %
(24 %) of the diameter away, and the nearest class hull classifies 91.8 % and 70.4 % correctly; all
45 pairs of classes share a facet in every domain, and all 1,013 sets of classes tie somewhere. CPU
time on AMD EPYC cores: 13 minutes for resnet20, of which the images take four, and 8 for resnet2b.

With `--num-flips 1000 --num-inversions 200 --num-morphs 20 --num-ties 20` too, the images of
resnet20 take two hours of a shared core: the nearest flips of the 921 classified correctly are
0.089 away (mean; median 0.085), 123 of 200 boundary points are matched to 0.1 %, 139 of 140 inner
frames of morphs lie within 1 % of their line, and two, three and four classes tie near each of 20
images. Those of resnet2b take 13 minutes: the nearest flips of the 720 classified correctly are
0.41 away (median 0.37), 190 of 200 boundary points are matched (with the 62 of 100 features that
are off left off), no frame of a morph follows its line, since units that are off would have to be
switched on, and two, three and four classes tie near each of 20 images, 0.41, 0.69 and 0.98 away.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hullgeo
from experiments import data, networks

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def resnet20(images: Any) -> hullgeo.Classifier:
    """ResNet-20 in Linen; `images` are a few real ones for the check."""
    weights = data.published_weights("resnet20_cifar10")
    return hullgeo.from_linen(*networks.resnet20_linen(weights), images)


def resnet20_nnx(images: Any) -> hullgeo.Classifier:
    """ResNet-20 in NNX."""
    return hullgeo.from_nnx(
        networks.resnet20_nnx(data.published_weights("resnet20_cifar10")), images
    )


def resnet2b(images: Any) -> hullgeo.Classifier:
    """CROWN's adversarially trained ResNet-2b in Linen."""
    weights = data.published_weights("crown_resnet2b")
    return hullgeo.from_linen(*networks.resnet2b_linen(weights), images)


# The network and its published test accuracy.
NETWORKS: dict[str, tuple[Callable[[Any], hullgeo.Classifier], str]] = {
    "resnet20": (resnet20, "91.73 %"),
    "resnet20_nnx": (resnet20_nnx, "91.73 %"),
    "resnet2b": (resnet2b, "69.25 %"),
}


def accuracy(classifier: hullgeo.Classifier, images: Any, labels: Any, **options: Any) -> float:
    """Share of images whose largest logit is their label's."""
    features = hullgeo.extract_features(classifier, images, **options)
    logits = np.asarray(classifier.head(features))
    return float(np.mean(logits.argmax(-1) == labels))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--out", type=Path, default=Path("results/resnet20"))
    parser.add_argument("--num-test", type=int, default=2000, help="test images to locate")
    searches = {"flips": 100, "inversions": 6, "morphs": 3, "ties": 3}
    for kind, number in searches.items():
        parser.add_argument(f"--num-{kind}", type=int, default=number, help=f"{kind} searched")
    options = parser.parse_args(arguments)

    build, published = NETWORKS[options.network]
    train, test = data.cifar10("train"), data.cifar10("test")
    classifier = build(test.images)
    share = accuracy(classifier, *test, batch_size=500, progress=True)
    print(
        f"{options.network}: {share:.2%} of {len(test.labels)} test images; published {published}"
    )
    analysis = hullgeo.analyze(
        classifier,
        train,
        (test.images[: options.num_test], test.labels[: options.num_test]),
        out=options.out,
        title=f"{options.network} on CIFAR-10",
        class_names=CLASSES,
        batch_size=500,
        **{f"num_{kind}": getattr(options, f"num_{kind}") for kind in searches},
    )
    print(f"Report: {analysis.report}")


if __name__ == "__main__":
    main()
