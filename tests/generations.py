"""Checkpoints whose every value says which save they are of; and what a reader like transformers finds in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tuckaway.checkpoint import CheckpointWriter

NAMES = tuple(f"block.{number}.weight" for number in range(6))
ONE_FILE, TWO_SHARDS, SIX_SHARDS = "1GB", "1600", "400"


def tensor_of(name: str, generation: int) -> torch.Tensor:
    """Return 100 values, 400 bytes, that no other name and no other generation has."""
    # integers: a quick machine writes thousands of generations in a test, and fp32 tells no more than 167 apart here
    return torch.arange(100, dtype=torch.int32) + 100 * NAMES.index(name) + 1000 * generation


def save(folder: Path, generation: int, max_shard_size: str) -> tuple[Path, ...]:
    """Write a generation."""
    with CheckpointWriter(folder, max_shard_size=max_shard_size) as writer:
        writer.plan([(name, torch.int32, (100,)) for name in NAMES])
        for name in NAMES:
            writer.write(name, tensor_of(name, generation))
        return writer.commit()


def generation_of(folder: Path) -> int | None:
    """Say which generation a folder holds, reading it as transformers does; ``None``: no checkpoint.

    Raises:
        AssertionError: parts of several, or bytes of none.
    """
    if (folder / "model.safetensors").is_file():
        found = load_file(folder / "model.safetensors")
    elif (folder / "model.safetensors.index.json").is_file():
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        shards = {shard: load_file(folder / shard) for shard in set(weight_map.values())}
        assert sum(map(len, shards.values())) == len(weight_map)
        found = {name: shards[shard][name] for name, shard in weight_map.items()}
    else:
        return None
    assert sorted(found) == sorted(NAMES)
    generation = int(found[NAMES[0]][0]) // 1000
    for name in NAMES:
        assert torch.equal(found[name], tensor_of(name, generation)), (name, found[name][:3])
    return generation
