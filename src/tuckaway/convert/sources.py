"""Where a conversion's bytes come from: :class:`LocalSource`, a checkpoint that is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tuckaway.checkpoint import Checkpoint, TensorEntry

__all__ = ["LocalSource", "Source"]


class Source(Protocol):
    """A checkpoint whose shards may arrive later than its headers."""

    checkpoint: Checkpoint
    low_disk: bool
    """Shards are removed when they are not needed any more."""
    in_shard_order: bool
    """Tensors are best written in the order of the shards they come from."""

    def identity(self) -> list[object]:
        """Return what tells this source's bytes from any other's."""

    def expect(self, paths: Iterable[Path]) -> None:
        """Begin to fetch shards that are going to be asked for."""

    def entry(self, entry: TensorEntry) -> TensorEntry:
        """Return the entry of a tensor whose shard is there, waiting for it."""

    def drop(self, paths: Iterable[Path]) -> None:
        """Note that shards are not needed any more."""

    def close(self) -> None:
        """Stop whatever goes on."""


class LocalSource:
    """A checkpoint on the disk."""

    low_disk = False
    in_shard_order = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def identity(self) -> list[object]:
        """Return name, size and time of every file."""
        found: list[object] = []
        for path in self.checkpoint.files:
            status = path.stat()
            found.append([path.name, status.st_size, status.st_mtime_ns])
        return found

    def expect(self, paths: Iterable[Path]) -> None:
        """They are there."""

    def entry(self, entry: TensorEntry) -> TensorEntry:
        """Return it as it is."""
        return entry

    def drop(self, paths: Iterable[Path]) -> None:
        """They belong to somebody else."""

    def close(self) -> None:
        """Nothing goes on."""
