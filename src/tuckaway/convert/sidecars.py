"""What lies beside the weights: ``config.json`` with its ``quantization_config``, and files that are carried along."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tuckaway import files
from tuckaway.checkpoint.index import INDEX_SUFFIX, PICKLE_SUFFIXES, SAFETENSORS, resolve_inside
from tuckaway.convert.layout import Item
from tuckaway.convert.staging import MANIFEST
from tuckaway.errors import CheckpointError
from tuckaway.save import describe

__all__ = ["IGNORED", "carry", "files_to_carry", "write_config"]

IGNORED = (
    SAFETENSORS,
    *PICKLE_SUFFIXES,
    INDEX_SUFFIX,
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".ckpt",
    ".npz",
    ".tflite",
)
"""Ends of the names of weights and their indexes, in any framework's format."""
_MOST_BYTES = 256 * 2**20  # of one file: the longest tokenizers have 35 MB
_WRITTEN = ("config.json", MANIFEST)


def files_to_carry(source: Path) -> list[Path]:
    """Return tokenizer, generation settings, templates, licences: everything at the top that is no weights.

    Raises:
        UnsafePathError: a link leads out of the source.
    """
    found = []
    for name in sorted(os.listdir(source)):
        path = source / name
        if name.startswith(".") or name.endswith(IGNORED) or name in _WRITTEN or not path.is_file():
            continue
        resolve_inside(source, name, path)
        found.append(path)
    return found


def carry(paths: Sequence[Path], target: Path) -> None:
    """Copy files into a folder; what is far bigger than any tokenizer is left.

    Raises:
        CheckpointError: a file cannot be read.
        StoreError: the disk failed.
    """
    for path in paths:
        try:
            content = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else None
        except OSError as error:
            raise CheckpointError(f"cannot read it: {error.strerror}", where=path) from error
        if content is not None:
            files.write_atomically(target / path.name, content)


def write_config(
    config: dict[str, Any] | None, items: Sequence[Item], plain_linears: Sequence[str], target: Path
) -> None:
    """Write the source's ``config.json`` with what is new: the dtype, and how the weights are quantized.

    Raises:
        StoreError: the disk failed.
    """
    if config is None:
        return
    content = {
        key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")
    }
    specs = [item.feed.spec for item in items]
    dtype = next((s.dtype for s in specs if s.dtype.is_floating_point and not s.is_buffer), torch.float32)
    content["dtype"] = str(dtype).removeprefix("torch.")
    described = describe((s.layout for s in specs if s.layout is not None), plain_linears)
    if described is not None:
        content["quantization_config"] = described
    files.write_atomically(target / "config.json", json.dumps(content, indent=2).encode() + b"\n")
