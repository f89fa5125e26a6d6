"""Where every tensor of the result lies: which shard, which bytes. Known before the first byte is read.

The state of a nested tensor is JSON with the mean of its scales in decimals: its length is known only when the tensor
is quantized. So what has a fixed size lies at the front of a shard, at offsets that are known, what has not behind it,
and the header is padded with spaces (which the format allows) to the longest it can become.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tuckaway.checkpoint.shards import ShardLayout, header_of
from tuckaway.formats import Components, Shape, format_of
from tuckaway.load.match import Feed
from tuckaway.tensor import TensorSpec

__all__ = ["Item", "ShardPlan", "plan_files"]

_LONGEST = -1.2345678901e-30
"""A value of fp32 whose decimals are as long as any's: a sign, 17 digits, a point and an exponent of two."""


@dataclass(frozen=True)
class Item:
    """One tensor of the result.

    Args:
        feed: its names, its final form and what of the source makes it.
        value: its value, where the model made it and the source lacks it.
    """

    feed: Feed
    value: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """The name it is written under."""
        return self.feed.names[0]


@dataclass
class ShardPlan:
    """One file to be.

    Args:
        items: the tensors that it holds.
        fixed: key to dtype, shape, offset behind the header and bytes.
        open: key to dtype and the longest shape, of what is as long as its content.
        data_bytes: bytes of ``fixed``.
        room: bytes of the header, padding included.
    """

    items: list[Item] = field(default_factory=list)
    fixed: dict[str, tuple[torch.dtype, Shape, int, int]] = field(default_factory=dict)
    open: dict[str, tuple[torch.dtype, Shape]] = field(default_factory=dict)
    data_bytes: int = 0
    room: int = 0

    @property
    def most_bytes(self) -> int:
        """Bytes of the file at most."""
        return self.room + self.data_bytes + sum(_bytes(*part) for part in self.open.values())

    def add(self, item: Item, fixed: dict[str, tuple[torch.dtype, Shape]], open: set[str]) -> None:
        """Append an item's tensors."""
        self.items.append(item)
        for key, (dtype, shape) in fixed.items():
            if key in open:
                self.open[key] = (dtype, shape)
                continue
            nbytes = _bytes(dtype, shape)
            self.fixed[key] = (dtype, shape, self.data_bytes, nbytes)
            self.data_bytes += nbytes

    def layout(self, open: dict[str, Shape], metadata: dict[str, str]) -> ShardLayout:
        """Return the final layout, given the shapes of what was open."""
        tensors, end = dict(self.fixed), self.data_bytes
        for key, (dtype, _) in self.open.items():
            nbytes = _bytes(dtype, open[key])
            tensors[key] = (dtype, open[key], end, nbytes)
            end += nbytes
        layout = ShardLayout(tensors, data_bytes=end)
        layout.header = header_of(layout, metadata, room=self.room)
        return layout


def plan_files(items: Sequence[Item], max_bytes: int, metadata: dict[str, str]) -> list[ShardPlan]:
    """Distribute the items over shards in their order, each filled while it stays within ``max_bytes``.

    Raises:
        CheckpointError: a dtype that safetensors has not, or more names than a header can hold.
    """
    shards = [ShardPlan()]
    for item in items:
        keys, open = _keys_of(item.name, item.feed.spec)
        nbytes = sum(_bytes(*part) for part in keys.values())
        if shards[-1].items and shards[-1].data_bytes + nbytes > max_bytes:
            shards.append(ShardPlan())
        shards[-1].add(item, keys, open)
    for shard in shards:
        longest = shard.layout({key: shape for key, (_, shape) in shard.open.items()}, metadata)
        shard.room = len(longest.header)
    return shards


def _keys_of(name: str, spec: TensorSpec) -> tuple[dict[str, tuple[torch.dtype, Shape]], set[str]]:
    """Return dtype and (longest) shape of what is written for a tensor, and the keys whose length its values decide."""
    if spec.layout is None:
        return {name: (spec.dtype, spec.shape)}, set()
    format = format_of(spec.layout.format)
    short, long = (format.serialize(name, _example(spec, value), spec.layout) for value in (0.0, _LONGEST))
    open = {key for key in short if short[key].shape != long[key].shape}
    return {key: (part.dtype, tuple(part.shape)) for key, part in long.items()}, open


def _example(spec: TensorSpec, value: float) -> Components:
    return {
        key: torch.full((), value, dtype=dtype)
        if shape == ()
        else torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in spec.components().items()
    }


def _bytes(dtype: torch.dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.itemsize
