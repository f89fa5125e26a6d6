"""Which tensor goes to which shard, and the shard's header: :func:`plan_shards`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tuckaway.checkpoint.header import DTYPES, MAX_HEADER
from tuckaway.checkpoint.seal import is_sealed, placeholder, seal
from tuckaway.errors import CheckpointError

__all__ = ["ShardLayout", "as_bytes", "header_of", "plan_shards"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|[KMGT]I?)B?")


@dataclass
class ShardLayout:
    """One file to be: its header, and where its tensors lie behind it.

    Args:
        tensors: name to dtype, shape, offset behind the header and bytes, in file order.
        header: the length, the header and its padding: all bytes before the first tensor's.
    """

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = field(default_factory=dict)
    header: bytes = b""
    data_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    def sealed(self, sums: Mapping[str, int]) -> bytes:
        """Return the header with the checksums of all tensors, by their names, filled in; it is no longer."""
        return self.header[:8] + seal(self.header[8:], [sums[name] for name in self.tensors])


def as_bytes(size: int | str) -> int:
    """Read a size: a number of bytes, or text like ``"10GB"`` (10**9 each) or ``"512MiB"`` (2**20 each).

    >>> as_bytes("1.5GB"), as_bytes("2KiB"), as_bytes(7)
    (1500000000, 2048, 7)

    Raises:
        ValueError: it is no size, or below 1 byte.
    """
    if isinstance(size, int):
        nbytes = size
    else:
        match = _SIZE.fullmatch(size.strip().upper())
        if match is None:
            raise ValueError(f"{size!r} is no size; write a number of bytes, or text like '10GB' or '512MiB'")
        nbytes = int(float(match[1]) * _UNITS[match[2]])
    if nbytes < 1:
        raise ValueError(f"a size of {size!r} holds nothing")
    return nbytes


def plan_shards(
    specs: Sequence[tuple[str, torch.dtype, Sequence[int]]], max_bytes: int, metadata: dict[str, str]
) -> list[ShardLayout]:
    """Distribute tensors over files in their order, each file filled while it stays within ``max_bytes``.

    Raises:
        CheckpointError: a name occurs twice or is reserved, or a dtype the format does not have.
    """
    if is_sealed(metadata):
        raise CheckpointError("metadata with keys that are reserved for checksums")
    shards = [ShardLayout()]
    seen = set()
    for name, dtype, shape in specs:
        if name in seen or name == "__metadata__":
            reason = "is reserved" if name == "__metadata__" else "is planned twice"
            raise CheckpointError(f"the name {name!r} {reason}")
        if dtype not in _NAMES:
            raise CheckpointError(f"safetensors has no dtype for {name!r}, which is {dtype}")
        seen.add(name)
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1].tensors and shards[-1].data_bytes + nbytes > max_bytes:
            shards.append(ShardLayout())
        shard = shards[-1]
        shard.tensors[name] = (dtype, tuple(shape), shard.data_bytes, nbytes)
        shard.data_bytes += nbytes
    for shard in shards:
        shard.header = header_of(shard, metadata)
    return shards


def header_of(shard: ShardLayout, metadata: dict[str, str], *, room: int = 0) -> bytes:
    """Return the length, the JSON and spaces up to a multiple of 8, so that the first tensor is aligned.

    Args:
        shard: its tensors.
        metadata: strings for ``__metadata__``.
        room: bytes that it is to have at least, a multiple of 8.

    Raises:
        CheckpointError: it is longer than the format allows, or a dtype that the format does not have.
    """
    content: dict[str, object] = {"__metadata__": {**metadata, **placeholder(len(shard.tensors))}}
    for name, (dtype, shape, offset, nbytes) in shard.tensors.items():
        if dtype not in _NAMES:
            raise CheckpointError(f"safetensors has no dtype for {name!r}, which is {dtype}")
        content[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"{len(shard.tensors)} names make a header of {len(text)} bytes, more than the {MAX_HEADER} allowed",
            hint="choose a smaller max_shard_size",
        )
    return len(text).to_bytes(8, "little") + text
