"""An open checkpoint, all of whose headers were checked: :class:`Checkpoint`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from tuckaway.checkpoint.batches import Request
from tuckaway.checkpoint.entry import TensorEntry, reading
from tuckaway.checkpoint.header import read_header
from tuckaway.checkpoint.hub import fetch, is_repo_id
from tuckaway.checkpoint.index import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    SAFETENSORS,
    check_shards,
    find_weights,
    read_index,
    resolve_inside,
)
from tuckaway.checkpoint.pickle import read_pickle
from tuckaway.checkpoint.reader import PIECE_BYTES, Piece, read_tensor, stream
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    UnsafeFormatError,
    nearest_names,
)

__all__ = ["Checkpoint"]

PICKLE_VARIABLE = "TUCKAWAY_ALLOW_PICKLE"
"""Environment variable that refuses every pickle when it is 0, whatever the code passes."""

_log = logging.getLogger("tuckaway")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint: what they are and where they lie. Made by :meth:`open`; holds no open file.

    Attributes:
        entries: every tensor by its name, file by file in file order.
        files: the weight files, in the order of their names.
        metadata: the ``__metadata__`` of all files; of a key that several have, the first one's value.
        directory: the folder the files lie in.
        pickled: whether the files are pickles.
    """

    entries: dict[str, TensorEntry]
    files: tuple[Path, ...]
    metadata: dict[str, str]
    directory: Path
    pickled: bool = False

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        *,
        revision: str | None = None,
        allow_pickle: bool = True,
        verify_checksums: bool = True,
    ) -> Checkpoint:
        """Find a checkpoint and check all of its headers; no tensor is read.

        Args:
            location: a safetensors file, an ``.index.json``, a folder, a pickle (``pytorch_model.bin``), or the id of
                a repository on the Hugging Face Hub (``"org/name"``). A local path comes before a Hub id, and
                safetensors before pickles.
            revision: branch, tag or commit, for a Hub id.
            allow_pickle: read pickles where there is nothing else (``weights_only=True`` always, with a warning).
            verify_checksums: compare headers and index with the checksums that tuckaway writes, now, and every tensor
                when it is read. Files of other programs have none.

        Raises:
            ChecksumError: a header or an index is not what tuckaway wrote.
            CheckpointNotFound: there is none, here or on the Hub.
            HeaderError: a safetensors header breaks the format's rules.
            TruncatedError: a file ends before its tensors do.
            ShardIndexError: index and shards disagree, or a shard is missing.
            UnsafePathError: an index or a link leads out of the folder, or a file is none.
            UnsafeFormatError: a pickle that wants to run code, or any where ``allow_pickle`` is False.

        Example:
            >>> import safetensors.torch, tempfile
            >>> folder = tempfile.mkdtemp()
            >>> safetensors.torch.save_file({"w": torch.zeros(2, 3)}, f"{folder}/model.safetensors")
            >>> Checkpoint.open(folder).entries["w"].shape
            (2, 3)
        """
        with reading(location, "cannot look for it"):
            path = _locate(location, revision, allow_pickle)
            is_folder = path.is_dir()
        if is_folder:
            folder = path
            path, passed_over = find_weights(folder)
            if passed_over:
                _log.info("reading %s, not %s beside it", path, ", ".join(passed_over))
            resolve_inside(folder, path.name, folder)
        if path.name.endswith(INDEX_SUFFIX):
            return _open_index(path, allow_pickle, verify_checksums)
        if path.name.endswith(SAFETENSORS):
            header = read_header(path, verify=verify_checksums)
            return cls(header.entries, (path,), header.metadata, path.parent)
        if path.name.endswith(PICKLE_SUFFIXES):
            _permit_pickle(path, allow_pickle)
            return cls(read_pickle(path), (path,), {}, path.parent, pickled=True)
        known = ", ".join((SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, *PICKLE_SUFFIXES))
        raise UnsafeFormatError("a file of no known format", where=path, hint=f"known are {known}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def config(self) -> dict[str, Any] | None:
        """Return the ``config.json`` that lies beside the weights, or ``None``.

        Raises:
            CheckpointError: it is no JSON object.
            UnsafePathError: it is a link out of the folder.
        """
        path = self.directory / "config.json"
        with reading(path):
            there = path.is_file()
        if not there:
            return None
        resolve_inside(self.directory, path.name, path)
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read the configuration: {error}", where=path) from error
        if not isinstance(content, dict):
            raise CheckpointError("the configuration is no JSON object", where=path)
        return content

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole, into memory of its own.

        Raises:
            KeyError: there is no tensor of this name.
            TruncatedError: its file ends before it does.
            CheckpointError: its file was changed since the checkpoint was opened, or the disk failed.
        """
        try:
            entry = self.entries[name]
        except KeyError:
            raise KeyError(f"no tensor {name!r}. {nearest_names(name, self.entries)}") from None
        return read_tensor(entry)

    def stream(
        self,
        names: Sequence[str] | None = None,
        *,
        piece_bytes: int = PIECE_BYTES,
        progress: bool | None = False,
    ) -> Iterator[Piece]:
        """Read tensors piece by piece: :func:`~tuckaway.checkpoint.stream` of the given names, or of all.

        Raises:
            KeyError: there is no tensor of a given name.
            CheckpointError: as by :func:`~tuckaway.checkpoint.stream`.
        """
        entries = self.entries.values() if names is None else [self.entries[name] for name in names]
        return stream([Request(entry) for entry in entries], piece_bytes=piece_bytes, progress=progress)


def _locate(location: str | os.PathLike[str], revision: str | None, allow_pickle: bool) -> Path:
    """Return an existing file or folder."""
    path = Path(location)
    if path.exists():
        return path
    if isinstance(location, str) and is_repo_id(location):
        return fetch(location, revision, allow_pickle=allow_pickle)
    folder = path.parent
    near = []
    if folder.is_dir():
        near = get_close_matches(path.name, [entry.name for entry in os.scandir(folder)], n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "name a file, a folder or a Hub id like 'org/name'"
    )
    raise CheckpointNotFound("no such file or folder", where=path, hint=hint)


def _open_index(path: Path, allow_pickle: bool, verify: bool) -> Checkpoint:
    index = read_index(path, verify=verify)
    found: dict[str, dict[str, TensorEntry]] = {}
    metadata: dict[str, str] = {}
    if index.pickled:
        _permit_pickle(next(iter(index.shards.values())), allow_pickle)
    for name, shard in index.shards.items():
        if index.pickled:
            found[name] = read_pickle(shard)
        else:
            header = read_header(shard, verify=verify)
            found[name] = header.entries
            metadata = {**header.metadata, **metadata}
    check_shards(index, found)
    entries = {name: entry for shard in found.values() for name, entry in shard.items()}
    return Checkpoint(entries, tuple(index.shards.values()), metadata, path.parent, pickled=index.pickled)


def _permit_pickle(path: Path, allow_pickle: bool) -> None:
    forbidden = os.environ.get(PICKLE_VARIABLE, "1").strip().lower() in ("0", "false", "no", "off")
    if forbidden or not allow_pickle:
        reason = f"{PICKLE_VARIABLE} is off" if forbidden else "allow_pickle=False"
        raise UnsafeFormatError(
            f"a pickle, and pickles are refused ({reason})",
            where=path,
            hint="use a safetensors version of this checkpoint",
        )
    _log.warning(
        "%s is a pickle, which can carry code; reading it with weights_only=True. "
        "A safetensors version of it is safer",
        path,
    )
