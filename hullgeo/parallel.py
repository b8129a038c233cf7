"""One batch over several devices: pad, split with `pmap`, cut. Knows no geometry."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp


@lru_cache(maxsize=128)
def _mapped(function: Callable, devices: tuple[jax.Device, ...]) -> Callable:
    """One pmap per function and devices, so that repeated calls compile once."""
    return jax.pmap(function, in_axes=(None, 0), devices=devices)


def split_over_devices(
    function: Callable[[Any, Any], Any],
    replicated: Any,
    batched: Any,
    devices: Sequence[jax.Device],
) -> Any:
    """Compute `function(replicated, batched)` with the rows of `batched` split over devices.

    Args:
      function: a traceable function of two pytrees; every output has the batch as first axis. Pass
        the same object every time: compiled programs are kept per function.
      replicated: a pytree copied to every device.
      batched: a pytree whose arrays share a leading axis of any size >= 1; it is padded with copies
        of its last row to a multiple of the number of devices, and the answers are cut again.
      devices: the devices to use, at least one.

    Returns:
      the outputs, their leading axis as long as the batch.
    """
    size = jax.tree.leaves(batched)[0].shape[0]
    per_device = -(-size // len(devices))

    def spread(array):
        padding = [(0, per_device * len(devices) - size)] + [(0, 0)] * (array.ndim - 1)
        padded = jnp.pad(array, padding, mode="edge")
        return padded.reshape(len(devices), per_device, *array.shape[1:])

    outputs = _mapped(function, tuple(devices))(replicated, jax.tree.map(spread, batched))
    return jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:])[:size], outputs)
