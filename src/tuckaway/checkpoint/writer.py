"""Write a checkpoint in bounded memory, so that a reader sees the old one or the new one: :class:`CheckpointWriter`.

**What a reader opens.** tuckaway and transformers look for ``model.safetensors`` first, then for
``model.safetensors.index.json`` and the shards that it names. So three things can be true of a folder, and one call
each changes it: ``model.safetensors`` appears or is replaced (a rename), it goes (a removal), the index appears or is
replaced (a rename). That call is the commit; every byte it reveals was synced before it.

=============  =====================================  =====================================
there was      new, one file                          new, shards
=============  =====================================  =====================================
nothing        rename to ``model.safetensors``        shards, then the index
one file       rename over it                         shards, index, then remove the file
shards         rename to ``model.safetensors``; then  shards, then rename the index over the
               the old index, the old shards go       old one; then the old shards go
=============  =====================================  =====================================

**Names.** Where a safetensors checkpoint was, the new shards carry a tag, as in
``model-00001-of-00003-1f0c52ab.safetensors``, so that no name ever means two files: an old index, even one that a slow
reader holds since before the commit, never leads to a new shard. Elsewhere they have Hugging Face's plain names.
Pickles in the folder are left alone; readers pass over them.

**After a kill.** Temps are removed by the next writer, and so are shards that no index names (killed between shards
and index). One writer a folder at a time: the second gets a :class:`~tuckaway.errors.StoreBusy`.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import torch

from tuckaway import files
from tuckaway.checkpoint.index import read_index
from tuckaway.checkpoint.seal import INDEX_PLACEHOLDER, sealed_index
from tuckaway.checkpoint.shards import ShardLayout, as_bytes, plan_shards
from tuckaway.errors import CheckpointError, DTypeMismatch, ShapeMismatch, StoreBusy, StoreError

__all__ = ["CheckpointWriter"]

_log = logging.getLogger("tuckaway")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}(?:-[0-9a-f]{8})?\.safetensors")
_LOCK = ".tuckaway.lock"
_CHUNK = 16 * 2**20  # bytes of a tensor moved to the CPU at once


class CheckpointWriter:
    """Writes one safetensors checkpoint; a context manager that discards what was not committed.

    The plan comes first, so that every header is known and the disk's space is taken before the first tensor; then the
    tensors, one at a time; then the commit. Tensors may come in any order, but the order of the plan writes each file
    from its start to its end. A kill at any moment leaves the old checkpoint or the new one; it may be
    the very checkpoint that is being read.

    Args:
        directory: folder to write to; made if it does not exist.
        max_shard_size: bytes of tensors in a file at most, as a number or like ``"5GB"`` (10**9) or ``"5GiB"``
            (2**30). A tensor that is bigger has a file to itself.
        metadata: strings for ``__metadata__`` of every file, beside ``{"format": "pt"}``.

    Raises:
        ValueError: ``max_shard_size`` is no size.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> with CheckpointWriter(folder) as writer:
        ...     writer.plan([("w", torch.float32, (2, 2))])
        ...     writer.write("w", torch.eye(2))
        ...     [path.name for path in writer.commit()]
        ['model.safetensors']
    """

    def __init__(
        self,
        directory: files.PathLike,
        *,
        max_shard_size: int | str = "10GB",
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.metadata = {"format": "pt", **(metadata or {})}
        self._max_bytes = as_bytes(max_shard_size)
        self._lock: files.FolderLock | None = None
        self._made_folder = False
        self._shards: list[_OpenShard] = []
        self._of: dict[str, _OpenShard] = {}
        self._done = False

    def plan(self, specs: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        """Decide the shards and take the folder and the space on the disk.

        Args:
            specs: name, dtype and shape of every tensor, in the order they are to lie in the files.

        Raises:
            CheckpointError: a name twice, a reserved one, a dtype the format does not have, or a second plan.
            StoreBusy: another process writes to the folder.
            StoreFull: the disk has no room.
            StoreError: the folder cannot be written to.
        """
        if self._lock is not None or self._done:
            raise CheckpointError("a writer makes one plan", where=self.directory)
        layouts = plan_shards(specs, self._max_bytes, self.metadata)
        self._made_folder = not files.exists(self.directory)
        files.make_folder(self.directory)
        self._lock = files.FolderLock(
            self.directory / _LOCK
        )  # before it is taken: an interrupt may come right behind
        if not self._lock.acquire():
            self._lock = None
            raise StoreBusy(
                "another process writes a checkpoint to this folder",
                where=self.directory,
                hint="wait for it to end, or choose another folder",
            )
        try:
            files.reap(self.directory)
            files.require_space(self.directory, sum(layout.nbytes for layout in layouts))
            self._begin(layouts)
        except BaseException:
            self.discard()
            raise

    def _begin(self, layouts: list[ShardLayout]) -> None:
        tag = ""
        if any(files.exists(self.directory / name) for name in (_SINGLE, _INDEX)):
            tag = f"-{secrets.token_hex(4)}"
        for number, layout in enumerate(layouts, 1):
            name = (
                f"model-{number:05d}-of-{len(layouts):05d}{tag}.safetensors" if len(layouts) > 1 else _SINGLE
            )
            shard = _OpenShard(layout, self.directory / name)
            self._shards.append(shard)
            self._of.update(dict.fromkeys(layout.tensors, shard))

    def write(self, name: str, tensor: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Write one tensor, or the pieces of one that together make its elements in row-major order.

        It may be on any device; at most 16 MiB of it are copied to the CPU at once.

        Raises:
            CheckpointError: it is not in the plan, or was written before.
            ShapeMismatch: it has another shape than planned, or its pieces another number of elements.
            DTypeMismatch: it has another dtype than planned.
            StoreError: the disk failed.
        """
        shard = self._of.get(name)
        if shard is None:
            raise CheckpointError(f"{name!r} is not in the plan, or was written before", where=self.directory)
        dtype, shape, offset, nbytes = shard.layout.tensors[name]
        if isinstance(tensor, torch.Tensor):
            if tuple(tensor.shape) != shape:
                raise ShapeMismatch(f"{name!r} was planned as {list(shape)} and is {list(tensor.shape)}")
            tensor = (tensor,)
        done = 0
        for piece in tensor:
            if piece.dtype != dtype:
                raise DTypeMismatch(f"{name!r} was planned as {dtype} and is {piece.dtype}")
            if done + piece.numel() * dtype.itemsize > nbytes:
                raise ShapeMismatch(f"{name!r} was planned as {list(shape)} and has more elements")
            done += shard.write(name, offset + done, piece)
        if done < nbytes:
            raise ShapeMismatch(
                f"{name!r} was planned as {list(shape)} and has {done // dtype.itemsize} elements"
            )
        del self._of[name]
        shard.finished_one()

    def commit(self) -> tuple[Path, ...]:
        """Make the new checkpoint the folder's one, and return its weight files.

        Raises:
            CheckpointError: a planned tensor was not written.
            StoreError: the disk failed. What the folder's checkpoint is then, old or new, is one of them whole.
        """
        if self._lock is None:
            raise CheckpointError("there is no plan to commit", where=self.directory)
        if self._of:
            raise CheckpointError(
                f"{len(self._of)} tensors were not written: {', '.join(list(self._of)[:3])}",
                where=self.directory,
            )
        old_single, old_index = self.directory / _SINGLE, self.directory / _INDEX
        superseded = self._superseded(old_index)
        paths = tuple(shard.file.path for shard in self._shards)
        if len(paths) == 1:
            self._shards[0].file.commit()
            if files.remove(old_index):
                files.sync_folder(self.directory)  # before the shards: an index must not outlive them
        else:
            self._publish(old_index, old_single)
            files.sync_folder(self.directory)
        self._done = True
        for path in sorted(superseded.difference(paths)):
            try:
                files.remove(path)
            except StoreError as error:  # the new checkpoint stands: what could not go only takes room
                _log.warning("a file of the old checkpoint stays: %s", error)
        self._release()
        return paths

    def _publish(self, index: Path, single: Path) -> None:
        """Give the shards their names, then the index its, and remove a single file; a failure takes all of it back."""
        # readers prefer a single file to the index: its removal is the commit then, not the index's rename
        shadowed = files.exists(single)
        with files.AtomicFile(index) as new_index:
            new_index.write(self._index())
            new_index.finish()
            try:
                for shard in self._shards:
                    shard.file.commit(sync=False)
                files.sync_folder(self.directory)
                new_index.commit(sync=False)
                if shadowed:
                    files.sync_folder(self.directory)
                    files.remove(single)
            except BaseException:
                # looked up, not counted: an interrupt may come right behind the call that commits
                if files.exists(single if shadowed else new_index.temp):
                    for path in [index] * shadowed + [shard.file.path for shard in self._shards]:
                        files.remove(path)
                raise

    def _superseded(self, index: Path) -> set[Path]:
        """Shards of the checkpoint that was there, and those that a killed writer left without an index."""
        old = {self.directory / name for name in files.names_in(self.directory) if _SHARD.fullmatch(name)}
        if files.exists(index):
            with suppress(CheckpointError):  # a broken one names nothing that could be removed
                old.update(p for p in read_index(index).shards.values() if p.parent == self.directory)
        return old

    def _index(self) -> bytes:
        weight_map = {name: shard.file.path.name for shard in self._shards for name in shard.layout.tensors}
        total = sum(nbytes for shard in self._shards for _, _, _, nbytes in shard.layout.tensors.values())
        content = {
            "metadata": {"total_size": total, **INDEX_PLACEHOLDER},
            "weight_map": dict(sorted(weight_map.items())),
        }
        return sealed_index(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")

    def discard(self) -> None:
        """Remove every trace of what was not committed. Twice, or after a commit, does no harm."""
        with ExitStack() as each:  # all of it, whatever fails on the way
            if self._made_folder and not self._done:
                each.callback(files.remove_folder, self.directory)
            each.callback(self._release)
            for shard in self._shards:
                each.callback(shard.file.discard)
            self._shards.clear()
            self._of.clear()

    def _release(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class _OpenShard:
    """One file being written."""

    def __init__(self, layout: ShardLayout, path: Path) -> None:
        self.layout = layout
        self.left = len(layout.tensors)
        self.sums = dict.fromkeys(layout.tensors, 0)
        self.file = files.AtomicFile(path, layout.nbytes)
        try:
            self.file.write_at(0, layout.header)
        except BaseException:
            self.file.discard()
            raise

    def write(self, name: str, offset: int, tensor: torch.Tensor) -> int:
        """Write a tensor's next elements at a byte of the data and return their number of bytes."""
        flat = tensor.detach().reshape(-1)
        step = max(1, _CHUNK // flat.dtype.itemsize)
        start = len(self.layout.header) + offset
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step].cpu().contiguous()
            data = part.view(torch.uint8).numpy()
            self.file.write_at(start + first * flat.dtype.itemsize, data)
            self.sums[name] = files.crc32(data, self.sums[name])
        return flat.numel() * flat.dtype.itemsize

    def finished_one(self) -> None:
        """Note that a tensor is complete; after the last one the header gets the checksums, and the file is closed."""
        self.left -= 1
        if self.left == 0:
            self.file.write_at(0, self.layout.sealed(self.sums))
            self.file.finish()
