"""Indexes of sharded checkpoints, and which file of a folder to read.

An index is a JSON object whose ``weight_map`` maps tensor names to file names. It comes from strangers, as the shards
do: a name that could lead out of the checkpoint's folder is refused before anything is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tuckaway import files
from tuckaway.checkpoint.entry import TensorEntry, open_regular, reading
from tuckaway.checkpoint.header import MAX_HEADER, loads_strictly
from tuckaway.checkpoint.seal import check_index
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    ShardIndexError,
    StoreError,
    UnsafeFormatError,
    UnsafePathError,
)

__all__ = [
    "INDEX_SUFFIX",
    "PICKLE_SUFFIXES",
    "SAFETENSORS",
    "ShardIndex",
    "check_one_format",
    "check_shards",
    "find_weights",
    "parse_index",
    "read_index",
    "resolve_inside",
    "shard_names",
]

SAFETENSORS = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
INDEX_SUFFIX = ".index.json"

_PREFERRED = (
    "model.safetensors",  # before the index, as transformers has it: the order of the writer's commit rests on it
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DISTRUST = "do not use this checkpoint"
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "random_states", "rng_state", "scaler", "sampler")


@dataclass(frozen=True)
class ShardIndex:
    """A checked index.

    Args:
        path: the index file.
        weight_map: tensor name to file name, as written.
        shards: file name to its path, in the order of the names; every one exists inside the folder.
        metadata: the index's own ``metadata``.
    """

    path: Path
    weight_map: dict[str, str]
    shards: dict[str, Path]
    metadata: dict[str, object]

    @property
    def pickled(self) -> bool:
        """Whether the shards are pickles."""
        return not next(iter(self.shards), SAFETENSORS).endswith(SAFETENSORS)


def read_index(path: files.PathLike, *, verify: bool = True) -> ShardIndex:
    """Read an index and find its shards; the shards are not opened.

    Args:
        path: the index.
        verify: compare it with its checksum, if it has one.

    Raises:
        ChecksumError: it is not what tuckaway wrote.
        ShardIndexError: it is no index, gives a tensor two shards, or names a shard that is missing.
        UnsafePathError: it names a path that leads out of its folder.
        UnsafeFormatError: its shards are of different formats, or of an unknown one.
    """
    path = Path(path)
    weight_map, metadata = parse_index(_read_all(path), path, verify=verify)
    names = sorted(set(weight_map.values()))
    check_one_format(names, path)
    shards = {name: resolve_inside(path.parent, name, path) for name in names}
    with reading(path.parent, "cannot look for the shards"):
        missing = [name for name, shard in shards.items() if not shard.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ShardIndexError(
            f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}{more}",
            where=path,
            hint="download them, or the whole checkpoint, again",
        )
    return ShardIndex(path, weight_map, shards, metadata)


def shard_names(path: Path) -> list[str]:
    """Return the file names of an index whose shards may not be there yet, in their order.

    Raises:
        ShardIndexError, UnsafePathError, UnsafeFormatError: as :func:`read_index`.
    """
    names = sorted(set(parse_index(_read_all(path), path)[0].values()))
    check_one_format(names, path)
    for name in names:
        resolve_inside(path.parent, name, path)
    return names


def parse_index(text: bytes, path: Path, *, verify: bool = True) -> tuple[dict[str, str], dict[str, object]]:
    """Return an index's ``weight_map`` and ``metadata``.

    Raises:
        ShardIndexError: it is no index.
        ChecksumError: it is not what tuckaway wrote.
    """
    content = loads_strictly(text, path, error=ShardIndexError, floats=True)
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not all(type(name) is str for name in weight_map.values()):
        raise ShardIndexError("the index has no weight_map from names to files", where=path)
    if not isinstance(metadata, dict):
        metadata = {}
    check_index(text, metadata, path, verify=verify)
    return weight_map, metadata


def _read_all(path: Path) -> bytes:
    fd = open_regular(path)
    try:
        with reading(path):
            size = os.fstat(fd).st_size
        if size > MAX_HEADER:
            raise ShardIndexError(
                f"an index of {size} bytes is longer than the {MAX_HEADER} allowed", where=path
            )
        data = bytearray(size)
        try:
            got = files.read_at(fd, memoryview(data), 0, path)
        except StoreError as error:
            raise CheckpointError(f"cannot read the index: {error.what}", where=path) from error
    finally:
        files.close(fd)
    return bytes(data[:got])


def check_one_format(names: Iterable[str], path: Path) -> None:
    """Make sure that all shards have the format that the index's own name promises.

    Raises:
        UnsafeFormatError: they have not; a pickle among safetensors is a way to smuggle one in.
    """
    safe = path.name.endswith(SAFETENSORS + INDEX_SUFFIX)
    for name in names:
        if name.endswith(SAFETENSORS):
            continue
        if safe or not name.endswith(PICKLE_SUFFIXES):
            kind = "an index of safetensors" if safe else "an index"
            raise UnsafeFormatError(f"{kind} names the file {name[:200]!r}", where=path, hint=_DISTRUST)
    kinds = {name.endswith(SAFETENSORS) for name in names}
    if len(kinds) > 1:
        raise UnsafeFormatError("the index mixes safetensors and pickles", where=path, hint=_DISTRUST)


def resolve_inside(folder: Path, name: str, where: Path | None = None) -> Path:
    r"""Return the path of ``name`` in ``folder``, refusing every way out of it.

    ``..``, absolute paths, drives (``C:``), UNC (``\\host\share``) are refused on every system, so that a checkpoint
    is good everywhere or nowhere. A symbolic link may lead to another place of the folder, or from a snapshot of
    the Hub's cache (``snapshots/<commit>/``) to the same repository's ``blobs/``.

    Raises:
        UnsafePathError: the name leads out, or can name no file.
    """
    parts = {*PureWindowsPath(name).parts, *PurePosixPath(name).parts}
    if (
        not parts - {"."}
        or any(character in name for character in ":\0\n")  # drives, and Windows' alternate streams
        or name.startswith(("/", "\\", "~"))
        or ".." in {part.strip() for part in parts}  # Windows drops spaces at an end
    ):
        raise UnsafePathError(
            f"the file name {name[:200]!r} leads out of the checkpoint's folder",
            where=where,
            hint=_DISTRUST,
        )
    path = folder / name
    with reading(path, "cannot follow its links"):
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(root) or _is_blob(real, root):
        return path
    raise UnsafePathError(
        f"the file {name[:200]!r} is a link to {real}, out of the checkpoint's folder",
        where=where,
        hint="replace the link by the file, or open that folder",
    )


def _is_blob(real: Path, root: Path) -> bool:
    """Whether ``real`` is a blob of the Hub cache's repository that the snapshot ``root`` belongs to."""
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            return real.is_relative_to(parent.parent.parent / "blobs")
    return False


def check_shards(index: ShardIndex, found: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Make sure that every tensor lies in the one shard that the index says.

    Args:
        index: the index.
        found: file name to the tensors that the file holds.

    Raises:
        ShardIndexError: a tensor is missing, lies in two shards, in another one, or in one but not in the index.
    """
    holder: dict[str, str] = {}
    for shard, entries in found.items():
        for name in entries:
            if name in holder:
                raise _disagree(index, f"{name!r} lies in two shards, {holder[name]} and {shard}")
            holder[name] = shard
    for name, shard in index.weight_map.items():
        if name not in holder:
            raise _disagree(index, f"{name!r} is to lie in {shard} and does not")
        if holder[name] != shard:
            raise _disagree(index, f"{name!r} is to lie in {shard} and lies in {holder[name]}")
    for name, shard in holder.items():
        if name not in index.weight_map:
            raise _disagree(index, f"{name!r} lies in {shard} and is not in the index")


def _disagree(index: ShardIndex, what: str) -> ShardIndexError:
    return ShardIndexError(
        what, where=index.path, hint="the files are of different checkpoints: download them again"
    )


def find_weights(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Choose the file to open in a folder, and say which others were passed over.

    safetensors come before pickles, and names that Hugging Face gives before any other; a folder whose one index, or
    whose one weight file, has another name is served too.

    Raises:
        CheckpointNotFound: there is none, or no telling which of several.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"cannot list the folder: {error.strerror}", where=folder) from error
    standard = [name for name in _PREFERRED if name in names]
    if standard:
        return folder / standard[0], tuple(standard[1:])
    for suffixes in ((SAFETENSORS,), PICKLE_SUFFIXES):
        indexes = [n for n in names if n.endswith(tuple(suffix + INDEX_SUFFIX for suffix in suffixes))]
        weights = [n for n in names if n.endswith(suffixes) and not n.startswith(_NO_WEIGHTS)]
        for choice in (indexes, weights):
            if len(choice) == 1:
                return folder / choice[0], ()
            if choice:
                raise CheckpointNotFound(
                    f"the folder has {len(choice)} candidates, no telling which: {', '.join(choice[:5])}",
                    where=folder,
                    hint="name the file or the index",
                )
    listing = f"; it has {', '.join(names[:8])}" if names else "; it is empty"
    raise CheckpointNotFound(
        f"no weights in this folder{listing}", where=folder, hint="name a folder, file or Hub id with weights"
    )
