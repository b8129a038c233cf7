"""The planes between the classes of a linear head: checks, exact comparisons, rounding bounds.

The plane between classes c and j is `{phi : (k_c - k_j) phi + b_c - b_j = 0}`, with the kernel's
columns as k. Two equal columns (compared to the bit) have no plane between them: there the biases
alone decide, everywhere. Everything here runs inside a float64 island, where `u` is the unit
roundoff 2^-53.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _check, _numerics

UNIT = 2.0**-53


class Lead(NamedTuple):
    """Who leads at each feature, and how far away the planes to the other classes are.

    Attributes:
      label: class of the largest logit, the smallest index among ties.
      plane: computed distance to the plane of each class, signed by rounding only; infinite for the
        class itself and where a class can never take over.
      proved: never above the true distance to the plane, `>= 0`.
      finite: whether features and logits are.
    """

    label: Int[Array, "*batch"]
    plane: Float[Array, "*batch classes"]
    proved: Float[Array, "*batch classes"]
    finite: Bool[Array, "*batch"]


def check_head(head: Any) -> None:
    """A head with kernel `(dim, num_classes)` and bias `(num_classes,)`, finite."""
    _check.shape("head.kernel", head.kernel, (None, None), "(dim, num_classes)")
    _check.floating("head.kernel", head.kernel)
    _check.floating("head.bias", head.bias)
    num_classes = head.kernel.shape[1]
    _check.shape("head.bias", head.bias, (num_classes,), f"({num_classes},) as in head.kernel")
    _check.all_finite("head.kernel", head.kernel)
    _check.all_finite("head.bias", head.bias)


def check_features(name: str, features: Any, head: Any) -> None:
    """Features `(*batch, dim)` that fit the head."""
    _check.floating(name, features)
    _check.rank_at_least(name, features, 1, "(*batch, dim)")
    dim = head.kernel.shape[0]
    if features.shape[-1] != dim:
        _check.fail(f"{name}.shape", features.shape, f"to end in dim={dim}, the head's input")


def equal_columns(kernel: Float[Array, "dim classes"]) -> Bool[Array, "classes classes"]:
    """Which kernel columns are equal, to the bit."""
    return lax.map(lambda column: jnp.all(kernel == column[:, None], axis=0), kernel.T)


def hidden(
    kernel: Float[Array, "dim classes"], bias: Float[Array, " classes"]
) -> Bool[Array, " classes"]:
    """Classes hidden everywhere by one with the same column: higher bias, or tied and earlier."""
    index = jnp.arange(bias.shape[0], dtype=jnp.int32)
    higher = bias[:, None] > bias[None, :]
    tied_earlier = (bias[:, None] == bias[None, :]) & (index[:, None] < index[None, :])
    return jnp.any(equal_columns(kernel) & (higher | tied_earlier), axis=0)


def normal_lengths(kernel: Float[Array, "dim classes"]) -> Float[Array, "classes classes"]:
    """`|k_c - k_j|` for all pairs from the differences themselves, exactly 0 for equal columns."""
    return lax.map(lambda column: _numerics.norm(kernel.T - column[None, :]), kernel.T)


def in_chunks(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`vmap(function)(rows)`, `size` rows at a time, so that memory stays bounded and cached."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    if num_rows <= size:
        return jax.vmap(function)(rows)
    num_chunks = -(-num_rows // size)

    def spread(array):
        padding = [(0, num_chunks * size - num_rows)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding, mode="edge").reshape(num_chunks, size, *array.shape[1:])

    answers = lax.map(jax.vmap(function), jax.tree.map(spread, rows))
    return jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:])[:num_rows], answers)


def take(array: Float[Array, "*batch n"], index: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """One entry of the last axis for each row."""
    return jnp.take_along_axis(array, index[..., None], axis=-1)[..., 0]


def first(true: Bool[Array, "*batch n"]) -> Int[Array, "*batch"]:
    """Index of the first true entry (argmax inside a float64 island does not lower under jit)."""
    index = jnp.arange(true.shape[-1], dtype=jnp.int32)
    index = index.reshape((1,) * (true.ndim - 1) + (-1,))
    return jnp.min(jnp.where(true, index, true.shape[-1] - 1), axis=-1)


def lead(
    features: Float[Array, "*batch dim"],
    kernel: Float[Array, "dim classes"],
    bias: Float[Array, " classes"],
) -> Lead:
    """Label of each feature and its distances to the planes; all arguments in float64."""
    dim, num_classes = kernel.shape
    batch = (1,) * (features.ndim - 1)
    logits = _numerics.product(features, kernel) + bias.reshape(*batch, -1)
    # |computed - true logit| <= (dim + 2) u (|phi| |K| + |b|); doubled for its own error.
    error = (2 * (dim + 2) * UNIT) * (
        _numerics.product(jnp.abs(features), jnp.abs(kernel)) + jnp.abs(bias).reshape(*batch, -1)
    )
    label = first(logits == jnp.max(logits, axis=-1, keepdims=True))
    lengths = normal_lengths(kernel)[label]
    equal = lengths == 0
    gap = take(logits, label)[..., None] - logits
    slack = take(error, label)[..., None] + error
    own = jnp.arange(num_classes, dtype=jnp.int32).reshape(*batch, -1) == label[..., None]
    never = own | (equal & (bias[label][..., None] > bias.reshape(*batch, -1)))
    divisor = jnp.where(equal, 1.0, lengths)
    proved = jnp.maximum(gap - slack, 0.0) / divisor * (1 - 2 * (dim + 4) * UNIT)

    def exact_where_equal(distance):
        return jnp.where(never, jnp.inf, jnp.where(equal, 0.0, distance))

    finite = jnp.all(jnp.isfinite(features), axis=-1) & jnp.all(jnp.isfinite(logits), axis=-1)
    return Lead(label, exact_where_equal(gap / divisor), exact_where_equal(proved), finite)
