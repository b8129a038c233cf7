"""How many queries make a batch, and how many slots each of them gets.

A program is compiled for each pair of the two.
"""

import jax

from hullgeo import fully_corrective

# Float32 rows of a batch's slots should stay in cache, and in a larger one where pricing many
# vertices costs more than reading them; accelerators want large batches, as far as memory goes.
_ROW_BYTES = (2**23, 2**25)
_ACCELERATOR_ROW_BYTES = 2**28
LANES = (1, 8, 16, 32, 64, 128)
_ACCELERATOR_LANES = (1, 32, 256, 1024)
_DECIDED_BYTES = 2**23  # of the float64 rows of a decision, which are read half a dozen times


def default_slots(num_vertices: int, dim: int) -> int:
    """Slots that nearly all queries outside the hull need: supports are small.

    Few vertices in a space of as many dimensions tend to be needed all of them.
    """
    if num_vertices <= min(dim, 128):
        return max(2, num_vertices)
    if dim <= 256:
        slots = 32 if num_vertices <= 2048 else 40
    else:
        slots = 80 if dim >= 1024 and num_vertices >= 2**14 else 48
    return min(slots, max(2, num_vertices))


def finishing_slots(num_vertices: int, dim: int, slots: int) -> int:
    """Slots of the float64 loop: for queries inside, dim + 1 vertices and some to choose from."""
    wanted = dim + 1 + fully_corrective.num_candidates(num_vertices) if dim <= 128 else 2 * slots
    return min(max(slots, wanted), num_vertices)


def num_lanes(queries: int, slots: int, dim: int, num_vertices: int) -> int:
    """Queries in a batch: the largest bucket that is filled and whose rows stay in cache.

    A pass over many vertices serves eight queries at least; over few, rows of the slots must not
    outgrow the vertices themselves.
    """
    least = 8 if num_vertices >= 16 * slots else 1
    small, large = _ROW_BYTES
    room = min(max(small, num_vertices * dim // 2), large)
    sizes = LANES
    if jax.default_backend() != "cpu":
        sizes, room = _ACCELERATOR_LANES, _ACCELERATOR_ROW_BYTES
    most = max(least, room // (4 * slots * dim))
    fitting = [lanes for lanes in sizes if lanes <= most]
    return next((lanes for lanes in fitting if lanes >= queries), fitting[-1])


def num_decided(lanes: int, slots: int, dim: int, num_vertices: int) -> int:
    """Lanes of a batch that are decided together: few on CPUs, whose rows stay in cache."""
    most = min(lanes, num_lanes(lanes, slots, dim, num_vertices))
    if jax.default_backend() != "cpu":
        return most
    most = min(most, max(8, _DECIDED_BYTES // (8 * slots * dim)))
    return max(size for size in LANES if size <= most)
