"""A checkpoint on the Hugging Face Hub whose shards are quantized as they arrive: :class:`RemoteSource`."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tuckaway import files
from tuckaway.checkpoint import Checkpoint, Header, TensorEntry, read_header
from tuckaway.checkpoint.header import DTYPES
from tuckaway.checkpoint.hub import Repository, survey
from tuckaway.checkpoint.index import check_one_format, resolve_inside, shard_names
from tuckaway.convert.sidecars import IGNORED
from tuckaway.errors import CheckpointError

__all__ = ["RemoteSource", "download_sidecars"]

_log = logging.getLogger("tuckaway")

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class RemoteSource:
    """Shards come one after the other, the next while one is worked on.

    Args:
        repository: the repository, at one commit.
        checkpoint: its tensors, of whose files none need be there.
        low_disk: remove a shard from the Hub's cache when it is not needed any more.
    """

    in_shard_order = True

    def __init__(self, repository: Repository, checkpoint: Checkpoint, *, low_disk: bool) -> None:
        self.repository = repository
        self.checkpoint = checkpoint
        self.low_disk = low_disk
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tuckaway-download")
        self._coming: dict[Path, Future[Path]] = {}
        self._headers: dict[Path, tuple[int, dict[int, TensorEntry]]] = {}

    @classmethod
    def find(cls, repo_id: str, revision: str | None, *, low_disk: bool) -> RemoteSource | None:
        """Survey a repository; ``None`` where it has to be fetched whole: it is quantized, or pickled, or out of reach.

        Raises:
            CheckpointError: there is no such repository, or its files make no sense.
        """
        repository = survey(repo_id, revision)
        if repository is None or not {_INDEX, _SINGLE} & set(repository.names):
            return None
        directory = download_sidecars(repository)
        if _SINGLE in repository.names:
            shards = [_SINGLE]
        else:
            index = repository.download(_INDEX)
            shards, directory = shard_names(index), index.parent
            check_one_format(shards, index)
        if directory is None:
            return None
        entries: dict[str, TensorEntry] = {}
        for shard in shards:
            path = resolve_inside(directory, shard, directory)
            for name, (dtype, shape, begin, end) in repository.header(shard).items():
                if name in entries or dtype not in DTYPES:
                    raise CheckpointError(
                        f"{name!r} occurs twice, or has the unknown dtype {dtype!r}", where=shard
                    )
                if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
                    raise CheckpointError(f"{name!r} has {end - begin} bytes", where=shard)
                entries[name] = TensorEntry(name, DTYPES[dtype], shape, path, begin, end - begin)
        if any(name.endswith(".SCB") or ".quant_state." in name for name in entries):
            return None  # small tensors say what the others are
        found = Checkpoint(entries, tuple(directory / shard for shard in shards), {}, directory)
        return cls(repository, found, low_disk=low_disk)

    def identity(self) -> list[object]:
        """Return repository and commit."""
        return [self.repository.repo_id, self.repository.commit]

    def expect(self, paths: Iterable[Path]) -> None:
        """Begin to download what is not on its way."""
        for path in sorted(paths):
            if path not in self._coming:
                self._coming[path] = self._pool.submit(self.repository.download, path.name)

    def entry(self, entry: TensorEntry) -> TensorEntry:
        """Wait for the tensor's shard and return its place in it.

        Raises:
            CheckpointError: the download failed, or the shard is not what its header on the Hub was.
        """
        path = entry.path
        if path not in self._headers:
            self.expect([path])
            self._headers[path] = _by_offset(read_header(self._coming[path].result()))
        start, entries = self._headers[path]
        found = entries.get(entry.offset)  # not by name, which may be the model's by now
        if entry.nbytes == 0:
            return dataclasses.replace(entry, offset=start)
        if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(f"{entry.name!r} is not what the Hub said it was", where=path)
        return dataclasses.replace(found, name=entry.name)

    def drop(self, paths: Iterable[Path]) -> None:
        """Take shards out of the Hub's cache, where that was asked for."""
        for path in paths:
            self._headers.pop(path, None)
            if self.low_disk and path.exists():
                blob = Path(os.path.realpath(path))
                files.remove(path)
                files.remove(blob)

    def close(self) -> None:
        """Begin no further download, and wait for the one that is under way."""
        self._pool.shutdown(cancel_futures=True)


def _by_offset(header: Header) -> tuple[int, dict[int, TensorEntry]]:
    """Return where the data starts, and the tensors that are not empty by their place behind it."""
    entries = header.entries.values()
    start = min((entry.offset for entry in entries), default=header.identity.size)
    return start, {entry.offset - start: entry for entry in entries if entry.nbytes}


def download_sidecars(repository: Repository) -> Path | None:
    """Download tokenizer, configuration and whatever else lies at the top and is no weights; return their folder."""
    folder = None
    for name in repository.names:
        if "/" not in name and not name.startswith(".") and not name.endswith(IGNORED):
            folder = repository.download(name).parent
    return folder
