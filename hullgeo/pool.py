"""Lanes that wait: queries that need more passes than most of their batch.

They are gathered until they fill a batch of their own, since a pass costs as much for few lanes as
for many. Rows of their slots do not wait with them: they are read again.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hullgeo import _numerics, active_set
from hullgeo.bracket import ENDED, Lanes, rows_of
from hullgeo.oracle import Oracle


class Pool:
    """Places for so many lanes, each with the number of its query."""

    def __init__(self, size: int):
        self.ids = np.full(size, -1)  # of the queries; -1 where a place is free
        self.lanes: Lanes | None = None

    def __len__(self) -> int:
        return int((self.ids >= 0).sum())

    def put(self, batch: Lanes, ids: np.ndarray, rows: np.ndarray, most: int) -> None:
        """Keep these rows of a batch, `most` at most: so many are moved, whatever their number."""
        if self.lanes is None:
            self.lanes = _room_for(batch, size=len(self.ids))
        places = np.flatnonzero(self.ids < 0)[: len(rows)]
        self.ids[places] = ids[rows]
        source = np.resize(rows, most).astype(np.int32)
        target = np.pad(places, (0, most - len(rows)), constant_values=len(self.ids))
        self.lanes = _put(self.lanes, batch, source, target.astype(np.int32))

    def take(self, oracle: Oracle, size: int) -> tuple[Lanes, np.ndarray]:
        """A batch of so many lanes, filled with lanes that have no query."""
        rows = np.argsort(self.ids < 0, kind="stable")[:size].astype(np.int32)
        ids = self.ids[rows]
        self.ids[rows] = -1
        return _take(oracle, self.lanes, rows, ids >= 0), ids


@partial(jax.jit, static_argnames=("size",))
def _room_for(lanes: Lanes, *, size: int) -> Lanes:
    lanes = _without_rows(lanes)
    return jax.tree.map(lambda array: jnp.zeros((size, *array.shape[1:]), array.dtype), lanes)


@jax.jit
def _take(oracle: Oracle, pool: Lanes, rows: Array, wanted: Array) -> Lanes:
    """These lanes of the pool, in float32; those that are not wanted have ended."""
    with _numerics.float64():
        taken = jax.tree.map(lambda array: array[rows], pool)
        active = taken.active
        read = rows_of(oracle, taken.query, active.index).astype(jnp.float32)
        return taken._replace(
            active=active._replace(rows=jnp.where(active.used[:, :, None], read, 0)),
            code=jnp.where(wanted, taken.code, jnp.int32(ENDED)),
        )


@partial(jax.jit, donate_argnames=("pool",))
def _put(pool: Lanes, lanes: Lanes, source: Array, target: Array) -> Lanes:
    """These lanes in those places of the pool; targets past its end are dropped."""
    lanes = _without_rows(lanes)
    return jax.tree.map(lambda old, new: old.at[target].set(new[source], mode="drop"), pool, lanes)


def _without_rows(lanes: Lanes) -> Lanes:
    return lanes._replace(active=active_set.without_rows(lanes.active))
