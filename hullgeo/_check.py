"""Eager checks of options and shapes, with one message form: argument, value, way out.

Checks run in Python before anything is traced, so they see shapes and dtypes everywhere and the
values of options only where these are concrete: a traced tolerance passes.
"""

import numbers
from collections.abc import Iterable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import Tracer


def fail(name: str, value: Any, expected: str, way_out: str = "") -> NoReturn:
    """Raise the `ValueError` that every check uses."""
    message = f"Expected {name} {expected}, got {name}={value!r}."
    raise ValueError(f"{message} {way_out}".rstrip())


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at now (it is not a tracer)."""
    return not isinstance(value, Tracer)


def _is_number(value: Any) -> bool:
    if isinstance(value, numbers.Real):
        return True
    kinds = (np.floating, np.integer)
    return np.ndim(value) == 0 and any(
        jax.numpy.issubdtype(getattr(value, "dtype", object), kind) for kind in kinds
    )


def nonnegative(name: str, value: Any) -> None:
    """A tolerance: a finite number >= 0 (traced values pass)."""
    if is_concrete(value) and not (_is_number(value) and 0 <= float(value) < np.inf):
        fail(name, value, "to be a finite number >= 0")


def positive(name: str, value: Any) -> None:
    """A finite number > 0 (traced values pass)."""
    if is_concrete(value) and not (_is_number(value) and 0 < float(value) < np.inf):
        fail(name, value, "to be a finite number > 0")


def at_least(name: str, value: Any, minimum: int) -> None:
    """An integer option that sizes arrays or limits a loop (traced values pass)."""
    if not is_concrete(value):
        return
    integral = isinstance(value, numbers.Integral) or (
        np.ndim(value) == 0 and np.issubdtype(getattr(value, "dtype", np.float64), np.integer)
    )
    if not integral or isinstance(value, bool) or int(value) < minimum:
        fail(name, value, f"to be an integer >= {minimum}")


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """An option that names one of a few choices."""
    allowed = list(allowed)
    if np.ndim(value) != 0 or value not in allowed:
        fail(name, value, "to be one of " + ", ".join(map(repr, allowed)))


def floating(name: str, array: Any) -> None:
    """An array of real numbers in a floating type."""
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        fail(
            f"{name}.dtype",
            str(array.dtype),
            "to be floating point",
            f"Convert it first, e.g. {name}.astype('float32').",
        )


def rank_at_least(name: str, array: Any, minimum: int, meaning: str) -> None:
    """Enough axes: `meaning` says what the trailing ones are, e.g. '(*batch, dim)'."""
    if array.ndim < minimum:
        fail(f"{name}.shape", array.shape, f"to be {meaning}")


def shape(name: str, array: Any, expected: tuple[int | None, ...], meaning: str) -> None:
    """An exact shape, `None` standing for any size > 0."""
    fits = len(expected) == array.ndim and all(
        size > 0 if want is None else size == want
        for size, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        fail(f"{name}.shape", array.shape, f"to be {meaning}")


def all_finite(name: str, array: Any, way_out: str = "") -> None:
    """No NaN or infinity anywhere, naming the first bad row (traced values pass)."""
    if not is_concrete(array):
        return
    finite = np.isfinite(np.asarray(array, dtype=np.float64)) if array.size else np.ones(0, bool)
    if not finite.all():
        row = tuple(int(index) for index in np.argwhere(~finite)[0])
        fail(f"{name}{list(row)}", float(np.asarray(array)[row]), "to be finite", way_out)
