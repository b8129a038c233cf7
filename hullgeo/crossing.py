"""Where the class changes along a segment of images, by evaluating the caller's own function.

Along x(t) = (1 - t) start + t end, let a be the class at t = 0. The margin
f(t) = z_a(x(t)) - max_{j != a} z_j(x(t)) is nonnegative where a is the class and nonpositive where
it is not, so that ends of different classes bracket a change of sign. Each step interpolates the
margin through the last three points (Chandrupatla, Advances in Engineering Software 28, 1997) and
moves the result just far enough towards the middle that bisection's worst case is kept up to
`_SLACK` evaluations (the projection of ITP: Oliveira and Takahashi, ACM TOMS 47, 2020).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from hullgeo import _check
from hullgeo.result import Crossing, Status

# Evaluations that interpolation may cost beyond bisection, at worst.
_SLACK = 3
# How far beyond an interpolated root to step, in units of xtol: the next step from the other side
# closes the bracket, and neither end lies so near the root that rounding decides its class.
_REACH = 0.45


def find_crossing(
    logits_fn: Callable[[Any], Array],
    start: Shaped[Array | np.ndarray, "..."],
    end: Shaped[Array | np.ndarray, "..."],
    *,
    xtol: float | Array = 1e-6,
    max_evaluations: int | Array = 64,
) -> Crossing:
    """Bracket one change of class on each segment of images.

    All segments are evaluated as one batch in each step; finished ones stay frozen. Passing the
    same `logits_fn` again compiles nothing: a pytree of arrays (a `Classifier`, a
    `jax.tree_util.Partial`) is an argument of the compiled program, any other callable is known by
    its identity, so give a named function rather than a new lambda each time.

    Args:
      logits_fn: images `(*batch, *image)` -> logits `(*batch, num_classes)`, any leading batch; row
        by row, hence in evaluation mode.
      start: images at position 0, `(*batch, height, width, channels)` or any other image shape: the
        logits tell how many axes are batch.
      end: images at position 1, of the same shape and dtype.
      xtol: largest width of a bracket, in units of the segment's length.
      max_evaluations: evaluations of the logits per segment at most, both ends included;
        ceil(log2(1 / xtol)) + 5 always suffice.

    Returns:
      a `Crossing` with fields `(*batch,)`; where the ends agree the status is `NO_CROSSING` and
      says nothing about the classes between.

    Raises:
      ValueError: for shapes, dtypes or options that do not fit.

    Guarantee: wherever the status is neither `NO_CROSSING` nor `NONFINITE`, `logits_fn` evaluated
    in this batch has the class `class_lower` at `(1 - lower) * start + lower * end` and
    `class_upper`, another one, at `upper`; the smallest index wins a tie. There may be further
    crossings on the segment, also within the bracket.
    """
    start, end, batch = check_segments(logits_fn, start, end)
    _check.nonnegative("xtol", xtol)
    _check.at_least("max_evaluations", max_evaluations, 2)
    image = start.shape[len(batch) :]
    arrays, fixed = split_callable(logits_fn)
    rows = jnp.zeros(batch, position_dtype(start.dtype)).reshape(-1)
    result = find_crossings(
        fixed,
        arrays,
        start.reshape(-1, *image),
        end.reshape(-1, *image),
        rows,
        rows + 1,
        jnp.asarray(xtol, rows.dtype),
        jnp.asarray(max_evaluations, jnp.int32),
    )
    return Crossing(*(field.reshape(batch) for field in result))


class _Fixed(NamedTuple):
    """What of a callable is no array: hashed by the compiled program's cache."""

    treedef: Any
    leaves: tuple[Any, ...]


def split_callable(function: Callable) -> tuple[list[Any], _Fixed]:
    """The arrays of a callable pytree, and all else; a plain function has no arrays."""
    leaves, treedef = jax.tree.flatten(function)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [leaf for leaf, keep in zip(leaves, is_array, strict=True) if keep]
    others = tuple(None if keep else leaf for leaf, keep in zip(leaves, is_array, strict=True))
    return arrays, _Fixed(treedef, others)


def join_callable(arrays: list[Any], fixed: _Fixed) -> Callable:
    """Inverse of `split_callable`."""
    remaining = iter(arrays)
    leaves = [next(remaining) if leaf is None else leaf for leaf in fixed.leaves]
    return jax.tree.unflatten(fixed.treedef, leaves)


def position_dtype(dtype: Any) -> Any:
    """Positions are at least float32, whatever the images are."""
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32)


def blend(start: Array, end: Array, position: Array) -> Array:
    """Images at positions `(rows,)` of segments `(rows, *image)`, exact at both ends."""
    column = position.reshape(-1, *[1] * (start.ndim - 1))
    mixed = (1 - column) * start.astype(column.dtype) + column * end.astype(column.dtype)
    return mixed.astype(start.dtype)


def check_segments(logits_fn, start, end):
    """Arrays and the batch shape, from the shape of the logits."""
    start, end = jnp.asarray(start), jnp.asarray(end)
    _check.floating("start", start)
    _check.floating("end", end)
    if end.shape != start.shape:
        _check.fail("end.shape", end.shape, f"to be start's {start.shape}")
    if end.dtype != start.dtype:
        _check.fail("end.dtype", str(end.dtype), f"to be start's {start.dtype}")
    if start.size == 0:
        _check.fail("start.shape", start.shape, "to have no empty axis")
    arrays, fixed = split_callable(logits_fn)
    shapes = tuple((array.shape, array.dtype) for array in arrays)
    logits = _logits_shape(fixed, shapes, start.shape, start.dtype)
    if (
        logits.ndim < 1
        or logits.shape[-1] < 1
        or logits.shape[:-1] != start.shape[: logits.ndim - 1]
    ):
        _check.fail(
            "logits_fn(start).shape",
            logits.shape,
            f"to be (*batch, num_classes) for images of shape {start.shape}",
            "Pass a function that maps a leading batch of images row by row.",
        )
    return start, end, logits.shape[:-1]


@functools.lru_cache(maxsize=64)
def _logits_shape(fixed, shapes, shape, dtype):
    arrays = [jax.ShapeDtypeStruct(*array) for array in shapes]
    image = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda arrays, x: join_callable(arrays, fixed)(x), arrays, image)


class _Bracket(NamedTuple):
    """One bracket per row; `older` is the third point of the interpolation."""

    lower: Array
    upper: Array
    older: Array
    margin_lower: Array
    margin_upper: Array
    margin_older: Array
    class_lower: Array
    class_upper: Array
    newest_is_lower: Array
    num_evaluations: Array
    finite: Array


@jax.jit(static_argnums=0)
def find_crossings(fixed, arrays, start, end, lower, upper, xtol, max_evaluations):
    """`find_crossing` on rows of segments, each between positions of its own."""
    logits_fn = join_callable(arrays, fixed)
    dtype = xtol.dtype
    count = jnp.zeros_like(lower, jnp.int32)
    width_goal = jnp.maximum(xtol, jnp.finfo(dtype).eps / 2)
    budget = jnp.ceil(jnp.log2((upper - lower) / width_goal)) + _SLACK

    def running(state):
        within = (state.num_evaluations < max_evaluations) & state.finite
        step = state.num_evaluations
        middle = _middle(state)
        open_ = (
            (state.class_lower != state.class_upper)
            & ~(state.upper - state.lower <= xtol)
            & (state.lower < middle)
            & (middle < state.upper)
        )
        return within & ((step < 2) | open_)

    def advance(state):
        active = running(state)
        step = state.num_evaluations
        position = jnp.where(step == 0, lower, _interpolate(state, width_goal, budget))
        position = jnp.where(step == 1, upper, position)
        position = jnp.where(active, position, state.lower)
        logits = logits_fn(blend(start, end, position)).astype(dtype)
        label = lax.argmax(logits, 1, jnp.int32)
        class_lower = jnp.where(step == 0, label, state.class_lower)
        margin = _margin(logits, class_lower)
        new = _insert(state, step, position, margin, label, class_lower)
        new = new._replace(num_evaluations=step + 1, finite=jnp.all(jnp.isfinite(logits), axis=1))
        # A row that met NaN keeps the bracket it had: what that claims is still true.
        kept = jax.tree.map(lambda fresh, old: jnp.where(new.finite, fresh, old), new, state)
        kept = kept._replace(num_evaluations=new.num_evaluations, finite=new.finite)
        return jax.tree.map(lambda fresh, old: jnp.where(active, fresh, old), kept, state)

    zero = jnp.zeros_like(lower)
    initial = _Bracket(
        lower, upper, lower, zero, zero, zero, count, count, count > 0, count, count == 0
    )
    final = lax.while_loop(lambda state: jnp.any(running(state)), advance, initial)
    width = final.upper - final.lower
    status = jnp.where(width <= xtol, jnp.int32(Status.CONVERGED), jnp.int32(Status.STEP_LIMIT))
    middle = _middle(final)
    split = (final.lower < middle) & (middle < final.upper)
    status = jnp.where((width > xtol) & ~split, jnp.int32(Status.PRECISION_LIMIT), status)
    same = final.class_lower == final.class_upper
    status = jnp.where(same, jnp.int32(Status.NO_CROSSING), status)
    status = jnp.where(final.finite, status, jnp.int32(Status.NONFINITE))
    return Crossing(
        final.lower,
        final.upper,
        final.class_lower,
        final.class_upper,
        final.num_evaluations,
        status,
    )


def _margin(logits, label):
    """z_label - max_{j != label} z_j."""
    is_label = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == label[:, None]
    own = jnp.max(jnp.where(is_label, logits, -jnp.inf), axis=1)
    return own - jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=1)


def _middle(state):
    return state.lower + (state.upper - state.lower) / 2


def _insert(state, step, position, margin, label, class_lower):
    """Replace the end of the same side by the new point."""
    is_lower = (label == class_lower) & (step != 1)

    def choose(lower_value, other):
        return jnp.where(is_lower, lower_value, other)

    return state._replace(
        lower=choose(position, state.lower),
        margin_lower=choose(margin, state.margin_lower),
        class_lower=class_lower,
        upper=choose(state.upper, position),
        margin_upper=choose(state.margin_upper, margin),
        class_upper=choose(state.class_upper, label),
        older=choose(state.lower, state.upper),
        margin_older=choose(state.margin_lower, state.margin_upper),
        newest_is_lower=is_lower,
    )


def _interpolate(state, width_goal, budget):
    """The next position: interpolated where that is trustworthy, else the middle."""
    lower, upper = state.lower, state.upper
    newest = jnp.where(state.newest_is_lower, lower, upper)
    f_newest = jnp.where(state.newest_is_lower, state.margin_lower, state.margin_upper)
    across = jnp.where(state.newest_is_lower, upper, lower)
    f_across = jnp.where(state.newest_is_lower, state.margin_upper, state.margin_lower)
    older, f_older = state.older, state.margin_older
    xi = (newest - across) / (older - across)
    phi = (f_newest - f_across) / (f_older - f_across)
    trusted = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & (state.num_evaluations > 2)
    fraction = f_newest / (f_across - f_newest) * (f_older / (f_across - f_older)) + (
        (older - newest) / (across - newest)
    ) * (f_newest / (f_older - f_newest)) * (f_across / (f_older - f_across))
    middle = _middle(state)
    guess = newest + fraction * (across - newest)
    guess = jnp.where(trusted & jnp.isfinite(guess), guess, middle)
    # Step across the root, towards the farther end.
    reach = _REACH * width_goal
    guess = guess + jnp.where(guess < middle, reach, -reach)
    clear = jnp.minimum(reach, (upper - lower) / 2)
    guess = jnp.clip(guess, lower + clear, upper - clear)
    # Stay so near the middle that the budget of evaluations is kept.
    spent = (state.num_evaluations - 2).astype(lower.dtype)
    radius = width_goal / 2 * 2 ** (budget - spent) - (upper - lower) / 2
    radius = jnp.maximum(radius, 0)
    return jnp.clip(guess, middle - radius, middle + radius)
