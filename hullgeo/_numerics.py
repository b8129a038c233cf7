"""Floating-point building blocks: zero-safe norms, full-precision products, float64 islands.

An *island* is a float64 computation inside a program whose arrays are float32, without asking the
user for the global `jax_enable_x64` flag:

>>> with float64():
...     total = jnp.sum(values.astype(jnp.float64))

Inside an island every index needs an explicit integer type, and every loop carry is derived from
the inputs, because a traced function is lowered after the context has ended.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HIGHEST = lax.Precision.HIGHEST


def float64() -> AbstractContextManager[Any]:
    """A context in which float64 exists, whatever the global flag says."""
    return jax.enable_x64(True)


def product(left: Array, right: Array) -> Array:
    """Matrix product in the full precision of its operands (never TF32, never bfloat16 passes)."""
    return jnp.matmul(left, right, precision=HIGHEST)


def norm(array: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """Euclidean norm over the last axis, with gradient 0 at the origin, free of overflow.

    The largest magnitude is divided out first, so that squares neither overflow nor underflow;
    the scale is a constant for differentiation, since the norm does not depend on it.
    """
    scale = lax.stop_gradient(jnp.max(jnp.abs(array), axis=-1, initial=0.0))
    usable = (scale > 0) & jnp.isfinite(scale)
    divisor = jnp.where(usable, scale, 1)
    square = jnp.sum((array / divisor[..., None]) ** 2, axis=-1)
    positive = square > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)
    return divisor * root


def round_down(value: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Convert to a narrower type, never above the value (NaN stays NaN)."""
    return _round_toward(value, dtype, -jnp.inf, value.dtype)


def round_up(value: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Convert to a narrower type, never below the value (NaN stays NaN)."""
    return _round_toward(value, dtype, jnp.inf, value.dtype)


def _round_toward(value: Array, dtype: Any, target: float, wide: Any) -> Array:
    narrow = value.astype(dtype)
    back = narrow.astype(wide)
    wrong = back > value if target < 0 else back < value
    return jnp.where(wrong, jnp.nextafter(narrow, jnp.asarray(target, dtype)), narrow)
