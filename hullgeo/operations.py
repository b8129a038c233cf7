"""The operations of a piecewise-linear network: affine ones, kinks, and how each is evaluated.

`Reader` turns the equations of a jaxpr into steps. A step is affine in the values that depend on
the image, or a kink, at which a unit changes its affine piece when a difference d changes sign:

    max(x, y) = y + max(d, 0),   min(x, y) = y + min(d, 0),   where(x > y, a, b),   d = x - y,

and |x| with d = x. Maxima over axes and windows become rounds of pairwise maxima. Any other
operation is refused by its name.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from hullgeo import _check

REAL = (np.dtype(np.float32), np.dtype(np.float64))


class Value(NamedTuple):
    """An intermediate array of the program, for a single image."""

    index: int
    shape: tuple[int, ...]
    varies: bool  # with the position on the line


class Step(NamedTuple):
    """`outputs = apply(dtype, *inputs)`; a kink's first input is the difference d.

    `rule` is the primitive's name, or one of max, min, abs, select, difference and move (values are
    only moved). Steps of equal `rule`, `detail` and shapes do the same.
    """

    rule: str
    detail: str
    apply: Callable[..., list[Any]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


class _Comparison(NamedTuple):
    """A predicate `greater (or equal) than zero` of a difference, possibly negated."""

    difference: Value
    apply: Callable[[Any], Any]


class Reader:
    """Collects steps; every varying value is real."""

    def __init__(self):
        self._count = itertools.count()
        self.steps: list[Step] = []
        self.kinks: set[int] = set()  # positions in steps
        self.constant_steps: list[Step] = []
        self.exact_constants = True
        self.literals: dict[Value, np.ndarray] = {}
        self._comparisons: dict[Value, _Comparison] = {}

    def new(self, shape: Iterable[int], varies: bool) -> Value:
        """An array that no step has made yet."""
        return Value(next(self._count), tuple(shape), varies)

    def literal(self, array: Any) -> Value:
        """An array that is known now."""
        value = self.new(np.shape(array), False)
        self.literals[value] = np.asarray(array)
        return value

    def inline(self, jaxpr, arguments, flat) -> list[Value]:
        """Append all equations to `flat`, nested calls included; returns the output values."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

        def read(atom):
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return self.literal(np.asarray(atom.val, aval.dtype))
            return known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            body = _body(eqn)
            if body is None:
                varies = any(value.varies for value in inputs)
                outputs = [self.new(getattr(var.aval, "shape", ()), varies) for var in eqn.outvars]
                flat.append((eqn, inputs, outputs))
            else:
                closed = [self.literal(const) for const in getattr(body, "consts", ())]
                outputs = self.inline(getattr(body, "jaxpr", body), [*closed, *inputs], flat)
            known |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def affine(self, rule, detail, apply, inputs, shapes) -> list[Value]:
        """An affine step of outputs with these shapes."""
        outputs = [self.new(shape, True) for shape in shapes]
        self.steps.append(Step(rule, detail, apply, tuple(inputs), tuple(outputs)))
        return outputs

    def kink(self, rule, detail, apply, inputs, output) -> None:
        """A step at which the first input's sign decides between affine pieces."""
        self.kinks.add(len(self.steps))
        self.steps.append(Step(rule, detail, apply, tuple(inputs), (output,)))

    def constant_output(self, image: Value, output: Value) -> Value:
        """A constant as a function of the image."""
        apply = lambda dtype, x, value: [value + 0 * jnp.sum(x)]  # noqa: E731
        return self.affine("move", "constant", apply, [image, output], [output.shape])[0]

    def difference(self, left: Value, right: Value) -> Value:
        """left - right of one shape; left itself where right is a literal zero."""
        zero = right in self.literals and not np.any(self.literals[right])
        if left.varies and zero:
            return left
        shape = left.shape or right.shape
        apply = lambda dtype, a, b: [jnp.broadcast_to(a - b, shape)]  # noqa: E731
        return self.affine("difference", "", apply, [left, right], [shape])[0]

    def add(self, eqn, inputs, outputs) -> None:
        """One equation whose nested calls are inlined."""
        name = eqn.primitive.name
        if not outputs[0].varies:
            real = any(var.aval.dtype in REAL for var in eqn.outvars)
            self.exact_constants &= name in MOVES or not real
            apply = functools.partial(_bind, eqn)
            self.constant_steps.append(Step(name, "", apply, tuple(inputs), tuple(outputs)))
            return
        varying = [position for position, value in enumerate(inputs) if value.varies]
        if name in _COMPARISONS:
            difference = self.difference(*inputs)
            self._comparisons[outputs[0]] = _Comparison(difference, _COMPARISONS[name])
            return
        compared = [value in self._comparisons for value in inputs]
        if any(compared):
            selects = name == "select_n" and compared == [True, False, False]
            if not selects or inputs[0].shape != outputs[0].shape:
                _refuse(f"{name} of a comparison")
            self._select(inputs, outputs[0])
            return
        for var in eqn.outvars:
            if var.aval.dtype not in REAL:
                _refuse(f"{name} to {var.aval.dtype}")
        if name in _KINKS:
            _KINKS[name](self, eqn, inputs, outputs[0])
            return
        allowed = _AFFINE.get(name)
        if allowed is None:
            _refuse(name)
        elif allowed == _ONE:
            if len(varying) > 1:
                _refuse(f"{name} of two values that depend on the image")
        elif not set(varying) <= set(allowed):
            _refuse(f"{name} whose argument {max(varying)} depends on the image")
        apply = functools.partial(_bind, eqn)
        self.steps.append(Step(name, str(eqn.params), apply, tuple(inputs), tuple(outputs)))

    def _select(self, inputs, output):
        """where(x > y, a, b): continuous only if a = b where x = y, which the caller checks."""
        difference, holds = self._comparisons[inputs[0]]
        shape = output.shape

        def apply(dtype, d, otherwise, chosen):
            parts = (jnp.broadcast_to(part, shape) for part in (otherwise, chosen))
            return [lax.select_n(jnp.broadcast_to(holds(d), shape), *parts)]

        self.kink("select", holds.__name__, apply, [difference, *inputs[1:]], output)


def _larger(reader, eqn, inputs, output, smallest=False):
    """max(x, y) = y + max(d, 0), min(x, y) = y + min(d, 0) with d = x - y."""
    left, right = inputs if inputs[0].varies else inputs[::-1]
    difference = reader.difference(left, right)
    shape = output.shape
    part = jnp.minimum if smallest else jnp.maximum

    def apply(dtype, d, other):
        return [jnp.broadcast_to(other, shape) + part(d, 0)]

    reader.kink("min" if smallest else "max", "", apply, [difference, right], output)


def _abs(reader, eqn, inputs, output):
    reader.kink("abs", "", lambda dtype, d: [jnp.abs(d)], inputs, output)


def _clamp(reader, eqn, inputs, output):
    lowest, value, highest = inputs
    if lowest.varies or highest.varies:
        _refuse("clamp whose limits depend on the image")
    raised = reader.new(value.shape, True)
    _larger(reader, eqn, [value, lowest], raised)
    _larger(reader, eqn, [raised, highest], output, smallest=True)


def _tournament(reader, stacked, output, smallest=False):
    """The largest along the leading axis of `stacked`, in rounds of pairwise maxima."""
    count, shape = stacked.shape[0], stacked.shape[1:]
    while count > 1:
        half = count // 2

        def split(dtype, x, half=half):
            return [x[:half], x[half : 2 * half], x[2 * half :]]

        shapes = [(half, *shape), (half, *shape), (count - 2 * half, *shape)]
        left, right, rest = reader.affine("move", "split", split, [stacked], shapes)
        winner = reader.new((half, *shape), True)
        _larger(reader, None, [left, right], winner, smallest)
        count -= half
        join = lambda dtype, *parts: [jnp.concatenate(parts)]  # noqa: E731
        (stacked,) = reader.affine("move", "join", join, [winner, rest], [(count, *shape)])
    drop = lambda dtype, x: [x.reshape(output.shape)]  # noqa: E731
    reader.steps.append(Step("move", "reshape", drop, (stacked,), (output,)))


def _reduce(reader, eqn, inputs, output, smallest=False):
    axes = tuple(eqn.params["axes"])
    (value,) = inputs
    count = math.prod(value.shape[axis] for axis in axes)

    def stack(dtype, x):
        return [jnp.moveaxis(x, axes, range(len(axes))).reshape(count, *output.shape)]

    shape = (count, *output.shape)
    (stacked,) = reader.affine("move", f"stack {axes}", stack, [value], [shape])
    _tournament(reader, stacked, output, smallest)


def _window(reader, eqn, inputs, output, smallest=False):
    (value,) = inputs
    members = _window_members(value.shape, output.shape, eqn.params)
    shape = (members.shape[0], *output.shape)

    def gather(dtype, x):
        return [x.reshape(-1)[members].reshape(shape)]

    (stacked,) = reader.affine("move", str(eqn.params), gather, [value], [shape])
    _tournament(reader, stacked, output, smallest)


def _window_members(shape, out_shape, params):
    """Flat indices `(window size, outputs)`; padding is replaced by another member."""
    flat, valid = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    options = (
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
    )
    for size, out, window, stride, (low, _), dilation, spread in zip(
        shape, out_shape, *options, strict=True
    ):
        place = np.arange(window)[:, None] * spread + np.arange(out) * stride - low
        inside = (place >= 0) & (place < (size - 1) * dilation + 1) & (place % dilation == 0)
        index = np.where(inside, place // dilation, 0)
        flat = flat[:, None, :, None] * size + index[None, :, None, :]
        valid = valid[:, None, :, None] & inside[None, :, None, :]
        flat = flat.reshape(flat.shape[0] * window, -1)
        valid = valid.reshape(flat.shape)
    if not valid.any(0).all():
        _refuse("reduce_window with a window that holds padding only")
    first = np.take_along_axis(flat, valid.argmax(0)[None], 0)
    return np.where(valid, flat, first).astype(np.int32)


_KINKS = {
    "max": _larger,
    "min": functools.partial(_larger, smallest=True),
    "abs": _abs,
    "clamp": _clamp,
    "reduce_max": _reduce,
    "reduce_min": functools.partial(_reduce, smallest=True),
    "reduce_window_max": _window,
    "reduce_window_min": functools.partial(_window, smallest=True),
}


def _above(d):
    return d > 0


def _not_below(d):
    return d >= 0


def _below(d):
    return d < 0


def _not_above(d):
    return d <= 0


_COMPARISONS = {"gt": _above, "ge": _not_below, "lt": _below, "le": _not_above}

# Operations that only move values.
MOVES = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "neg",
        "pad",
        "reshape",
        "rev",
        "select_n",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    ]
)

# Which arguments may depend on the image: positions (jointly affine), or any single one.
_ONE = "one"
_ANY = range(1 << 16)
_AFFINE: dict[str, Any] = (
    dict.fromkeys(MOVES, _ANY)
    | dict.fromkeys(("add", "add_any", "sub", "cumsum", "reduce_sum", "reduce_window_sum"), _ANY)
    | dict.fromkeys(("mul", "dot_general"), _ONE)
    | dict.fromkeys(("div", "conv_general_dilated", "gather", "dynamic_slice"), (0,))
    | {"dynamic_update_slice": (0, 1), "scatter-add": (0, 2), "select_n": _ANY[1:]}
)
_INLINED = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


def _body(eqn):
    """The jaxpr of a call that is inlined."""
    if eqn.primitive.name not in _INLINED:
        return None
    bodies = [v for v in eqn.params.values() if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]
    return bodies[0]


def _refuse(operation: str) -> None:
    _check.fail(
        "an operation of logits_fn",
        operation,
        "to be affine in the image or a maximum, minimum, absolute value or selection",
        "Only piecewise-linear networks can be proved; proof=False samples any network.",
    )


def _bind(eqn, dtype, *inputs):
    """Evaluate an equation in another real type, at full precision."""
    params = {name: _retyped(param, dtype) for name, param in eqn.params.items()}
    if "precision" in params and eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        params["precision"] = (lax.Precision.HIGHEST,) * 2
    if eqn.primitive.name == "conv_general_dilated" and dtype == np.float64:
        images, kernel = inputs
        return [_wide_convolution(images, kernel, params)]
    outputs = eqn.primitive.bind(*inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _retyped(param, dtype):
    """The real type in place of float32 or float64 as an equation's parameter."""
    is_type = isinstance(param, np.dtype) or (
        isinstance(param, type) and issubclass(param, np.generic)
    )
    return np.dtype(dtype) if is_type and np.dtype(param) in REAL else param


def _wide_convolution(images, kernel, params):
    """float64 convolution by one matrix product, since XLA's own is naive on CPUs.

    The product takes the windows along all spatial axes but the first, and makes the terms of all
    positions along the first, which are then shifted and added: fewer copies than full windows.
    """
    plain = (
        params["feature_group_count"] == params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) <= {1}
        and set(params["rhs_dilation"]) <= {1}
        and images.ndim > 2
    )
    if not plain:
        return lax.conv_general_dilated_p.bind(images, kernel, **params)
    lhs, rhs, out = params["dimension_numbers"]
    images = jnp.transpose(images, (lhs[0], *lhs[2:], lhs[1]))
    kernel = jnp.transpose(kernel, (*rhs[2:], rhs[1], rhs[0]))
    sides = [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)]
    images = lax.pad(images, jnp.zeros((), images.dtype), sides)
    *widths, channels, filters = kernel.shape
    spans = [
        [slice(k, size - width + k + 1, stride) for k in range(width)]
        for size, width, stride in zip(
            images.shape[1:-1], widths, params["window_strides"], strict=True
        )
    ]
    windows = [images[:, :, *place] for place in itertools.product(*spans[1:])]
    size = len(windows) * channels
    flat = jnp.moveaxis(kernel.reshape(widths[0], size, filters), 0, 1).reshape(size, -1)
    terms = jnp.matmul(jnp.concatenate(windows, -1), flat, precision=lax.Precision.HIGHEST)
    terms = terms.reshape(*terms.shape[:-1], widths[0], filters)
    result = sum(terms[:, span, ..., number, :] for number, span in enumerate(spans[0]))
    return jnp.transpose(jnp.asarray(result), np.argsort((out[0], *out[2:], out[1])).tolist())
