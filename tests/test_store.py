"""Files are whole or not there, and are read back only if every byte is as it was written."""

import errno
import os

import numpy as np
import pytest

from hullgeo import _store

VALUES = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 2), np.int64),
    "number": 1.5,
    "count": np.int64(3),
    "text": "ä",
    "many": [1, 2.0, "x"],
    "nothing": None,
    "not_a_number": float("nan"),
}
SOURCE = {"stage": "one", "options": {"rtol": 1e-6}, "needs": {"train": "abc"}}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_values_return_as_they_were(tmp_path):
    path = tmp_path / "one.npz"
    written = _store.write(path, SOURCE, VALUES, seconds=2.0)
    found = _store.read(path)
    same(found.values, VALUES)
    assert found.values["matrix"].dtype == np.float32
    assert isinstance(found.values["count"], int)
    assert (found.digest, found.source, found.seconds) == (written.digest, SOURCE, 2.0)
    assert os.listdir(tmp_path) == ["one.npz"]


def test_found_only_for_the_same_source(tmp_path):
    path = tmp_path / "one.npz"
    assert _store.find(path, SOURCE) is None
    _store.write(path, SOURCE, VALUES)
    assert _store.find(path, SOURCE) is not None
    assert _store.find(path, {**SOURCE, "options": {"rtol": 1e-5}}) is None


def test_every_truncation_is_seen(tmp_path):
    path = tmp_path / "one.npz"
    _store.write(path, SOURCE, VALUES)
    content = path.read_bytes()
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"one\.npz to be a whole file"):
            _store.read(path)


def test_a_changed_value_is_seen(tmp_path):
    path = tmp_path / "one.npz"
    _store.write(path, SOURCE, VALUES)
    content = bytearray(path.read_bytes())
    place = content.find(np.float32(7).tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        _store.read(path)
    with pytest.warns(RuntimeWarning, match=r"one\.npz.*computed again"):
        assert _store.find(path, SOURCE) is None


def test_a_file_of_others_is_refused(tmp_path):
    path = tmp_path / "one.npz"
    np.savez(path, values=np.zeros(3))
    with pytest.raises(ValueError, match=r"one\.npz"):
        _store.read(path)


def test_a_failing_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "one.npz"
    _store.write(path, SOURCE, VALUES)

    def full(descriptor):
        if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path / ".one")):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(_store.tempfile, "tempdir", None)
    with pytest.raises(OSError, match=r"one\.npz.*No space left.*kept as") as caught:
        _store.write(path, SOURCE, {"other": 1})
    assert caught.value.errno == errno.ENOSPC
    same(_store.read(path).values, VALUES)
    (rescued,) = tmp_path.glob("hullgeo-*-one.npz")
    assert str(rescued) in str(caught.value)
    assert _store.read(rescued).values == {"other": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_nowhere_to_write(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for out in (path, path / "below", "/proc/self/nowhere"):
        with pytest.raises(ValueError, match="Expected out to be a folder that can be written"):
            _store.prepare_folder(out)


def test_old_leftovers_are_removed(tmp_path):
    old, new = tmp_path / ".a.npz.1.tmp", tmp_path / ".a.npz.2.tmp"
    old.write_text("")
    new.write_text("")
    os.utime(old, (0, 0))
    _store.prepare_folder(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_digests_tell_apart():
    things = [
        0, 0.0, "0", None, [], [0], [[0]], {}, {"a": 0}, {"a": 1}, {"b": 0}, ["a", "b"], ["ab"],
        np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.zeros((1, 2)), np.float64(0),
        np.zeros(0), np.zeros((0, 3)), [np.zeros(1), np.zeros(1)],
    ]  # fmt: skip
    digests = [_store.digest(thing) for thing in things]
    assert len(set(digests)) == len(things)
    assert digests == [_store.digest(thing) for thing in things]
    assert _store.digest({"a": 1, "b": 2}) == _store.digest({"b": 2, "a": 1})
    strided = np.arange(12.0).reshape(3, 4)[:, ::2]
    assert _store.digest(strided) == _store.digest(strided.copy())
