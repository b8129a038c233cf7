"""Minimum-norm attacks of AdvLib on the published networks, in PyTorch, for `benchmarks/pixels.py`.

    python benchmarks/pixel_peers.py images.npz weights.npz resnet20_cifar10 answers.npz DDN:100 ...

needs torch and adv-lib only. Settings are the authors' for L2: DDN without quantisation, FMN, ALMA
with alpha 0.5 below 1000 steps and 0.9 from there, DeepFool and FAB as they come. Passes through
the network are counted per image by a wrapper around it. Answers already in `answers.npz` for the
same images are kept, so that a run that was stopped goes on.
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from adv_lib.attacks import alma, ddn, df, fab, fmn
from torch import nn
from torch.nn import functional as F


class Counted(nn.Module):
    """A network that counts images, forward and backward."""

    def __init__(self, function):
        super().__init__()
        self.function, self.forwards, self.backwards = function, 0, 0

    def forward(self, images):  # noqa: D102
        self.forwards += len(images)
        logits = self.function(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient):
        self.backwards += len(gradient)


def resnet20(weights, x):
    def conv(x, name, norm, stride=1):
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=1)
        parts = [weights[f"{norm}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, eps=1e-5)

    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = F.relu(conv((x - mean) / std, "conv1", "bn1"))
    for stage in (1, 2, 3):
        for block in range(3):
            base = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(conv(x, f"{base}.conv1", f"{base}.bn1", stride))
            y = conv(y, f"{base}.conv2", f"{base}.bn2")
            if stride == 2:
                quarter = y.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), weights["linear.weight"], weights["linear.bias"])


def resnet2b(weights, x):
    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)

    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]])[..., None, None]
    x = F.relu(conv((x - mean) / std, "conv1", 2))
    y = conv(F.relu(conv(x, "layer1.0.conv1", 2)), "layer1.0.conv2")
    x = F.relu(y + conv(x, "layer1.0.shortcut.0", 2, 0))
    y = conv(F.relu(conv(x, "layer1.1.conv1")), "layer1.1.conv2")
    x = F.relu(x + y).flatten(1)
    x = F.relu(F.linear(x, weights["linear1.weight"], weights["linear1.bias"]))
    return F.linear(x, weights["linear2.weight"], weights["linear2.bias"])


NETWORKS = {"resnet20_cifar10": resnet20, "crown_resnet2b": resnet2b}


def attack(name, steps):
    return {
        "DDN": lambda: partial(ddn, steps=steps, levels=None),
        "FMN": lambda: partial(fmn, norm=2, steps=steps),
        "ALMA": lambda: partial(
            alma, num_steps=steps, α=0.5 if steps < 1000 else 0.9, init_lr_distance=0.1
        ),
        "DeepFool": lambda: partial(df, steps=steps),
        "FAB": lambda: partial(fab, norm=2, n_iter=steps),
    }[name]()


def kept(path, images):
    """Answers stored for the same images."""
    if Path(path).exists():
        with np.load(path) as stored:
            if np.array_equal(stored["asked"], images):
                return dict(stored)
    return {"asked": images}


def main():
    images_path, weights_path, network, answers_path, *names = sys.argv[1:]
    torch.manual_seed(0)
    data = np.load(images_path)
    images = torch.from_numpy(data["images"].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(data["labels"]).long()
    with np.load(weights_path) as stored:
        weights = {
            key.removeprefix("module."): torch.from_numpy(stored[key]) for key in stored.files
        }
    answers = kept(answers_path, data["images"])
    for name in names:
        if f"{name}/images" in answers:
            continue
        method, steps = name.split(":")
        model = Counted(partial(NETWORKS[network], weights)).eval()
        start = time.perf_counter()
        found = attack(method, int(steps))(model, images, labels).detach()
        answers[f"{name}/images"] = found.numpy().transpose(0, 2, 3, 1)
        answers[f"{name}/spent"] = np.array(
            [model.forwards, model.backwards, time.perf_counter() - start]
        ) / len(images)
        np.savez(answers_path, **answers)
        print(name, "seconds an image", answers[f"{name}/spent"][2], flush=True)
    print("torch", torch.__version__, "adv-lib", __import__("adv_lib").__version__)


if __name__ == "__main__":
    main()
