"""Starts for networks whose gradients vanish: flip a smoothed network, then follow it back.

A saturated network z(x) has zero gradient almost everywhere, so that no descent leaves its start.
A family z(x; s), smooth for large s and equal to z at s = 0, is flipped at the largest s first;
each flip is the start for the next smaller s (Yousefzadeh and O'Leary, Deep learning
interpretation: flip points and homotopy methods, PMLR 107, 2020).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hullgeo import _check
from hullgeo.flip import nearest_flip


def smoothed_start(
    smoothed: Callable[[Any, Any], Any],
    images: Any,
    labels: Any,
    *,
    amounts: Sequence[float] | Any,
    bounds: Any = (0.0, 1.0),
    budget: Any = 60,
) -> Float[Array, "*batch height width channels"]:
    """Images near the flips of a smoothed network, to pass to `nearest_flip(start=...)`.

    Args:
      smoothed: traceable, `(amount, images)` to logits, images `(n, height, width, channels)` and
        amount a scalar; the network itself at 0. Pass the same object every time.
      images: `(*batch, height, width, channels)`, floating point.
      labels: classes to leave, those of the network itself, `(*batch,)`.
      amounts: of smoothing, largest first, at least one, none of them 0.
      bounds: smallest and largest value of a pixel, numbers or arrays that broadcast to an image.
      budget: gradients per image and amount.

    Returns:
      images of the same shape and type within the bounds: where the smoothed network was flipped,
      its last flip, otherwise the image. Nothing is claimed about the network itself; the
      guarantee is that of the `nearest_flip` that starts there.

    Raises:
      ValueError: for shapes, types or options that do not fit.
    """
    if len(amounts) == 0:
        _check.fail("amounts", amounts, "to hold at least one amount")
    start = jnp.asarray(images)
    for amount in amounts:
        network = jax.tree_util.Partial(smoothed, jnp.asarray(amount, start.dtype))
        flip = nearest_flip(
            network, images, labels=labels, start=start, bounds=bounds, budget=budget
        )
        found = jnp.isfinite(flip.distance)
        found = found.reshape(*found.shape, *(1,) * (start.ndim - found.ndim))
        start = jnp.where(found, flip.image, start)
    return start
