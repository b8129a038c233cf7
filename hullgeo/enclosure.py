"""Float64 enclosures on few vertices: products with proved errors, refined directions, balls.

Everything here concerns the scaled rows u_i = (v_i - q) / scale of a query's support, each entry
right to U = 2^-53 relative because v and q are the caller's own numbers and one subtraction rounds.

*Products.* A float64 sum of k products errs by at most gamma_k = k U / (1 - k U) times the sum of
the absolute products (Higham 2002, section 3.1). That is not enough next to the hull, where the
distance is 1e-9 of the radius. Splitting both factors into a head of b bits and a tail makes the
product of the heads *exact* in any order of summation if 2 b + log2(k) <= 53 (Ozaki, Ogita, Oishi
and Rump, "Error-free transformations of matrix multiplication", 2012), and what remains is 2^-b
smaller: three plain products give nearly twice the precision.

*Directions.* Any g gives a bound: distance >= min_i <u_i, g> / |g|. The residual
r = sum_i w_i u_i is rounded at U times the radius, which ruins it as a direction close to the hull.
Removing from it the component along the affine hull of the support costs two solves with the
tableau and leaves g right relative to its own size.

*Balls.* For d + 1 affinely independent rows with positive weights w, the simplex contains the ball
of radius min_i w_i h_i around x = sum_i w_i u_i; h_i is the height of vertex i over the opposite
facet, 1 / h_i the norm of the i-th column of inv([u, 1]) without its last entry. If |x| is less,
the query (the origin) lies inside, at distance exactly 0.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from hullgeo import active_set
from hullgeo._numerics import product
from hullgeo.active_set import ActiveSet
from hullgeo.oracle import exponent_of, power_of_two

U64 = 2.0**-53


def length(array: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """Euclidean norm of float64 numbers of order one."""
    return jnp.sqrt(jnp.sum(array * array, axis=-1))


def scores(
    rows: Float[Array, "lanes slots dim"],
    direction: Float[Array, "lanes dim"],
    norms: Float[Array, "lanes slots"],
    *,
    exact: bool,
) -> tuple[Float[Array, "lanes slots"], Float[Array, "lanes slots"]]:
    """`<u_i, direction>` of the exact rows and a bound of its error, for |direction| <= 1.01.

    Args:
      rows: the rounded rows.
      direction: any numbers.
      norms: of the rows, computed or bounded.
      exact: split the products.
    """
    dim = rows.shape[2]
    if not exact:
        return active_set.scores(rows, direction), score_error(dim, norms)
    bits = _bits(dim)
    row_heads, row_size = _heads(rows, bits)
    heads, size = _heads(direction, bits)
    value = active_set.scores(row_heads, heads) + (
        active_set.scores(row_heads, direction - heads)
        + active_set.scores(rows - row_heads, direction)
    )
    tails = 2.0**-bits * dim * row_size * size[:, None]
    return value, 1.1 * U64 * (norms + 3 * jnp.abs(value) + (dim + 4) * tails)


def score_error(dim: int, norms: Array) -> Array:
    """Bound of the error of plain scores in a direction of norm one, divided by its norm or after.

    The row, the sum, the direction and the quotient round: (dim + 3) U |u_i|.
    """
    return 1.1 * (dim + 4) * U64 * norms


def point(
    weights: Float[Array, "lanes slots"],
    rows: Float[Array, "lanes slots dim"],
    norms: Float[Array, "lanes slots"],
    *,
    exact: bool,
) -> tuple[Float[Array, "lanes dim"], Float[Array, " lanes"]]:
    """`sum_i w_i u_i / sum_i w_i` of the exact rows, and a bound of the norm of its error."""
    slots = rows.shape[1]
    total = jnp.sum(weights, axis=1)
    safe = jnp.where(total > 0, total, 1)
    spread = jnp.sum(weights * norms, axis=1) / safe
    if not exact:
        value = active_set.combine(weights, rows) / safe[:, None]
        return value, 1.1 * (2 * slots + 6) * U64 * spread
    # The sum of the weights must be exact as well: it is where heads of weights of order one are.
    bits = _bits(slots)
    weights = weights / safe[:, None]
    total = jnp.sum(weights, axis=1)
    heads, _ = _heads(weights, bits)
    columns, _ = _heads(jnp.swapaxes(rows, 1, 2), bits)
    row_heads = jnp.swapaxes(columns, 1, 2)
    value = active_set.combine(heads, row_heads) + (
        active_set.combine(weights - heads, row_heads)
        + active_set.combine(weights, rows - row_heads)
    )
    tails = jnp.abs(weights - heads) * length(row_heads) + weights * length(rows - row_heads)
    tails = (slots + 4) * jnp.sum(tails, axis=1)
    error = 1.1 * U64 * (spread + (slots + 8) * length(value) + tails)
    return value / total[:, None], error


def refine(
    active: ActiveSet,
    rows: Float[Array, "lanes slots dim"],
    weights: Float[Array, "lanes slots"],
    direction: Float[Array, "lanes dim"],
    done: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "lanes slots"], Float[Array, "lanes dim"], Float[Array, "lanes slots"]]:
    """Make the scores of the basis equal, correcting weights and direction alike, in two rounds.

    Solves for the change delta with sum(delta) = 0 and U U' delta = mean score - score by the
    tableau, which may be of lower precision: each round gains its accuracy.

    Args:
      active: the slots.
      rows: of all slots.
      weights: of the slots.
      direction: any, such as `sum_i weights_i rows_i`.
      done: given the scores after a round, a scalar that says whether it was enough.

    Returns:
      weights, direction and the scores of all slots in that direction.
    """
    mask = active.basic
    count = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1).astype(rows.dtype)
    ones = active_set.solve_basis(active, jnp.ones_like(active.value)).astype(rows.dtype)
    ones_sum = jnp.sum(ones, axis=1)
    ones_sum = jnp.where(ones_sum > 0, ones_sum, 1)

    def correct(weights: Array, direction: Array, value: Array) -> tuple[Array, Array, Array]:
        mean = jnp.sum(jnp.where(mask, value, 0), axis=1) / count
        off = jnp.where(mask, value - mean[:, None], 0)
        size = jnp.max(jnp.abs(off), axis=1)
        size = jnp.where(size > 0, size, 1)
        solved = active_set.solve_basis(active, off / size[:, None]).astype(rows.dtype)
        level = jnp.sum(solved, axis=1) / ones_sum
        delta = size[:, None] * (level[:, None] * ones - solved)
        delta = jnp.where(jnp.isfinite(delta), delta, 0)
        direction = direction + active_set.combine(delta, rows)
        return weights + delta, direction, active_set.scores(rows, direction)

    once = correct(weights, direction, active_set.scores(rows, direction))
    if done is None:
        return correct(*once)
    return lax.cond(done(once[2]), lambda *state: state, correct, *once)


def interior_radius(
    rows: Float[Array, "slots dim"],
    weights: Float[Array, " slots"],
    constant: Bool[Array, " dim"],
    size: Float[Array, ""],
    error: Float[Array, ""],
) -> Float[Array, ""]:
    """Radius of a ball around the query inside the simplex of the support, 0 if none is proved.

    Proof. With A = [u, 1] and any X, F = I - X A of norm phi < 1 gives inv(A) = inv(I - F) X, hence
    |inv(A) e_i| <= |X e_i| / (1 - phi) and h_i >= (1 - phi) / |X e_i|. phi is bounded by Frobenius
    norms, rounding of X A and of the rows included.

    Args:
      rows: u of one query.
      weights: nonnegative, of sum one; positive on the support.
      constant: coordinates in which all vertices and the query agree exactly: hull and ball are
        meant in the others.
      size: computed norm of `sum_i weights_i u_i`.
      error: bound of the error of `size`.
    """
    rows, constant, enough = _varying(rows, constant)
    slots, dim = rows.shape
    order = dim + 1
    support = weights > 0
    # Rows of the support first; the rows after them are unit vectors of the constant coordinates.
    position = jnp.cumsum(support.astype(jnp.int32), dtype=jnp.int32) - 1
    place = jnp.where(support, position, jnp.int32(order))
    homogeneous = jnp.concatenate([rows, jnp.ones((slots, 1), rows.dtype)], axis=1)
    matrix = jnp.zeros((order, order), rows.dtype).at[place].set(homogeneous, mode="drop")
    weight = jnp.zeros((order,), rows.dtype).at[place].set(weights, mode="drop")
    number = jnp.sum(support, dtype=jnp.int32)
    unit_row = number + jnp.cumsum(constant.astype(jnp.int32), dtype=jnp.int32) - 1
    unit_row = jnp.where(constant, unit_row, jnp.int32(order))
    coordinate = jnp.arange(dim, dtype=jnp.int32)
    matrix = matrix.at[unit_row, coordinate].set(1.0, mode="drop")
    inverse = jnp.linalg.inv(matrix)
    defect = jnp.eye(order, dtype=rows.dtype) - product(inverse, matrix)
    frobenius = jnp.sqrt(jnp.sum(inverse**2)) * jnp.sqrt(jnp.sum(matrix**2))
    phi = jnp.sqrt(jnp.sum(defect**2)) + 1.1 * (order + 4) * U64 * frobenius
    gradients = jnp.sqrt(jnp.sum(inverse[:-1] ** 2, axis=0)) * (1 + 2 * order * U64)
    real = jnp.arange(order, dtype=jnp.int32) < number
    heights = jnp.where(real, weight * (1 - phi) / gradients, jnp.inf)
    # The normalisation of the weights and the products above round at most a few times.
    radius = jnp.min(heights) * (1 - (slots + 16) * U64) - size - error
    square = number + jnp.sum(constant, dtype=jnp.int32) == order
    return jnp.where(enough & square & (phi < 0.5) & (radius > 0), radius, 0.0)


def _varying(rows: Array, constant: Array) -> tuple[Array, Array, Array]:
    """Only as many coordinates as a simplex of the slots can span, constant ones dropped.

    Returns:
      rows and marks of constants in the coordinates kept, and whether these are all that vary.
    """
    slots, dim = rows.shape
    kept = min(dim, max(1, slots - 1))
    position = jnp.cumsum(~constant, dtype=jnp.int32) - 1
    number = jnp.sum(~constant, dtype=jnp.int32)
    place = jnp.where(constant, jnp.int32(kept), position)
    column = (
        jnp.zeros((kept,), jnp.int32).at[place].set(jnp.arange(dim, dtype=jnp.int32), mode="drop")
    )
    left = jnp.arange(kept, dtype=jnp.int32) >= number
    return jnp.where(left[None], 0.0, rows[:, column]), left, number <= kept


def _bits(terms: int) -> int:
    return (53 - math.ceil(math.log2(max(terms, 2)))) // 2


def _heads(array: Array, bits: int) -> tuple[Array, Array]:
    """The leading `bits` bits relative to the largest entry of the last axis, and its size."""
    exponent = exponent_of(jnp.max(jnp.abs(array), axis=-1))
    size = power_of_two(exponent)
    up, down = power_of_two(bits - exponent), power_of_two(exponent - bits)
    return lax.round(array * up[..., None], lax.RoundingMethod.TO_NEAREST_EVEN) * down[
        ..., None
    ], size
