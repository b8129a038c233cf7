"""Floating-point building blocks: zero-safe norms, full-precision products, float64 islands.

An *island* is a float64 computation inside a program whose arrays are float32, without asking the
user for the global `jax_enable_x64` flag:

>>> with float64():
...     total = jnp.sum(values.astype(jnp.float64))

A traced function is lowered after the context has ended. So inside an island every index needs an
explicit integer type, every loop carry is derived from the inputs, and the smallest entry is found
by `argmin` below (the one of JAX does not lower under `jit` where the flag is off).
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

HIGHEST = lax.Precision.HIGHEST


def float64() -> AbstractContextManager[Any]:
    """A context in which float64 exists, whatever the global flag says."""
    return jax.enable_x64(True)


def product(left: Array, right: Array, dtype: Any = None) -> Array:
    """Matrix product in the full precision of its operands (never TF32, never bfloat16 passes).

    Summed and returned in `dtype`, that of the operands by default.
    """
    return jnp.matmul(left, right, precision=HIGHEST, preferred_element_type=dtype)


@cache
def bfloat16_pays() -> bool:
    """Whether the default device multiplies bfloat16 a quarter faster than float32, measured once.

    Processors without instructions for it are many times slower.
    """
    multiply = jax.jit(partial(product, dtype=jnp.float32))
    with jax.ensure_compile_time_eval():  # the caller may be tracing
        coarse, fine = (
            partial(multiply, jnp.ones((2048, 512), dtype), jnp.ones((512, 64), dtype))
            for dtype in (jnp.bfloat16, jnp.float32)
        )
        for run in (coarse, fine):
            _seconds(run)  # compiles
        # In turn, and three in four must agree: the machine may be busy with other work, too.
        gains = sorted(_seconds(fine) / _seconds(coarse) for _ in range(11))
    return gains[2] > 1.25


def _seconds(run: Callable[[], Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def argmin(array: Float[Array, "*batch size"]) -> Int[Array, "*batch"]:
    """First index of the smallest entry of the last axis, or of the first NaN; works in islands."""
    least = jnp.min(array, axis=-1, keepdims=True)
    size = array.shape[-1]
    index = jnp.arange(size, dtype=jnp.int32)
    found = (array == least) | jnp.isnan(array)
    return jnp.min(jnp.where(found, index, jnp.int32(size)), axis=-1)


def norm(array: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """Euclidean norm over the last axis, with gradient 0 at the origin, free of overflow.

    The largest magnitude is divided out first, so that squares neither overflow nor underflow;
    the scale is a constant for differentiation, since the norm does not depend on it.
    """
    scale = lax.stop_gradient(jnp.max(jnp.abs(array), axis=-1, initial=0.0))
    usable = (scale > 0) & jnp.isfinite(scale)
    # XLA may divide by multiplying with the inverse, which must not be subnormal.
    largest = 1 / float(jnp.finfo(array.dtype).smallest_normal)
    divisor = jnp.where(usable, jnp.minimum(scale, largest), 1)
    square = jnp.sum((array / divisor[..., None]) ** 2, axis=-1)
    positive = square > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)
    return divisor * root


def narrow(value: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Convert to a narrower type, so that converting back gives that very number.

    Compilers leave out a plain conversion there and back (XLA does, for GPUs), and what is proved
    of the one number is then not true of the other. Subnormal results become 0.
    """
    info = jnp.finfo(dtype)
    if info.nmant < jnp.finfo(value.dtype).nmant:
        value = lax.reduce_precision(value, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return value.astype(dtype)


def round_down(value: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Convert to a narrower type, never above the value (NaN stays NaN).

    Never a subnormal number either, because devices may read those as zero; a value that is
    subnormal in its own type counts as zero where the device reads it so.
    """
    return _round_toward(value, dtype, -1.0)


def round_up(value: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Convert to a narrower type, never below the value; see `round_down`."""
    return _round_toward(value, dtype, 1.0)


def _round_toward(value: Array, dtype: Any, sign: float) -> Array:
    nearest = narrow(value, dtype)
    wrong = sign * nearest.astype(value.dtype) < sign * value
    outward = jnp.where(wrong, jnp.nextafter(nearest, jnp.asarray(sign * jnp.inf, dtype)), nearest)
    smallest = float(jnp.finfo(dtype).smallest_normal)
    tiny = jnp.where(sign * value > 0, jnp.asarray(sign * smallest, dtype), jnp.asarray(0, dtype))
    return jnp.where(jnp.abs(value) < smallest, tiny, outward)
