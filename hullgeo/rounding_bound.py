"""A rigorous bound of all rounding errors of an exact propagation, by a running error analysis.

With u the unit roundoff and gamma_n = n u / (1 - n u), a computed sum of n products W x errs by at
most gamma_n |W| |x| in whatever order it is summed (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 3.1), and an error e in x becomes at most |W| e. Carrying

    e' = |W| (e + gamma_n m),    m >= |x| everywhere on the segment,

through the network, one number per unit, bounds the distance between the computed and the true
piecewise-linear output at every position. Kinks are 1-Lipschitz in each argument; m starts afresh
at each difference, whose reach the propagation measures, and a unit that is never active adds
nothing. Interpolated rows add a few u m, each composition of insertions a few more. The bound grows
with |W|, and is of use in float64 for networks whose layers do not amplify much.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hullgeo import _numerics
from hullgeo.operations import MOVES, Step, Value
from hullgeo.piecewise import Program

# Errors of one interpolation in units of u m: the interpolation itself, the place of a knot, and a
# sign that rounding changes next to one; then what each further insertion adds to a place.
_INTERPOLATION = 32
_COMPOSITION = 8

_MOVES = MOVES | {"move"}
_SUMS = frozenset(["add", "add_any", "sub", "difference"])
_PRODUCTS = frozenset(["mul", "div", "dot_general", "conv_general_dilated"])
_LONG_SUMS = frozenset(["reduce_sum", "reduce_window_sum", "cumsum"])


def has_bound(program: Program) -> bool:
    """Whether the analysis covers the program: exact constants, no selections."""
    rules = {step.rule for block in program.blocks for step in block.steps}
    kinks = {block.kink.rule for block in program.blocks if block.kink}
    known = _MOVES | _SUMS | _PRODUCTS | _LONG_SUMS
    return program.exact_constants and rules <= known and kinks <= {"max", "min", "abs"}


def error_function(program: Program, dtype: Any) -> Callable[..., np.ndarray]:
    """A compiled function that bounds |computed - true| of the outputs at every position of a line.

    Args:
      program: one for which `has_bound` holds.
      dtype: the type of the propagation.

    Returns:
      a function of the constants in float64, of the largest magnitude of each pixel on the line,
      and of the reach of each unit of the differences by index: the largest -d and d met.
    """
    bound = jax.jit(functools.partial(_output_error, program, float(np.finfo(dtype).eps) / 2))

    def function(constants, image, reach):
        with _numerics.float64():
            return np.asarray(bound(constants, image, reach), np.float64)

    return function


def _output_error(program, unit, constants, image, reach):
    reading = (_INTERPOLATION + _COMPOSITION * len(program.blocks)) * unit
    bounds = {program.image: (image[None], jnp.zeros_like(image)[None])}
    for block in program.blocks:
        known = {}
        for value in block.inputs:
            size, error = bounds[value]
            if value.index in reach:
                size = jnp.max(reach[value.index], axis=0) * (1 + 4 * unit)
            known[value] = size, error + reading * size
        if block.kink is not None:
            known |= _kink_bound(block.kink, known, constants, reach, unit)
        for step in block.steps:
            known |= _step_bound(step, known, constants, unit)
        bounds |= {value: known[value] for value in block.outputs}
    return bounds[program.output][1].reshape(-1)


def _kink_bound(kink: Step, known, constants, reach, unit) -> dict[Value, tuple[Any, Any]]:
    """Magnitude and error of y + max(d, 0), y + min(d, 0) or |d|; a unit never active has none."""
    d, *others = kink.inputs
    size, error = known[d]
    if kink.rule != "abs" and d.index in reach:
        side = reach[d.index][1 if kink.rule == "max" else 0] * (1 + 4 * unit)
        active = side + error >= 0
        size, error = (jnp.where(active, part, 0) for part in (jnp.maximum(side, error), error))
    for value in others:
        own = known[value] if value.varies else (jnp.abs(constants[value.index]), 0.0)
        size, error = size + own[0], error + own[1]
    shape = kink.outputs[0].shape
    size, error = jnp.broadcast_to(size, shape), jnp.broadcast_to(error, shape)
    return {kink.outputs[0]: (size, error + 2 * unit * size)}


def _step_bound(step: Step, known, constants, unit) -> dict[Value, tuple[Any, Any]]:
    """Magnitude and error of an affine step's outputs; constants are exact."""
    magnitudes, errors = [], []
    for value in step.inputs:
        if value.varies:
            size, error = known[value]
        elif jnp.issubdtype(constants[value.index].dtype, np.floating):
            size = jnp.abs(constants[value.index])
            # Constants of a product are coefficients, of errors and magnitudes alike.
            error = size if step.rule in _PRODUCTS else jnp.zeros_like(size)
        else:  # indices and masks
            size = error = constants[value.index]
        magnitudes.append(size)
        errors.append(error)
    shape = step.outputs[0].shape
    if step.rule in _SUMS:
        size = sum(jnp.broadcast_to(part, shape) for part in magnitudes)
        error = sum(jnp.broadcast_to(part, shape) for part in errors) + 2 * unit * size
        return {step.outputs[0]: (size, error)}
    apply = (lambda dtype, x: [x]) if step.rule == "neg" else step.apply
    rounding = 0.0
    if step.rule not in _MOVES:
        # How many products one entry of the output sums, and a few operations beside.
        terms = jnp.max(apply(np.float64, *map(jnp.ones_like, magnitudes))[0]) + 3
        rounding = terms * unit / (1 - terms * unit)
    size, error = apply(np.float64, *magnitudes), apply(np.float64, *errors)
    return {
        value: (part, 1.0001 * (old + rounding * part))
        for value, part, old in zip(step.outputs, size, error, strict=True)
    }
