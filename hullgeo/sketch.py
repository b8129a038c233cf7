"""The problem in few principal components, where the first supports are looked for.

With E the components, a support is sought among the points E' v_i, and what they leave out of a
vertex, t_i = |a_i - E E' a_i|, is taken for a coordinate of its own: residuals of different
vertices are nearly orthogonal where the remaining variance is spread over many dimensions, so that

    |sum_i w_i (a_i - q)|^2  =~  |sum_i w_i E'(a_i - q)|^2 + sum_i w_i^2 t_i^2  + constant.

That names vertices and proves nothing.
"""

from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
from jaxtyping import Array, Float

from hullgeo._numerics import product
from hullgeo.oracle import SAMPLE, SKETCH, Hull, Screened, unit_directions


def serves(oracle: Any) -> TypeGuard[Hull]:
    """Whether the first supports are to be looked for in components alone."""
    return isinstance(oracle, Hull) and oracle.left_out.shape[0] > 0


class Sketch(NamedTuple):
    """An `Oracle` of the points E' a_i: centred and scaled, in float32 whatever the hull is."""

    hull: Hull

    @property
    def center(self) -> Array:
        """The origin: rows are centred already."""
        return jnp.zeros((self.hull.components.shape[1],), jnp.float32)

    @property
    def exponent(self) -> Array:
        """None: rows are scaled already."""
        return jnp.zeros((), jnp.int32)

    @property
    def radius(self) -> Array:
        """That of the hull."""
        return self.hull.radius

    @property
    def flushed(self) -> Array:
        """Nothing is bounded."""
        return jnp.zeros((), jnp.float32)

    @property
    def constant(self) -> Array:
        """Nothing is proved."""
        return jnp.zeros((self.hull.components.shape[1],), bool)

    @property
    def num_vertices(self) -> int:
        """Number of vertices."""
        return self.hull.num_vertices

    @property
    def phases(self) -> tuple[int, ...]:
        """Passes over the sample, if there is one, and over all."""
        return tuple(phase for phase in self.hull.phases if phase in (SAMPLE, SKETCH))

    @property
    def num_nearby(self) -> int:
        """None."""
        return 0

    def screen(self, direction: Array, masked: Array, *, phase: int) -> Screened:
        """As that of the hull, for a direction in components."""
        found = self.hull.screen_projected(direction, masked, phase=phase)
        return found._replace(nearby=found.nearby[:, :0])

    def screen_nearby(self, direction: Array, masked: Array, nearby: Array) -> Screened:
        """As that of the hull, whose scores have all dimensions."""
        return self.hull.screen_nearby(product(direction, self.hull.components.T), masked, nearby)

    def first_direction(self, shifted: Float[Array, "lanes few"]) -> Float[Array, "lanes few"]:
        """As that of the hull."""
        return unit_directions(shifted, self.hull.inverse_in_components)

    def gather(self, index: Array) -> Array:
        """Points of vertices."""
        few = self.hull.sketch.shape[2]
        return self.hull.sketch.reshape(-1, few)[self.hull.place(index)].astype(jnp.float32)

    def left_out(self, index: Array) -> Array:
        """t_i^2."""
        return self.hull.left_out.reshape(-1)[self.hull.place(index)]

    def error(self, direction: Array, rounded: Array) -> Array:
        """Nothing is bounded."""
        return 0 * direction[:, 0]
