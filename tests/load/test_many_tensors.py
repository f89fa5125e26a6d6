"""Thousands of tensors in hundreds of shards: the work grows as their number does, not as its square."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tuckaway
from tuckaway.checkpoint import Checkpoint


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.head = nn.Linear(32, 32)


def write(folder: Path, layers: int) -> Path:
    folder.mkdir()
    weight_map = {}
    for shard in range(0, layers, 10):
        tensors = {}
        for layer in range(shard, shard + 10):
            tensors[f"layers.{layer}.weight"] = torch.full((32, 32), float(layer))
            tensors[f"layers.{layer}.bias"] = torch.zeros(32)
        if shard == 0:
            tensors |= {"head.weight": torch.ones(32, 32), "head.bias": torch.ones(32)}
        weight_map |= dict.fromkeys(tensors, f"{shard}.safetensors")
        save_file(tensors, folder / f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def calls(function: Callable[[], Any]) -> int:
    """Count the calls, of Python's functions and of C's, that this thread makes in ``function``."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def load(folder: Path, layers: int, **options: Any) -> None:
    with tuckaway.init_empty_weights():
        model = Stack(layers)
    tuckaway.load_and_quantize_model(model, "nf4", folder, **options)


JOBS: dict[str, Callable[[Path, int, Path], Any]] = {
    "open": lambda folder, layers, scratch: Checkpoint.open(folder),
    "load": lambda folder, layers, scratch: load(folder, layers),
    "load to pages": lambda folder, layers, scratch: load(
        folder, layers, device_map={"": "disk"}, offload_folder=scratch / "pages"
    ),
    "convert": lambda folder, layers, scratch: tuckaway.quantize_checkpoint(
        folder, scratch / "out", "nf4", max_shard_size=20_000
    ),
    "convert a quantized one": lambda folder, layers, scratch: tuckaway.quantize_checkpoint(
        scratch / "out", scratch / "again", "nf4", max_shard_size=20_000
    ),
}


@pytest.mark.parametrize("job", ["open", "load", "load to pages", "convert"])
def test_four_times_the_tensors_take_four_times_the_calls(tmp_path, job):
    found = {}
    for layers in (20, 60, 240):  # the first warms caches up
        folder, scratch = write(tmp_path / f"{layers}", layers), tmp_path / f"scratch{layers}"
        scratch.mkdir()
        found[layers] = calls(lambda: JOBS[job](folder, layers, scratch))  # noqa: B023  (called at once)
    assert found[240] < 4.4 * found[60], found
    if job == "convert":
        for layers in (60, 240):
            scratch = tmp_path / f"scratch{layers}"
            found[layers] = calls(lambda: JOBS["convert a quantized one"](tmp_path, layers, scratch))  # noqa: B023
        assert found[240] < 4.4 * found[60], found
