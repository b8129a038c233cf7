"""Two published CIFAR-10 networks in Flax, inputs NHWC in [0, 1], and their weights.

- ResNet-20 of He et al. (arXiv:1512.03385, section 4.2) as trained in
  `akamaster/pytorch_resnet_cifar10`: batch norm, parameter-free shortcuts, 64 features.
- ResNet-2b of `Verified-Intelligence/alpha-beta-CROWN`, adversarially trained: convolutions with
  bias, no batch norm, 100 features.

>>> module, variables = resnet20_linen(published_weights("resnet20_cifar10"))
>>> model = resnet20_nnx(published_weights("resnet20_cifar10"))

The weights come in PyTorch's names and layouts (convolutions OIHW, linear layers (out, in)); the
convolutions pad symmetrically, as PyTorch does.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, Float

Weights = Mapping[str, np.ndarray]
Images = Float[Array, "n height width 3"]

_RESNET20_NORMALISATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESNET2B_NORMALISATION = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_STAGES = ((16, 1), (32, 2), (64, 2))  # channels and first stride of ResNet-20's three stages
_BLOCKS = 3


def _normalise(images: Images, statistics: tuple[tuple, tuple]) -> Images:
    mean, std = (jnp.asarray(s, images.dtype).reshape(1, 1, 1, 3) for s in statistics)
    return (images - mean) / std


def _shortcut(x: Array, channels: int) -> Array:
    """Identity, or every second pixel with the channels padded by zeros on both sides."""
    if x.shape[-1] == channels:
        return x
    missing = channels - x.shape[-1]
    return jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(missing // 2, missing - missing // 2)])


class _BasicBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def conv(stride, name):
            return nn.Conv(self.channels, (3, 3), stride, padding=1, use_bias=False, name=name)

        def norm(name):
            return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=name)

        y = nn.relu(norm("bn1")(conv(self.stride, "conv1")(x)))
        y = norm("bn2")(conv(1, "conv2")(y))
        return nn.relu(y + _shortcut(x, self.channels))


class ResNet20(nn.Module):
    """CIFAR-10 ResNet-20; `train=True` by default, as in many training scripts."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: Images, train: bool = True) -> Float[Array, "n classes"]:
        """Logits; batch statistics are used, and updated, only in training."""
        x = _normalise(images, _RESNET20_NORMALISATION)
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="bn1")(x))
        for stage, (channels, stride) in enumerate(_STAGES, start=1):
            for block in range(_BLOCKS):
                name = f"layer{stage}_{block}"
                x = _BasicBlock(channels, 1 if block else stride, name=name)(x, train)
        return nn.Dense(self.num_classes, name="linear")(x.mean((1, 2)))


class _NNXBasicBlock(nnx.Module):
    def __init__(self, inputs: int, channels: int, stride: int, *, rngs: nnx.Rngs):
        def conv(inputs, strides):
            return nnx.Conv(inputs, channels, (3, 3), strides, padding=1, use_bias=False, rngs=rngs)

        self.conv1 = conv(inputs, stride)
        self.bn1 = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv2 = conv(channels, 1)
        self.bn2 = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + _shortcut(x, y.shape[-1]))


class NNXResNet20(nnx.Module):
    """The same ResNet-20 in NNX."""

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, epsilon=1e-5, rngs=rngs)
        inputs = 16
        for stage, (channels, stride) in enumerate(_STAGES, start=1):
            for block in range(_BLOCKS):
                layer = _NNXBasicBlock(inputs, channels, 1 if block else stride, rngs=rngs)
                setattr(self, f"layer{stage}_{block}", layer)
                inputs = channels
        self.linear = nnx.Linear(inputs, num_classes, rngs=rngs)

    def __call__(self, images: Images) -> Float[Array, "n classes"]:
        """Logits."""
        x = nnx.relu(self.bn1(self.conv1(_normalise(images, _RESNET20_NORMALISATION))))
        for stage in range(1, len(_STAGES) + 1):
            for block in range(_BLOCKS):
                x = getattr(self, f"layer{stage}_{block}")(x)
        return self.linear(x.mean((1, 2)))


class ResNet2b(nn.Module):
    """CROWN's CIFAR-10 ResNet-2b, written with `setup`."""

    num_classes: int = 10

    def setup(self):
        """One convolution, two residual blocks, two dense layers."""
        self.conv1 = nn.Conv(8, (3, 3), 2, padding=1)
        self.layer1_0_conv1 = nn.Conv(16, (3, 3), 2, padding=1)
        self.layer1_0_conv2 = nn.Conv(16, (3, 3), padding=1)
        self.layer1_0_shortcut_0 = nn.Conv(16, (1, 1), 2, padding=0)
        self.layer1_1_conv1 = nn.Conv(16, (3, 3), padding=1)
        self.layer1_1_conv2 = nn.Conv(16, (3, 3), padding=1)
        self.linear1 = nn.Dense(100)
        self.linear2 = nn.Dense(self.num_classes)

    def __call__(self, images: Images) -> Float[Array, "n classes"]:
        """Logits."""
        x = nn.relu(self.conv1(_normalise(images, _RESNET2B_NORMALISATION)))
        y = self.layer1_0_conv2(nn.relu(self.layer1_0_conv1(x)))
        x = nn.relu(y + self.layer1_0_shortcut_0(x))
        y = self.layer1_1_conv2(nn.relu(self.layer1_1_conv1(x)))
        x = nn.relu(y + x)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # flattened channel by channel
        return self.linear2(nn.relu(self.linear1(x)))


def resnet20_linen(weights: Weights) -> tuple[ResNet20, dict[str, Any]]:
    """The Linen module and its variables."""
    return ResNet20(), linen_variables(weights)


def resnet20_nnx(weights: Weights) -> NNXResNet20:
    """The NNX model."""
    model = nnx.eval_shape(lambda: NNXResNet20(rngs=nnx.Rngs(0)))  # every weight is loaded below
    for collection in linen_variables(weights).values():
        nnx.update(model, collection)
    return model


def resnet2b_linen(weights: Weights) -> tuple[ResNet2b, dict[str, Any]]:
    """The Linen module and its variables."""
    return ResNet2b(), linen_variables(weights)


def linen_variables(weights: Weights) -> dict[str, Any]:
    """PyTorch's flat names and layouts to Flax's collections.

    `layer1.0.conv1.weight` becomes `params/layer1_0/conv1/kernel` where the block is a module of
    its own (it has batch norm), and `params/layer1_0_conv1/kernel` where it is not.
    """
    nested = any(key.endswith("running_mean") for key in weights)
    variables: dict[str, Any] = {}
    for key, value in weights.items():
        *path, leaf = key.split(".")
        batch_norm = path[-1].startswith("bn")
        collection = "batch_stats" if leaf.startswith("running") else "params"
        name = {
            "weight": "scale" if batch_norm else "kernel",
            "bias": "bias",
            "running_mean": "mean",
            "running_var": "var",
        }[leaf]
        node = variables.setdefault(collection, {})
        for step in ["_".join(path[:2]), *path[2:]] if nested else ["_".join(path)]:
            node = node.setdefault(step, {})
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        node[name] = jnp.asarray(value.transpose(axes))
    return variables
