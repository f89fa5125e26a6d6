from __future__ import annotations

import errno
import os

import psutil
import pytest
import torch

from tuckaway.checkpoint.entry import (
    FileIdentity,
    JoinedEntry,
    ResidentEntry,
    StridedEntry,
    TensorEntry,
    open_regular,
    reading,
)
from tuckaway.checkpoint.header import MAX_HEADER
from tuckaway.checkpoint.index import find_weights, parse_index, read_index
from tuckaway.checkpoint.seal import seal, sealed_index
from tuckaway.errors import CheckpointError, CheckpointNotFound, ShardIndexError, UnsafePathError


def test_what_the_system_refuses_is_typed():
    for error, kind in (
        (FileNotFoundError(errno.ENOENT, "no"), CheckpointNotFound),
        (OSError(errno.EIO, "io"), CheckpointError),
        (OSError("no number"), CheckpointError),
        (UnsafePathError("mine"), UnsafePathError),
    ):
        with pytest.raises(kind) as caught, reading("file"):
            raise error
        assert caught.value is error or caught.value.__cause__ is error


def test_a_file_that_becomes_a_pipe_between_two_looks(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    pipe = os.stat(tmp_path / "pipe")
    monkeypatch.setattr(os, "fstat", lambda fd: pipe)
    with pytest.raises(UnsafePathError, match="not a regular file"):
        open_regular(path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot open it"):
        open_regular(tmp_path / "a\0b")


def test_an_index_longer_than_a_header_may_be(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(MAX_HEADER + 1)
    with pytest.raises(ShardIndexError, match="longer than"):
        read_index(path)


def test_an_index_that_cannot_be_read(tmp_path, monkeypatch):
    from tuckaway import files
    from tuckaway.errors import StoreError

    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{}")

    def fail(*arguments):
        raise StoreError("cannot read: Input/output error")

    monkeypatch.setattr(files, "read_at", fail)
    with pytest.raises(CheckpointError, match="cannot read the index"):
        read_index(path)
    with pytest.raises(CheckpointError, match="cannot list"):
        find_weights(tmp_path / "missing")
    assert parse_index(b'{"weight_map": {}, "metadata": 7}', path) == ({}, {})


def test_only_what_was_planned_with_a_place_is_sealed():
    with pytest.raises(ValueError, match="without checksums"):
        seal(b"{}", [])
    with pytest.raises(ValueError, match="without a checksum"):
        sealed_index(b"{}")


def test_any_range_of_a_joined_tensor_is_made_of_its_runs(tmp_path):
    parts = [TensorEntry(name, torch.uint8, (9,), tmp_path / name, 0, 9) for name in "ab"]
    runs = ((parts[0], 6, 3), (parts[1], 0, 4), (parts[0], 0, 6), (parts[1], 4, 5))
    joined = JoinedEntry("joined", torch.uint8, (18,), tmp_path / "a", 0, 18, runs=runs)
    elements = [(part.name, first + at) for part, first, count in runs for at in range(count)]
    for start in range(18):
        for count in range(18 - start + 1):
            found = list(joined.overlapping(start, count))
            made = [(part.name, first + at) for part, first, length in found for at in range(length)]
            assert made == elements[start : start + count]
            assert all(length > 0 for _, _, length in found)
    assert [(part.name, *rest) for part, *rest in joined.overlapping(12, 99)] == [("a", 5, 1), ("b", 4, 5)]


def test_entries_are_equal_wherever_their_files_came_from(tmp_path):
    path = tmp_path / "x"
    one = TensorEntry("a", torch.float32, (2,), path, 8, 8)
    other = TensorEntry("a", torch.float32, (2,), path, 8, 8, FileIdentity(1, 2, 3, 4), crc32=5)
    assert one == other
    assert "identity" not in repr(other)
    assert "crc32" not in repr(other)
    with pytest.raises(TypeError):
        TensorEntry("a", torch.float32, (2,), path, 8, 8, None, 5)
    strided = StridedEntry("a", torch.float32, (2,), path, 8, 8)
    assert (strided.stride, strided.span) == ((), 0)
    held = ResidentEntry("a", torch.float32, (2,), path, 8, 8, data=torch.ones(2))
    assert held == ResidentEntry("a", torch.float32, (2,), path, 8, 8)
    assert ResidentEntry("a", torch.float32, (0,), path, 8, 0).data.numel() == 0
    assert "data" not in repr(held)


def test_what_is_refused_is_closed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    pipe = os.stat(tmp_path / "pipe")
    before = psutil.Process().num_fds()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: pipe)
        with pytest.raises(UnsafePathError):
            open_regular(path)
    assert psutil.Process().num_fds() == before
