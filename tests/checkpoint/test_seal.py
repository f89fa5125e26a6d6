"""Every byte that tuckaway writes into a checkpoint is vouched for, and everybody still reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuckaway.checkpoint import Checkpoint, CheckpointWriter, Request, stream
from tuckaway.checkpoint.shards import plan_shards
from tuckaway.errors import CheckpointError, ChecksumError

STATE = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "é": torch.tensor(1.5, dtype=torch.float16),
    "none": torch.empty(0, 3),
    "b": torch.arange(7, dtype=torch.uint8),
}
SHARDS = "50"


def write(folder: Path, max_shard_size: str = "1GB") -> Path:
    with CheckpointWriter(
        folder, max_shard_size=max_shard_size, metadata={"note": 'a "tuckaway.crc32":"'}
    ) as w:
        w.plan([(name, t.dtype, t.shape) for name, t in STATE.items()])
        for name in reversed(STATE):
            w.write(name, STATE[name])
        w.commit()
    return folder


def read(folder: Path, **options: bool) -> dict[str, torch.Tensor]:
    """Read a checkpoint twice: tensor by tensor, and as a stream of pieces of a few bytes."""
    checkpoint = Checkpoint.open(folder, **options)
    found = {name: checkpoint.read(name) for name in checkpoint.entries}
    streamed: dict[str, list[torch.Tensor]] = {}
    for piece in stream([Request(entry) for entry in checkpoint.entries.values()], piece_bytes=8):
        streamed.setdefault(piece.entry.name, []).append(piece.tensor.clone())
    for name, pieces in streamed.items():
        assert torch.equal(torch.cat(pieces), found[name].reshape(-1)), name
    return found


def assert_state(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("size", ["1GB", SHARDS])
def test_what_is_sealed_is_read_by_everybody(tmp_path, size):
    folder = write(tmp_path, size)
    assert_state(read(folder))
    assert_state(read(folder, verify_checksums=False))
    shards = sorted(folder.glob("*.safetensors"))
    assert_state({name: t for shard in shards for name, t in load_file(shard).items()})
    for options in ({}, {"verify_checksums": False}):
        assert Checkpoint.open(folder, **options).metadata == {"format": "pt", "note": 'a "tuckaway.crc32":"'}
    assert all(entry.crc32 is not None for entry in Checkpoint.open(folder).entries.values())
    assert all(e.crc32 is None for e in Checkpoint.open(folder, verify_checksums=False).entries.values())


@pytest.mark.parametrize("size", ["1GB", SHARDS])
def test_every_byte_that_is_flipped_is_noticed(tmp_path, size):
    folder = write(tmp_path / "folder", size)
    files = sorted(os.listdir(folder))
    assert len(files) == (1 if size == "1GB" else 3)
    for name in files:
        sound = (folder / name).read_bytes()
        for position in range(len(sound)):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << position % 8
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                read(folder)
        (folder / name).write_bytes(sound)
    assert_state(read(folder))


@pytest.mark.parametrize("size", ["1GB", SHARDS])
def test_every_truncation_and_every_byte_too_much_is_noticed(tmp_path, size):
    folder = write(tmp_path / "folder", size)
    for name in sorted(os.listdir(folder)):
        sound = (folder / name).read_bytes()
        for left in range(len(sound)):
            (folder / name).write_bytes(sound[:left])
            with pytest.raises(CheckpointError):
                read(folder)
        (folder / name).write_bytes(sound + b"\0")
        with pytest.raises(CheckpointError):
            read(folder)
        (folder / name).write_bytes(sound)
    assert_state(read(folder))


def test_the_error_names_the_tensor_and_the_way_out(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        ChecksumError, match=r"'b' changed on disk .*model.safetensors.*verify_checksums=False"
    ):
        read(tmp_path)
    assert read(tmp_path, verify_checksums=False)["b"].tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_a_foreign_checkpoint_may_bring_its_own(tmp_path):
    """Any program that can write a header can seal it; one that rewrites it and keeps the seal is found out."""
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "b": torch.zeros(7, dtype=torch.uint8)}, path, metadata=metadata)
    with pytest.raises(ChecksumError, match="header differs"):
        Checkpoint.open(tmp_path)
    save_file(load_file(path), path, metadata={"format": "pt"})
    assert Checkpoint.open(tmp_path).entries["b"].crc32 is None


def test_an_index_that_somebody_else_made_has_no_checksum(tmp_path):
    folder = write(tmp_path, SHARDS)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"].keys() == {"total_size", "tuckaway.checksums", "tuckaway.crc32"}
    index.write_text(json.dumps(content))
    with pytest.raises(ChecksumError, match="the index differs"):
        Checkpoint.open(folder)
    assert_state(read(folder, verify_checksums=False))
    del content["metadata"]
    index.write_text(json.dumps(content))
    assert_state(read(folder))


@pytest.mark.parametrize("key", ["tuckaway.crc32", "tuckaway.checksums"])
def test_the_keys_are_reserved(key):
    with pytest.raises(CheckpointError, match="reserved for checksums"):
        plan_shards([("a", torch.float32, (1,))], 100, {key: "0"})
