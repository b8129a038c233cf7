"""Gradients of convolutions inside loops, at the speed they have outside on CPUs.

XLA's CPU backend brings convolutions into the layout of its fast kernel (NHWC images, HWIO filters)
only outside loops. The gradient of a convolution is one whose filters are transposed, so it runs
several times slower inside `lax.while_loop`. `canonical` writes the transpositions out.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal


def canonical(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, every convolution in it with the layouts NHWC and HWIO (or their like)."""

    def wrapped(*arguments):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _evaluate(closed, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _evaluate(closed: ClosedJaxpr, arguments: list[Any]) -> list[Any]:
    """Run a jaxpr equation by equation, with its convolutions replaced."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if equation.primitive.name in ("jit", "pjit") and isinstance(inner, ClosedJaxpr):
            outputs = _evaluate(inner, inputs)
        elif equation.primitive.name == "conv_general_dilated":
            outputs = [_convolve(*inputs, equation.params)]
        else:
            params = equation.primitive.get_bind_params(equation.params)
            with equation.ctx.manager:  # float64 islands among others
                outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _convolve(left: Any, right: Any, params: dict[str, Any]) -> Any:
    """One convolution, its operands and its result transposed explicitly."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    spatial = tuple(range(1, left.ndim - 1))
    images = (0, left.ndim - 1, *spatial)  # batch first, channels last
    filters = (left.ndim - 1, left.ndim - 2, *(axis - 1 for axis in spatial))

    def arrange(array, old, new):
        order = [0] * array.ndim
        for source, place in zip(old, new, strict=True):
            order[place] = source
        return lax.transpose(array, order)

    result = lax.conv_general_dilated_p.bind(
        arrange(left, lhs_spec, images),
        arrange(right, rhs_spec, filters),
        **params | {"dimension_numbers": lax.ConvDimensionNumbers(images, filters, images)},
    )
    return arrange(result, images, out_spec)
