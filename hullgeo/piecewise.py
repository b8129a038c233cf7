"""A network read as affine steps and kinks: what exact propagation along a line needs to know.

A piecewise-linear network is a composition of maps that are affine in the image and of kinks, where
a unit changes its affine piece when a difference d changes sign: max(x, y) = y + max(d, 0) and
min(x, y) = x - max(d, 0) with d = x - y, |x| with d = x, and where(x > y, a, b) with d = x - y.
`read_program` traces the caller's own function to a jaxpr, inlines what is nested, evaluates what
does not depend on the image, and cuts the rest into blocks: one kink, then affine steps up to the
next. An operation that is neither is refused by its name.

The program is that of the network in real arithmetic, with the parameters as stored: it can be
evaluated in float32 or float64, whatever type the function was traced in.
"""

import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hullgeo import _check
from hullgeo.operations import REAL, Reader, Step, Value


class Block(NamedTuple):
    """One kink (none in the first block), then affine steps."""

    kink: Step | None
    steps: tuple[Step, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: tuple[Value, ...]
    difference: Value | None  # that of the next kink, an output of this block

    @property
    def signature(self) -> Hashable:
        """Equal for blocks that compute the same function of their inputs and constants."""
        number: dict[Value, int] = {}

        def name(value):
            return number.setdefault(value, len(number)), value.shape, value.varies

        fields = (self.inputs, self.constants)
        ends = [tuple(name(value) for value in values) for values in fields]
        steps = (self.kink, *self.steps) if self.kink else self.steps
        body = tuple(
            (step.rule, step.detail, *(name(value) for value in (*step.inputs, *step.outputs)))
            for step in steps
        )
        last = tuple(name(value) for value in self.outputs)
        return (*ends, self.kink is None, body, last, self.difference and name(self.difference))


class Program(NamedTuple):
    """A network as blocks; `fold` computes the constants from the arrays of the callable."""

    blocks: tuple[Block, ...]
    image: Value
    output: Value
    fold: Callable[[list[Any]], dict[int, Any]]
    exact_constants: bool  # those are the stored parameters, moved at most


def read_program(
    function: Callable[[list[Any], Any], Any], arrays: list[Any], image: Any
) -> Program:
    """Trace `function(arrays, image)` for one image with a leading axis of 1, and cut it.

    Raises:
      ValueError: naming the operation that is not piecewise linear in the image.
    """
    closed = jax.make_jaxpr(function)(arrays, image)
    reader = Reader()
    leaves = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    values = [reader.new(var.aval.shape, False) for var in leaves[:-1]]
    image_value = reader.new(leaves[-1].aval.shape, True)
    flat: list[tuple[Any, list[Value], list[Value]]] = []
    (output,) = reader.inline(closed.jaxpr, [*values, image_value], flat)
    kept = _needed(flat, output)
    for eqn, inputs, outputs in kept:
        reader.add(eqn, inputs, outputs)
    if not output.varies:
        output = reader.constant_output(image_value, output)
    if len(output.shape) != 2 or output.shape[0] != 1:
        _check.fail("logits_fn(image[None]).shape", output.shape, "to be (1, num_classes)")
    blocks = _cut(reader.steps, reader.kinks, image_value, output)
    constants = {value for block in blocks for value in block.constants}
    given = list(closed.consts)
    fold = _folding(reader, values, given, constants)
    return Program(blocks, image_value, output, fold, reader.exact_constants)


def _needed(flat, output):
    """The equations that the output depends on."""
    live, kept = {output}, []
    for eqn, inputs, outputs in reversed(flat):
        if live & set(outputs):
            live |= set(inputs)
            kept.append((eqn, inputs, outputs))
    return kept[::-1]


def _folding(reader, leaves, given, wanted):
    """A function of the callable's arrays to all constants that the blocks read, in float64."""
    literals, steps = reader.literals, reader.constant_steps

    @jax.jit
    def evaluate(arrays):
        known = {value: _widen(array) for value, array in zip(leaves, arrays, strict=True)}
        known |= {value: _widen(array) for value, array in literals.items()}
        for step in steps:
            outputs = step.apply(np.float64, *(known[value] for value in step.inputs))
            known |= dict(zip(step.outputs, outputs, strict=True))
        return {value.index: known[value] for value in wanted}

    return lambda arrays: evaluate([*given, *arrays])


def _widen(array):
    """float32 to float64; other types are left alone."""
    return jnp.asarray(array, np.float64) if array.dtype in REAL else array


def _cut(steps, kinks, image, output):
    """Blocks of one kink and the affine steps after it."""
    starts = [0, *sorted(kinks)] if 0 not in kinks else sorted(kinks)
    groups = [
        tuple(steps[begin:end])
        for begin, end in zip(starts, [*starts[1:], len(steps)], strict=True)
    ]
    if 0 in kinks:
        groups = [(), *groups]
    counter = itertools.count(-1, -1)
    wanted: set[Value] = {output}
    difference = None
    blocks = []
    for number in reversed(range(len(groups))):
        group = groups[number]
        made = {value for step in group for value in step.outputs}
        if difference is not None and difference not in made:
            # The next kink compares an older value: bring it to the rows of this block.
            copy = Value(next(counter), difference.shape, True)
            group += (Step("move", "copy", lambda dtype, x: [x], (difference,), (copy,)),)
            made.add(copy)
            following = blocks[-1]
            kink = following.kink
            kink = kink._replace(inputs=(copy, *kink.inputs[1:]))
            inputs = tuple(dict.fromkeys([*_read(kink, following.steps)]))
            blocks[-1] = following._replace(kink=kink, inputs=inputs)
            wanted |= set(inputs)
            difference = copy
        kink = group[0] if number else None
        rest = group[1:] if number else group
        read = _read(kink, rest)
        outputs = tuple(value for value in dict.fromkeys([*made]) if value in wanted)
        used = [value for step in group for value in step.inputs]
        constants = tuple(dict.fromkeys(value for value in used if not value.varies))
        blocks.append(Block(kink, rest, read, outputs, constants, difference))
        wanted = (wanted - made) | set(read)
        difference = kink.inputs[0] if kink else None
    assert wanted <= {image}
    return tuple(blocks[::-1])


def _read(kink, steps):
    """The varying values that a block takes from before it."""
    group = [kink, *steps] if kink else list(steps)
    made: set[Value] = set()
    read: dict[Value, None] = {}
    for step in group:
        for value in step.inputs:
            if value.varies and value not in made:
                read[value] = None
        made |= set(step.outputs)
    return tuple(read)
