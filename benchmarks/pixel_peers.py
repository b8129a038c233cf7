"""Minimum-norm attacks of other libraries on the published networks, for `benchmarks/pixels.py`.

    python benchmarks/pixel_peers.py images.npz weights.npz resnet20_cifar10 answers.npz DDN:100 ...

needs torch and adv-lib, and for the names that say so foolbox, torchattacks,
adversarial-robustness-toolbox, or foolbox with hullgeo itself, whose networks it attacks in JAX.
Settings are the authors' for L2: DDN without quantisation, FMN, ALMA with alpha 0.5 below 1000
steps and 0.9 from there, the others as they come. Passes through a torch network are counted per
image by a wrapper around it; in JAX each step is one gradient. Answers already in `answers.npz` for
the same images are kept, so that a run that was stopped goes on. With `--twice` before the names
each attack runs twice; the seconds are those of the second run, those of compiling the difference.
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

THREADS = 1  # as many as the pinned core of the other side


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


def adv_lib(name, steps):
    """Attacks of AdvLib: `(model, images, labels)` to images."""
    return {
        "DDN": lambda: partial(ddn, steps=steps, levels=None),
        "FMN": lambda: partial(fmn, norm=2, steps=steps),
        "ALMA": lambda: partial(
            alma, num_steps=steps, α=0.5 if steps < 1000 else 0.9, init_lr_distance=0.1
        ),
        "DeepFool": lambda: partial(df, steps=steps),
        "FAB": lambda: partial(fab, norm=2, n_iter=steps),
    }[name]()


def foolbox_attack(name, steps):
    from foolbox import attacks

    kind = {
        "DDN": attacks.DDNAttack,
        "FMN": attacks.L2FMNAttack,
        "DeepFool": attacks.L2DeepFoolAttack,
    }[name]
    return kind(steps=steps)


def foolbox_torch(name, steps):
    from foolbox import PyTorchModel

    def run(model, images, labels):
        wrapped = PyTorchModel(model, bounds=(0, 1), device="cpu")
        return foolbox_attack(name, steps)(wrapped, images, labels, epsilons=None)[1]

    return run


def torchattacks_attack(name, steps):
    import torchattacks

    def run(model, images, labels):
        options = {"lr": 0.01} if name == "CW" else {}
        return getattr(torchattacks, name)(model, steps=steps, **options)(images, labels)

    return run


def art_attack(name, steps):
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    kind = {"DeepFool": evasion.DeepFool, "CW": evasion.CarliniL2Method}[name]

    def run(model, images, labels):
        classifier = PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            images.shape[1:],
            10,
            clip_values=(0, 1),
            device_type="cpu",
        )
        found = kind(classifier, max_iter=steps, batch_size=len(images), verbose=False)
        return torch.from_numpy(found.generate(images.numpy()))

    return run


TORCH = {
    "": adv_lib,
    "foolbox": foolbox_torch,
    "torchattacks": torchattacks_attack,
    "ART": art_attack,
}


def in_torch(weights, network, images, labels, name, steps, library):
    """Flips as images of channels last, and passes per image forward and backward."""
    tensors = {key.removeprefix("module."): torch.from_numpy(a) for key, a in weights.items()}
    model = Counted(partial(NETWORKS[network], tensors)).eval()
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    found = TORCH[library](name, steps)(model, batch, torch.from_numpy(labels).long())
    passes = [model.forwards / len(images), model.backwards / len(images)]
    return found.detach().numpy().transpose(0, 2, 3, 1), passes


def in_jax(weights, network, images, labels, name, steps):
    """The same by foolbox on JAX, on hullgeo's network."""
    import foolbox
    import jax
    import jax.numpy as jnp

    import hullgeo
    from experiments import networks

    makers = {
        "resnet20_cifar10": networks.resnet20_linen,
        "crown_resnet2b": networks.resnet2b_linen,
    }
    module, variables = makers[network](weights)
    classifier = jax.jit(hullgeo.from_linen(module, variables, images[:1]))
    model = foolbox.JAXModel(classifier, bounds=(0, 1), data_format="channels_last")
    criterion = foolbox.criteria.Misclassification(jnp.asarray(labels))
    attack = foolbox_attack(name, steps)
    found = attack(model, jnp.asarray(images), criterion, epsilons=None)[1]
    return np.asarray(found), [steps, steps]


def kept(path, images):
    """Answers stored for the same images."""
    if Path(path).exists():
        with np.load(path) as stored:
            if np.array_equal(stored["asked"], images):
                return dict(stored)
    return {"asked": images}


def timed(attack):
    start = time.perf_counter()
    return attack(), time.perf_counter() - start


def main():
    images_path, weights_path, network, answers_path, *names = sys.argv[1:]
    twice = "--twice" in names
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    with np.load(images_path) as data:
        images, labels = data["images"], data["labels"]
    with np.load(weights_path) as stored:
        weights = dict(stored)
    answers = kept(answers_path, images)
    for name in names:
        if name == "--twice" or f"{name}/images" in answers:
            continue
        library, _, rest = name.rpartition(" ")
        method, steps = rest.split(":")
        run = in_jax if library == "foolbox-jax" else partial(in_torch, library=library)
        attack = partial(run, weights, network, images, labels, name=method, steps=int(steps))
        try:
            times = [timed(attack) for _ in range(1 + twice)]
        except ImportError as error:
            print(name, "left out:", error, flush=True)
            continue
        (found, passes), seconds = times[-1]
        compiling = times[0][1] - seconds
        answers[f"{name}/images"] = found
        answers[f"{name}/spent"] = np.array([*passes, seconds / len(images), compiling])
        np.savez(answers_path, **answers)
        print(name, "seconds an image", seconds / len(images), flush=True)
    print("torch", torch.__version__, "adv-lib", __import__("adv_lib").__version__)


if __name__ == "__main__":
    main()
