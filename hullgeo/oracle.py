"""Linear minimisation over the vertices: good candidates from one cheap pass, and a proved bound.

For a unit direction g, Frank-Wolfe asks for min_i <v_i - q, g>. One float32 product prices all
vertices for all queries of a batch; of every residue class of vertices (row i belongs to class
i mod k) the best is named, so that a pass yields k candidates and no vertex escapes the bound:

    <v_i - q, g>  >=  (least screened value) + <c - q, g> - band |g|      for all vertices i

except those the caller masked (and scores itself). Proof, with a_i = (v_i - c) / scale, |a_i| <= R,
stored as a float32 row r_i, the unit direction rounded to a float32 vector h, u = 2^-24:

    |<a_i, g> - fl<r_i, h>|  <=  |<a_i - r_i, g>| + |<r_i, g - h>| + |<r_i, h> - fl<r_i, h>|
                             <=  u R |g| + R' |g - h| + gamma_d R' |h|,

R' = (1 + u) R bounds the stored rows, gamma_d = d u / (1 - d u) any order of summation (Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), and the flush of subnormal
products adds at most d 2^-126. `Hull.error` is that sum.

Passes that only name candidates may run over a sample of the vertices, over their principal
components, or over rows rounded to bfloat16 where the device multiplies them faster: they bound
nothing.

Anything with the members of `Oracle` serves the engine of `fully_corrective.py`: one array,
shards, blocks from disk.
"""

from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hullgeo import _numerics

_U32 = 2.0**-24
_CHUNK_BYTES = 2**20  # rows of a chunk: they are copied before they are multiplied
_SLICES = (8, 16)  # slices of a chunk: few enough for scores in cache and short code
_CHUNK_ROWS = 2**16  # rows of a chunk on accelerators
# Copies of longer rows cost more than scores that leave the cache: one product scores all of them,
# and chunks, of so many slices, are of scores.
_LONG = 1024  # dimensions
_LONG_SLICES = 32
_UNROLLED = 160  # slices at most that are reduced one by one; so few are not cut into chunks
SHARE = 8  # the sample holds one of so many vertices
_SMALLEST_NEARBY = 2**14  # vertices from which full passes name more than they admit
_GROUPS = 2  # of chunks, each of which names the best of each class
_NEARBY = 2**15  # numbers in the rows of these, at most, for each query
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}  # by bytes

# What a pass runs over: a sample of the vertices; all, in few components; all, in bfloat16; all, in
# float32; those that the last pass over all has named besides. Only FINE bounds.
SAMPLE, SKETCH, COARSE, FINE, NEARBY = range(5)


class Screened(NamedTuple):
    """The outcome of a pass: per query the best vertex of each class.

    Attributes:
      value: `<row_i, direction>` in float32, infinite where a class is empty or masked.
      index: vertex of that value.
      nearby: the best of each class in each group of chunks, where a pass over all names so many;
        `num_vertices` for none.
    """

    value: Float[Array, "lanes classes"]
    index: Int[Array, "lanes classes"]
    nearby: Int[Array, "lanes nearby"]


@runtime_checkable
class Oracle(Protocol):
    """What the engine needs to know of the vertices; any pytree with these members will do."""

    @property
    def center(self) -> Array:
        """See `Hull`, as for the next four."""
        ...

    @property
    def exponent(self) -> Array: ...  # noqa: D102

    @property
    def radius(self) -> Array: ...  # noqa: D102

    @property
    def flushed(self) -> Array: ...  # noqa: D102

    @property
    def constant(self) -> Array: ...  # noqa: D102

    @property
    def num_vertices(self) -> int:
        """Number of vertices; indices run below it."""
        ...

    @property
    def phases(self) -> tuple[int, ...]:
        """The kinds of passes that pay, cheapest first; the last is `FINE`."""
        ...

    @property
    def num_nearby(self) -> int:
        """Vertices that a pass over all names for `screen_nearby`; 0 where that does not pay."""
        ...

    def screen(self, direction: Array, masked: Array, *, phase: int) -> Screened:
        """One pass: the best unmasked vertex of each class."""
        ...

    def screen_nearby(self, direction: Array, masked: Array, nearby: Array) -> Screened:
        """The same among what all lanes hold in `nearby`."""
        ...

    def first_direction(self, shifted: Array) -> Array:
        """Unit float32 directions to be screened before there is a support."""
        ...

    def gather(self, index: Array) -> Array:
        """Rows of vertices in the caller's own numbers."""
        ...

    def error(self, direction: Array, rounded: Array) -> Array:
        """Bound of `|<a_i, direction> - value|` for the rounded direction that was screened."""
        ...


class Hull(NamedTuple):
    """Vertices prepared for repeated use; a pytree. Made by `prepare_hull`.

    Attributes:
      vertices: the caller's rows in their own type.
      center: a vector near their mean, in the same type.
      exponent: the power of two by which centred rows are divided.
      rows: `(v - center) / 2**exponent` rounded to float32, in chunks, padded with zero rows;
        `place` says where each vertex is.
      coarse: `rows` in bfloat16, for passes that only name candidates; empty where that is slower.
      sample: an eighth of the rows, or of the sketch, for the first passes; empty for few vertices.
      sampled: the vertices of these: the most outlying where `inverse_covariance` tells.
      in_sample: the place of every vertex among them, their number for the others.
      components: orthonormal directions in which the rows vary most; none where there is no sketch.
      sketch: `rows` in these, for the passes that follow; empty where they hold too little.
      left_out: squares of what these leave out of each row; empty where rows are too long for a
        search in components alone to pay.
      gram: products of the rows with each other; empty where they outnumber the dimensions.
      inverse_covariance: of the rows, shrunk and scaled; empty where it would be too large.
      inverse_in_components: the same between components; empty as `left_out` is.
      radius: at least the norm of every exact centred, scaled row.
      flushed: at least the norm of what a device flushed to zero in any scaled row; mostly 0.
      constant: coordinates in which all vertices equal the centre, such as dead units.
    """

    vertices: Float[Array, "vertices dim"]
    center: Float[Array, " dim"]
    exponent: Int[Array, ""]
    rows: Float[Array, "chunks size dim"]
    coarse: Float[Array, "rounded_chunks rounded_size dim"]
    sample: Float[Array, "sampled_chunks sampled_size dim_or_few"]
    sampled: Int[Array, " sampled"]
    in_sample: Int[Array, " vertices_or_none"]
    components: Float[Array, "dim few"]
    sketch: Float[Array, "sketched_chunks sketched_size few"]
    left_out: Float[Array, "sketched_chunks sketched_size"]
    gram: Float[Array, "inner inner"]
    inverse_covariance: Float[Array, "across across"]
    inverse_in_components: Float[Array, "few few"]
    radius: Float[Array, ""]
    flushed: Float[Array, ""]
    constant: Bool[Array, " dim"]

    @property
    def num_vertices(self) -> int:
        """Number of vertices."""
        return self.vertices.shape[0]

    @property
    def phases(self) -> tuple[int, ...]:
        """See `Oracle`."""
        rows = {SAMPLE: self.sample, SKETCH: self.sketch, COARSE: self.coarse, FINE: self.rows}
        return tuple(phase for phase, chunks in rows.items() if chunks.shape[0])

    @property
    def num_classes(self) -> int:
        """Number of residue classes, each of which names one candidate a pass."""
        return num_classes(self.num_vertices)

    @property
    def num_nearby(self) -> int:
        """See `Oracle`: where passes are long, and their rows of so many short."""
        chunks, _, dim = self.rows.shape
        number = _GROUPS * self.num_classes
        pays = self.num_vertices >= _SMALLEST_NEARBY and number * dim <= _NEARBY
        return number if pays and chunks >= _GROUPS else 0

    def screen(
        self,
        direction: Float[Array, "lanes dim"],
        masked: Int[Array, "lanes slots"],
        *,
        phase: int = FINE,
    ) -> Screened:
        """One pass; see the module's docstring.

        Args:
          direction: float32, of norm about one.
          masked: vertices left out, `num_vertices` where a slot masks none.
          phase: what it runs over; `FINE` alone bounds anything.
        """
        if phase <= SKETCH and self.components.shape[1]:
            direction = _numerics.product(direction, self.components)
        return self.screen_projected(direction, masked, phase=phase)

    def screen_projected(
        self,
        direction: Float[Array, "lanes dim_or_few"],
        masked: Int[Array, "lanes slots"],
        *,
        phase: int,
    ) -> Screened:
        """The same for a direction in the coordinates of the rows of that phase."""
        rows = {SAMPLE: self.sample, SKETCH: self.sketch, COARSE: self.coarse, FINE: self.rows}
        number, local = self.num_vertices, masked
        if phase == SAMPLE:
            number = self.sampled.shape[0]
            local = self.in_sample[jnp.minimum(masked, self.num_vertices - 1)]
            local = jnp.where(masked < self.num_vertices, local, jnp.int32(number))
        grouped = phase >= COARSE and self.num_nearby > 0
        found = _screen(rows[phase], number, self.num_classes, direction, local, grouped=grouped)
        if not grouped:
            nearby = jnp.broadcast_to(0 * masked[:, :1], (len(masked), self.num_nearby))
            found = found._replace(nearby=nearby)
        return found._replace(index=self.sampled[found.index]) if phase == SAMPLE else found

    def screen_nearby(
        self,
        direction: Float[Array, "lanes dim"],
        masked: Int[Array, "lanes slots"],
        nearby: Int[Array, "lanes nearby"],
    ) -> Screened:
        """The best of each class among what all lanes hold in `nearby`, as `screen` has named it.

        Their rows are read once for all lanes, and one lane's vertices often serve another.
        """
        number, classes = self.num_vertices, self.num_classes
        named = nearby.reshape(-1)
        order = jnp.arange(len(named), dtype=jnp.int32)
        # A vertex counts at the last of its places. Others seem to be at the first, which tells.
        last = jnp.zeros(number, jnp.int32).at[named].max(order, mode="drop")
        counts = (named < number) & (last[jnp.minimum(named, number - 1)] == order)
        local = jnp.cumsum(counts, dtype=jnp.int32) - 1
        none = jnp.int32(len(named))
        chosen = jnp.zeros_like(named).at[jnp.where(counts, local, none)].set(named, mode="drop")
        at = last[jnp.minimum(masked, number - 1)]
        masked = jnp.where(named[at] == masked, local[at], none)
        places = in_chunks(self.place(chosen)[:, None], classes)[:, :, 0]
        found = _screen(self.rows, local[-1] + 1, classes, direction, masked, places=places)
        return Screened(found.value, chosen[found.index], nearby)

    def place(self, index: Int[Array | np.ndarray, "*slots"]) -> Int[Array, "*slots"]:
        """Where vertices are in `rows`, counted over all chunks."""
        index, size = jnp.asarray(index, jnp.int32), self.rows.shape[1]
        within = _place_in_chunk(index % size, size, self.num_classes)
        return index // size * size + within

    def first_direction(self, shifted: Float[Array, "lanes dim"]) -> Float[Array, "lanes dim"]:
        """The direction that separates a query best from a normal distribution like the vertices'.

        Args:
          shifted: queries, centred and scaled like the rows.

        Source: Fisher, "The use of multiple measurements in taxonomic problems", 1936, for a class
        of one point; the covariance is shrunk towards its mean variance by a fixed share.
        """
        return unit_directions(shifted, self.inverse_covariance)

    def gather(self, index: Int[Array, "*slots"]) -> Float[Array, "*slots dim"]:
        """Rows of vertices in the caller's own numbers."""
        return self.vertices[index]

    def error(
        self, direction: Float[Array, "lanes dim"], rounded: Float[Array, "lanes dim"]
    ) -> Float[Array, " lanes"]:
        """Bound of the error of a screened value, for a float64 direction of norm at most 2."""
        dim = direction.shape[1]
        radius = self.radius.astype(jnp.float64)
        wide = rounded.astype(jnp.float64)
        moved = jnp.sqrt(jnp.sum((direction - wide) ** 2, axis=1))
        length = jnp.sqrt(jnp.sum(wide**2, axis=1))
        gamma = dim * _U32 / (1 - dim * _U32) if dim * _U32 < 0.5 else jnp.inf
        # 1.0001 covers (1 + u)^2, the float64 roundings and |direction| against |rounded|.
        return 1.0001 * (radius * (gamma * length + moved + _U32 * (length + moved))) + dim * 2e-38


def unit_directions(
    shifted: Float[Array, "lanes dim"], inverse_covariance: Float[Array, "across across"]
) -> Float[Array, "lanes dim"]:
    """Float32 directions from centred queries to the centre, by the covariance if it is known."""
    size = jnp.sqrt(jnp.sum(shifted * shifted, axis=1, keepdims=True))
    away = (-shifted / jnp.where(size > 0, size, 1)).astype(jnp.float32)
    if inverse_covariance.shape[0]:
        away = _numerics.product(away, inverse_covariance)
    size = jnp.sqrt(jnp.sum(away * away, axis=1, keepdims=True))
    return away / jnp.where(size > 0, size, 1)


def num_classes(num_vertices: int) -> int:
    """Classes by size: enough candidates a pass, and few enough to be ranked cheaply."""
    return 16 if num_vertices <= 2048 else 32


def exponent_of(value: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The least e with |value| <= 2^e for a float64 scalar, within the normal range; 0 for 0."""
    positive = jnp.where((value > 0) & jnp.isfinite(value), value, 1.0)
    bits = lax.bitcast_convert_type(positive, jnp.int64)
    exponent = lax.shift_right_logical(bits, jnp.int64(52)).astype(jnp.int32) - 1022
    return jnp.clip(exponent, -1000, 1000)


def power_of_two(exponent: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^exponent in float64, exactly, for exponents in the normal range (clipped to it)."""
    biased = jnp.clip(exponent, -1022, 1023).astype(jnp.int64) + 1023
    return lax.bitcast_convert_type(lax.shift_left(biased, jnp.int64(52)), jnp.float64)


def flushed(array: Array, exponent: Array) -> Array:
    """At least the norm of what scaling by 2^-exponent flushes to zero in any row, scaled.

    Devices read subnormal numbers as zero, and scaling makes some of those of float64 subnormal.
    Only arrays that hold such numbers pay: 0 otherwise.
    """
    info = jnp.finfo(array.dtype)
    unsigned = _UNSIGNED[array.dtype.itemsize]
    magnitude = lax.shift_left(lax.bitcast_convert_type(array, unsigned), jnp.asarray(1, unsigned))
    smallest = 2 << info.nmant
    subnormal = jnp.any((magnitude > 0) & (magnitude < jnp.asarray(smallest, unsigned)))
    lost = float(info.smallest_normal) * power_of_two(-exponent)
    bound = jnp.where(subnormal, lost, 0.0)
    if array.dtype == jnp.float64:
        size = jnp.abs(array)
        tiny = jnp.any((size > 0) & (size < power_of_two(exponent - 900)))
        bound = bound + jnp.where(tiny, 2.0**-960, 0.0)
    return array.shape[-1] ** 0.5 * bound


def in_chunks(rows: Array, classes: int) -> Array:
    """Rows as `(chunks, size, dim)`, padded with zero rows; `size` is a multiple of `classes`.

    The rows of a class are neighbours, so that its minimum runs over scores that are, too. A chunk
    of the CPU is short: its scores stay in cache, and its slices are unrolled. Accelerators want
    few and large products.
    """
    num_rows, dim = rows.shape
    least, most = _SLICES
    most = min(most, max(least, _CHUNK_BYTES // (4 * dim * classes)))
    most = _LONG_SLICES if dim >= _LONG else most
    if jax.default_backend() != "cpu":
        most = _CHUNK_ROWS // classes
    if num_rows <= _UNROLLED * classes:
        most = _UNROLLED
    chunks = max(1, -(-num_rows // (most * classes)))
    size = -(-num_rows // (chunks * classes)) * classes
    padded = jnp.pad(rows, ((0, chunks * size - num_rows), (0, 0)))
    sliced = padded.reshape(chunks, size // classes, classes, dim)
    return jnp.swapaxes(sliced, 1, 2).reshape(chunks, size, dim)


def _place_in_chunk(local: Array, size: int, classes: int) -> Array:
    """Where the local-th row of a chunk is: classes one after the other; `size` stays itself."""
    slices, classes = jnp.int32(size // classes), jnp.int32(classes)
    place = lax.rem(local, classes) * slices + lax.div(local, classes)
    return jnp.where(local < size, place, jnp.int32(size))


def _chunk_of(rows: Array, number: Array) -> Array:
    """One chunk. A plain copy becomes a call of memcpy, four times slower on some processors."""
    block = lax.dynamic_index_in_dim(rows, number, keepdims=False)
    unsigned = _UNSIGNED[block.dtype.itemsize]
    nothing = (number < 0).astype(unsigned)
    bits = lax.bitcast_convert_type(block, unsigned) | nothing
    return lax.bitcast_convert_type(bits, block.dtype)


def _screen(
    rows: Array,
    num_rows: int | Array,
    classes: int,
    direction: Array,
    masked: Array,
    *,
    grouped: bool = False,
    places: Array | None = None,
) -> Screened:
    """Scores as `(rows, lanes)`, so that minima over rows are elementwise between slices.

    `nearby` is filled where chunks are `grouped`. With `places`, in chunks, of which `num_rows` are
    in use, these rows alone count.
    """
    dim = rows.shape[2]
    chunks, size = rows.shape[:2] if places is None else places.shape
    lanes, slices = direction.shape[0], size // classes
    all_rows, columns = rows.reshape(-1, dim), direction.T.astype(rows.dtype)
    lane = jnp.arange(lanes, dtype=jnp.int32)[:, None]
    row = jnp.arange(classes, dtype=jnp.int32)[:, None]

    def score(block: Array, columns: Array, place: Array) -> Array:
        scores = _numerics.product(block, columns, jnp.float32)
        at = place * lanes + lane
        return scores.reshape(-1).at[at].set(jnp.inf, mode="drop").reshape(len(block), lanes)

    def least(number: Array, scores: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        """The least of each class so far and its slice, counted over all chunks."""
        scores = scores.reshape(classes, slices, lanes)
        if slices > _UNROLLED or jax.default_backend() != "cpu":
            inside = number * slices + jnp.arange(slices, dtype=jnp.int32)[None, :, None]
            scores = jnp.where(inside * classes + row[:, None] < num_rows, scores, jnp.inf)
            value = jnp.min(scores, axis=1)
            far = jnp.int32(chunks * slices)
            which = jnp.min(jnp.where(scores == value[:, None], inside, far), axis=1)
            better = value < best[0]
            return jnp.where(better, value, best[0]), jnp.where(better, which, best[1])
        for place in range(slices):
            values, at = scores[:, place], number * slices + place
            # Padding rows are never the least: of all rows only the last slices can hold any.
            if places is not None or (chunks - 1) * size + (place + 1) * classes > num_rows:
                values = jnp.where(at * classes + row < num_rows, values, jnp.inf)
            better = values < best[0]
            best = jnp.where(better, values, best[0]), jnp.where(better, at, best[1])
        return best

    first = direction.T[:1]
    nothing = jnp.where(jnp.isfinite(first), 0 * first, 0)
    empty = jnp.zeros((classes, 1), jnp.float32) + nothing
    best = (empty + jnp.inf, empty.astype(jnp.int32))

    def chunk(number: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        number = number.astype(jnp.int32)
        local = masked - number * size
        local = jnp.where((local < 0) | (local >= size), jnp.int32(size), local)
        place = _place_in_chunk(local, size, classes)
        block = _chunk_of(rows, number) if places is None else all_rows[places[number]]
        return least(number, score(block, columns, place), best)

    def whole(turn: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        # Whatever depends on `turn` stays in the loop, where columns are not transposed again:
        # bfloat16 products of transposed operands are slow.
        place = masked // size * size + _place_in_chunk(masked % size, size, classes)
        scores = score(all_rows, jnp.where(turn < 0, 0, columns), place)
        scores = scores.reshape(chunks, size, lanes)
        return lax.fori_loop(
            jnp.int32(0),
            jnp.int32(chunks),
            lambda number, best: least(number, scores[number], best),
            best,
        )

    def group(number: Array, kept: tuple[Array, Array]) -> tuple[Array, Array]:
        each = -(-chunks // _GROUPS)
        first = number.astype(jnp.int32) * each
        found = lax.fori_loop(first, jnp.minimum(first + each, chunks), chunk, best)
        keep = partial(lax.dynamic_update_index_in_dim, index=number, axis=0)
        return jax.tree.map(keep, kept, found)

    if grouped:
        kept = jax.tree.map(lambda array: jnp.broadcast_to(array, (_GROUPS, classes, lanes)), best)
        value, which = lax.fori_loop(jnp.int32(0), jnp.int32(_GROUPS), group, kept)
        index = which * classes + row[None]
        nearby = jnp.where(value < jnp.inf, index, jnp.int32(num_rows)).reshape(-1, lanes)
        last = _numerics.argmin(jnp.moveaxis(value, 0, 2))[None]
        index = jnp.take_along_axis(index, last, axis=0)[0]
        return Screened(jnp.min(value, axis=0).T, index.T, nearby.T)
    at_once = jax.default_backend() == "cpu" and dim >= _LONG and chunks * size * lanes < 2**31
    if places is not None:
        in_use = lax.div(num_rows + (size - 1), jnp.int32(size))
        best = lax.fori_loop(jnp.int32(0), in_use, chunk, best)
    elif chunks > 1 and not at_once:
        best = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, best)
    else:
        # A loop of one round, of which no compiler knows: else every use repeats the minima.
        once = 1 + (rows[0, 0, 0] == jnp.inf).astype(jnp.int32)
        best = lax.fori_loop(jnp.int32(0), once, whole, best)
    index = (best[1] * classes + row).T
    return Screened(best[0].T, index, index[:, :0])
