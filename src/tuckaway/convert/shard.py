"""One shard of the result: :class:`ShardFile` takes tensors piece by piece, :class:`InShard` is the stream's end."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from tuckaway import files
from tuckaway.checkpoint import Request, read_header, stream
from tuckaway.checkpoint.entry import open_regular
from tuckaway.convert.layout import ShardPlan
from tuckaway.errors import CheckpointError
from tuckaway.formats import Components, Shape, format_of
from tuckaway.load.place import Streaming
from tuckaway.load.sinks import CopySink, Sink, sink_for
from tuckaway.tensor import TensorSpec

__all__ = ["InShard", "ShardFile", "checksum_of"]


class ShardFile:
    """A safetensors file being written; a context manager that discards what was not committed.

    Args:
        path: the name it is to have.
        plan: what it is to hold.
        metadata: strings for ``__metadata__``.
    """

    def __init__(self, path: Path, plan: ShardPlan, metadata: dict[str, str]) -> None:
        self.plan = plan
        self.metadata = metadata
        self._file = files.AtomicFile(path)
        self._sums: dict[str, tuple[int, int]] = {}  # key to the bytes written and their CRC-32
        self._open: dict[str, torch.Tensor] = {}

    def write(self, key: str, start: int, tensor: torch.Tensor) -> None:
        """Write a piece of the tensor ``key`` from its byte ``start`` on; the pieces of a tensor come in order."""
        if key in self.plan.open:
            self._open[key] = tensor
            return
        _, _, offset, nbytes = self.plan.fixed[key]
        done, checksum = self._sums.get(key, (0, 0))
        data = _bytes_of(tensor)
        if start != done or start + len(data) > nbytes:
            raise AssertionError(f"{key}: bytes {start} to {start + len(data)} of {nbytes} came after {done}")
        self._file.write_at(self.plan.room + offset + start, data)
        self._sums[key] = (done + len(data), files.crc32(data, checksum))

    def commit(self) -> tuple[int, str]:
        """Give the file its name, synced, and return its bytes and its checksum.

        Raises:
            CheckpointError: a tensor of the plan was not written whole.
            StoreError: the disk failed.
        """
        shapes: dict[str, Shape] = {key: tuple(tensor.shape) for key, tensor in self._open.items()}
        missing = [key for key in self.plan.open if key not in shapes]
        for key, (_, _, _, nbytes) in self.plan.fixed.items():
            if nbytes != self._sums.get(key, (0, 0))[0]:
                missing.append(key)
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were not written whole: {', '.join(missing[:3])}")
        layout = self.plan.layout(shapes, self.metadata)
        for key, tensor in self._open.items():
            _, _, offset, _ = layout.tensors[key]
            data = _bytes_of(tensor)
            self._file.write_at(len(layout.header) + offset, data)
            self._sums[key] = (len(data), files.crc32(data))
        sums = {key: self._sums.get(key, (0, 0))[1] for key in layout.tensors}
        header = layout.sealed(sums)
        self._file.write_at(0, header)
        self._file.commit()
        return layout.nbytes, _digest(header)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.discard()


def checksum_of(path: Path) -> tuple[int, str]:
    """Read a shard from the disk, all of it, and return its bytes and its checksum, as :meth:`ShardFile.commit` does.

    Raises:
        ChecksumError: its bytes are not those that were written.
        CheckpointError: it is no whole safetensors file, or cannot be read.
    """
    header = read_header(path)
    for _ in stream([Request(entry) for entry in header.entries.values()]):
        pass  # every tensor is compared with the checksum in the header
    start = min((entry.offset for entry in header.entries.values()), default=header.identity.size)
    fd = open_regular(path)
    try:
        data = bytearray(start)
        files.read_at(fd, memoryview(data), 0, path)
    finally:
        os.close(fd)
    return header.identity.size, _digest(bytes(data))


def _digest(header: bytes) -> str:
    """Vouch for a whole shard: its header has the checksums of its tensors."""
    return hashlib.sha256(header).hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class InShard(Streaming):
    """A destination of the stream: one tensor in a shard, never whole in memory.

    Args:
        file: the shard.
        name: the tensor's name in it.
        device: where weights are quantized.
    """

    def __init__(self, file: ShardFile, name: str, device: torch.device) -> None:
        self.file = file
        self.name = name
        self.device = device
        self.spec: TensorSpec | None = None

    @override
    def open(self, spec: TensorSpec) -> Components:
        """Allocate all but the codes, which go through."""
        self.spec = spec
        if spec.layout is None:
            return {}
        specs = spec.components().items()
        return {
            key: torch.empty(shape, dtype=dtype, device=self.device)
            for key, (shape, dtype) in specs
            if key != "codes"
        }

    @override
    def sink(
        self, spec: TensorSpec, component: str, stored_dtype: torch.dtype, components: Components
    ) -> Sink:
        """Return what writes the pieces of a plain tensor, or of the codes, and keeps what is small."""
        if spec.layout is None:
            return _ToFile(self.file, self.name, spec.dtype)
        if component == "":
            return sink_for(spec, components, lambda start, codes: self.file.write(self.name, start, codes))
        if component == "codes":
            return _ToFile(self.file, self.name, stored_dtype)
        return CopySink(components[component], stored_dtype)

    @override
    def close(self, components: Components) -> None:
        """Write the scales and whatever else belongs to the codes."""
        if self.spec is None or self.spec.layout is None:
            return
        shape, dtype = self.spec.components()["codes"]
        whole = {"codes": torch.empty(shape, dtype=dtype, device="meta"), **components}
        whole = {key: part.cpu() if key != "codes" else part for key, part in whole.items()}
        parts = format_of(self.spec.layout.format).serialize(self.name, whole, self.spec.layout)
        for key, part in parts.items():
            if key != self.name:
                self.file.write(key, 0, part)


class _ToFile(Sink):
    """Writes pieces as they come, cast to ``dtype``."""

    align, whole = 1, False

    def __init__(self, file: ShardFile, key: str, dtype: torch.dtype) -> None:
        self.file = file
        self.key = key
        self.dtype = dtype
        self.left = file.plan.fixed[key][3]

    @override
    def write(self, start: int, piece: torch.Tensor) -> None:
        piece = piece.to(self.dtype)
        data = piece.view(torch.uint8)[: self.left]  # codes can be stored in a wider dtype, and padded to it
        self.left -= len(data)
        self.file.write(self.key, start * self.dtype.itemsize, data)

    @override
    def finish(self) -> None:
        """Nothing is left to do."""
