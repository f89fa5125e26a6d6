"""Whatever a power loss leaves of a save, a conversion or a store fill is the old or the new, whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import generations
import tuckaway
from generations import ONE_FILE, TWO_SHARDS, generation_of
from loading import FP32, assert_same_state, empty_net, net, read_all, tokens
from power_loss import Disk
from tuckaway.checkpoint import Checkpoint

DISK = {"": "cpu", "layers": "disk"}


@pytest.mark.parametrize("new", [ONE_FILE, TWO_SHARDS])
@pytest.mark.parametrize("old", [None, ONE_FILE, TWO_SHARDS])
def test_a_save(tmp_path: Path, old: str | None, new: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if old is not None:
        generations.save(root / "folder", 1, old)
    disk = Disk(root)
    with disk.watched():
        generations.save(root / "folder", 2, new)
    assert len(disk.states) > 5
    found = set()
    for crashed in disk.crashed(tmp_path / "crashed"):
        folder = crashed / "folder"
        generation = generation_of(folder) if folder.exists() else None
        found.add(generation)
        if generation is not None:
            assert len(Checkpoint.open(folder).entries) == len(generations.NAMES)
        shutil.rmtree(crashed)
    assert found == {None if old is None else 1, 2}


def test_a_store_fill(tmp_path: Path) -> None:
    checkpoint, root = tmp_path / "checkpoint", tmp_path / "root"
    tuckaway.save_model(net(layers=2), checkpoint)
    root.mkdir()
    disk = Disk(root)

    def load(store: Path) -> torch.Tensor:
        model = tuckaway.load_and_quantize_model(
            empty_net(layers=2), FP32, checkpoint, device_map=DISK, offload_folder=store
        )
        with torch.no_grad():
            found = model(tokens())
        tuckaway.materialize(model)
        return found

    with disk.watched():
        expected = load(root / "store")
    assert len(disk.states) > 10
    for crashed in disk.crashed(tmp_path / "crashed"):
        assert torch.equal(load(crashed / "store"), expected)
        assert sorted(os.listdir(crashed / "store")) == ["manifest.json", "pages.bin"]
        shutil.rmtree(crashed)


def test_a_conversion(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    tuckaway.save_model(net(layers=1), source)
    root.mkdir()
    disk = Disk(root)

    def convert(target: Path) -> None:
        tuckaway.quantize_checkpoint(source, target, FP32, model=empty_net(layers=1), max_shard_size="15kB")

    with disk.watched():
        convert(root / "result")
    expected, names = read_all(root / "result"), sorted(os.listdir(root / "result"))
    assert len(disk.states) > 20
    for crashed in disk.crashed(tmp_path / "crashed"):
        target = crashed / "result"
        if not target.exists():
            convert(target)
        found = read_all(target)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        Checkpoint.open(target)
        assert sorted(os.listdir(target)) == names
        assert (
            {"result"} <= set(os.listdir(crashed)) <= {"result", ".result.lock"}
        )  # nobody's lock, if it stays
        shutil.rmtree(crashed)
    assert_same_state(
        tuckaway.load_and_quantize_model(empty_net(layers=1), FP32, root / "result"),
        tuckaway.load_and_quantize_model(empty_net(layers=1), FP32, source),
    )
