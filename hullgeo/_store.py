"""Stages on disk: each result is one `npz` file that is either whole or not there.

A file is written under another name, flushed to the disk, and renamed: a process killed at any
moment leaves the former file or the new one, never a part of one. A file carries the *source* of
its values (the options and the digests of everything they were computed from) and the *digest* of
what it holds, so that a result is reused only if it answers the same question, and read only if
every byte is as it was written.
"""

import hashlib
import json
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hullgeo import _check

_META = "meta"
_STALE_SECONDS = 3600.0


class Stored(NamedTuple):
    """What a file holds: arrays and scalars by name, where they come from, and their digest."""

    values: dict[str, Any]
    digest: str
    source: Any
    seconds: float


def digest(value: Any) -> str:
    """A fingerprint of nested mappings, sequences, arrays and scalars, the same in every process.

    Args:
      value: dicts (by sorted name), lists, tuples, arrays (dtype, shape and bytes), numbers, text,
        None.

    Returns:
      32 hexadecimal digits.
    """
    state = hashlib.blake2b(digest_size=16)
    _absorb(state, value)
    return state.hexdigest()


def _absorb(state: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        state.update(b"{%d" % len(value))
        for name in sorted(value):
            _absorb(state, name)
            _absorb(state, value[name])
    elif isinstance(value, list | tuple):
        state.update(b"[%d" % len(value))
        for item in value:
            _absorb(state, item)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.ascontiguousarray(value)
        state.update(f"a{array.dtype.name}{np.shape(value)}".encode())
        state.update(array.reshape(-1).view(np.uint8).data)
    else:
        text = repr(value).encode()
        state.update(b"s%d:" % len(text) + text)


def prepare_folder(out: str | os.PathLike[str]) -> Path:
    """Make the output folder, prove that it can be written, clear what a killed run left.

    Raises:
      ValueError: if it cannot be made or written, saying why.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _check.fail("out", str(out), "to be a folder that can be written", f"{error.strerror}.")
    for leftover in folder.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            leftover.unlink(missing_ok=True)
    return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or leave the former one untouched."""
    _write(path, lambda file: file.write(content))


def write(path: Path, source: Any, values: Mapping[str, Any], seconds: float = 0.0) -> Stored:
    """Save arrays and scalars as one file, whole or not at all.

    Args:
      path: the `npz` file.
      source: what the values were computed from, as JSON can hold it.
      values: arrays, and scalars or small lists that JSON can hold.
      seconds: how long they took.

    Returns:
      what a later `read` returns.

    Raises:
      OSError: if the disk is full or the file cannot be written. The former files are untouched,
        and the values are kept in the temporary folder where that has room; the message says where.
    """
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    scalars = {name: _plain(value) for name, value in values.items() if name not in arrays}
    content = {**arrays, **scalars}
    stored = Stored(content, digest(content), _plain(source), seconds)
    meta = {**stored._asdict(), "values": scalars}
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)

    def save(file: Any) -> None:
        np.savez(file, allow_pickle=False, **arrays, **{_META: text})

    try:
        _write(path, save)
    except OSError as error:
        rescue = _rescue(path.name, save)
        where = f" This one is kept as {rescue}: move it to {path}." if rescue else ""
        raise OSError(
            error.errno,
            f"Could not write {path.name} ({os.strerror(error.errno or 0)}). Make room and run "
            f"again: every finished stage is kept.{where}",
            str(path),
        ) from error
    return stored


def read(path: Path) -> Stored:
    """Read a file back, checking every byte.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged or was not written by `write`, naming the file.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        meta = json.loads(arrays.pop(_META).tobytes())
        stored = Stored(**{**meta, "values": {**arrays, **meta["values"]}})
        intact = digest(stored.values) == stored.digest
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(_damaged(path)) from error
    if not intact:
        raise ValueError(_damaged(path))
    return stored


def find(path: Path, source: Any) -> Stored | None:
    """The stored result, if it is there, whole, and computed from the same things."""
    try:
        stored = read(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{error} It is computed again.", RuntimeWarning, stacklevel=2)
        return None
    return stored if stored.source == _plain(source) else None


def _write(path: Path, save: Any) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _rescue(name: str, save: Any) -> Path | None:
    path = Path(tempfile.gettempdir()) / f"hullgeo-{os.getpid()}-{name}"
    try:
        _write(path, save)
    except OSError:
        return None
    return path


def _damaged(path: Path) -> str:
    return f"Expected {path} to be a whole file written by hullgeo, got damaged content."


def _plain(value: Any) -> Any:
    """Numbers, lists and mappings as JSON returns them."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
