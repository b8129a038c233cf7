"""What a stage of an analysis is, what it sees, and how its result is read back.

A stage names what it reads: `train`, `test`, `network` and `head` are the inputs, the others are
earlier stages. Nothing else reaches its function, so that the fingerprint of what it names is the
fingerprint of its result.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hullgeo import _store
from hullgeo.features import LinearHead

Values = dict[str, Any]


class Inputs(NamedTuple):
    """What a stage's function sees.

    Attributes:
      data: the values of each input or stage it named, by name.
      options: the options it named, by name.
      chunks: `chunks(function, rows, size)` applies `function` to blocks of rows and joins the
        dictionaries of arrays it returns. Finished blocks are saved, and skipped in a second run.
      batch_size, devices, progress: how to compute, without influence on what.
    """

    data: Mapping[str, Values]
    options: Mapping[str, Any]
    chunks: Callable[[Callable[[np.ndarray], Values], np.ndarray, int], Values]
    batch_size: int
    devices: Any
    progress: bool


class Stage(NamedTuple):
    """One step of the analysis.

    Attributes:
      name: of the stage and of its file.
      compute: from `Inputs` to arrays and scalars by name.
      needs: names of the inputs and earlier stages it reads.
      options: names of the options it depends on.
      confirm: whether stored values still hold, for what a fingerprint cannot see.
    """

    name: str
    compute: Callable[[Inputs], Values]
    needs: tuple[str, ...]
    options: tuple[str, ...] = ()
    confirm: Callable[[Inputs, Values], bool] | None = None


def head_of(inputs: Inputs) -> LinearHead:
    """The linear head among the inputs."""
    return LinearHead(inputs.data["head"]["kernel"], inputs.data["head"]["bias"])


def in_blocks(function: Callable[[Any], Values], rows: Any, size: int) -> Values:
    """`function` on blocks of equal length, so that it is compiled once, joined again."""
    blocks = [apply_padded(function, rows[i : i + size], size, len(rows))
              for i in range(0, len(rows), size)]  # fmt: skip
    return join(blocks)


def apply_padded(
    function: Callable[[Any], Values], block: np.ndarray, size: int, total: int
) -> Values:
    """`function(block)` with the last of several blocks filled up by its own last row, and cut."""
    length = len(block)
    if length < size < total:
        block = np.concatenate([block, np.repeat(block[-1:], size - length, axis=0)])
    values = jax.tree.map(np.asarray, function(block))
    return {name: array[:length] for name, array in values.items()}


def join(blocks: Sequence[Values]) -> Values:
    """Dictionaries of arrays, joined along their first axis."""
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def load_stage(out: str | os.PathLike[str], stage: str) -> dict[str, Any]:
    """The saved arrays and scalars of one stage of an analysis.

    Args:
      out: the folder given to `analyze`.
      stage: name of the stage, e.g. "hull"; "about" holds titles and options, "labels" the labels.

    Returns:
      arrays and scalars by name, every byte checked.

    Raises:
      FileNotFoundError: if the stage was not computed.
      ValueError: if its file is damaged, or left from other images or options than those of the
        last run, which was not completed; naming it.
    """
    folder = Path(out) / "data"
    path = folder / f"{stage}.npz"
    stored = _store.read(path)
    if stored.source is not None:
        about = _store.read(folder / "about.npz").values
        same = all(
            about["options"][name] == value for name, value in stored.source["options"].items()
        )
        for name, digest in stored.source["needs"].items():
            known = about["digests"].get(name) or _store.read(folder / f"{name}.npz").digest
            same = same and known == digest
        if not same:
            raise ValueError(
                f"Expected {path} to belong to the last run in {out}, got a result of other images "
                f"or options. Run analyze again to complete it."
            )
    return stored.values
