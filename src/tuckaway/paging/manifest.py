"""What an offload folder says about itself, and whose it is: :class:`Manifest`, :func:`parse_manifest`.

::

    {"about": "tuckaway pages", "version": 3, "fingerprint": "...", "nbytes": ..., "starts": [...],
     "checksum": "crc32", "cell": ..., "checksums": [[...], ...],
     "tuckaway.checksums": "crc32", "tuckaway.crc32": "HHHHHHHH"}

The last two are the seal that an index of a checkpoint has too: no byte of a manifest can change unnoticed. Versions 1
and 2 had none; like any other version they are refused, and their folder is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuckaway import files
from tuckaway.checkpoint.entry import open_regular
from tuckaway.checkpoint.header import MAX_HEADER, loads_strictly
from tuckaway.checkpoint.seal import INDEX_PLACEHOLDER, is_intact, sealed_index
from tuckaway.errors import CheckpointError, CheckpointNotFound, StoreCorrupt, StoreStale
from tuckaway.paging.page import EXTENT, PageLayout

__all__ = [
    "ANOTHER",
    "MANIFEST",
    "REMOVE",
    "VERSION",
    "Manifest",
    "fingerprint_of",
    "parse_manifest",
    "read_manifest",
    "refuse_foreign",
]

VERSION = 3
MANIFEST = "manifest.json"

ANOTHER = "wait for it to end or choose another offload_folder"
REMOVE = "remove the offload folder and load the model again"
EMPTY = "give an empty offload_folder, or remove this one if nothing needs it"

_ABOUT = "tuckaway pages"
_FINGERPRINT = re.compile(r"(once-)?[0-9a-f]{64}")
_KEYS = {"about", "version", "fingerprint", "nbytes", "starts", "checksum", "cell", "checksums"}
_MAX_BYTES = 2**63 - 1  # what a file can have


@dataclass(frozen=True)
class Manifest:
    """What lies in a store's file.

    Args:
        fingerprint: of :func:`fingerprint_of`.
        nbytes: size of the file.
        starts: first byte of every page, in order; multiples of 4096.
        cell: bytes that one checksum is of; a multiple of 4096.
        checksums: CRC-32 of every cell, by page.

    Example:
        >>> manifest = Manifest("0" * 64, 4096, (0,), 4096, ((7,),))
        >>> parse_manifest(manifest.text(), Path("manifest.json")) == manifest
        True
    """

    fingerprint: str
    nbytes: int
    starts: tuple[int, ...]
    cell: int
    checksums: tuple[tuple[int, ...], ...]

    @property
    def once(self) -> bool:
        """Whether the weights were in no file, so that their pages are never used again."""
        return self.fingerprint.startswith("once-")

    def text(self) -> bytes:
        """Return it as JSON with its checksum."""
        content = {
            "about": _ABOUT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "nbytes": self.nbytes,
            "starts": self.starts,
            "checksum": "crc32",
            "cell": self.cell,
            "checksums": self.checksums,
            **INDEX_PLACEHOLDER,
        }
        return sealed_index(json.dumps(content).encode())


def fingerprint_of(layouts: Iterable[PageLayout], identity: str) -> str:
    """Hash of everything that decides which byte lies where and what it means."""
    digest = hashlib.sha256(f"tuckaway {VERSION} {identity or os.urandom(16).hex()}\n".encode())
    for layout in layouts:
        for item in layout.items:
            digest.update(f"{item.key} {item.shape} {item.dtype} {item.offset}\n".encode())
        digest.update(b"\n")
    return ("" if identity else "once-") + digest.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest; None if there is none.

    Raises:
        StoreCorrupt: it cannot be read, or is not what was written.
        StoreStale: it is somebody else's file, or another version's.
    """
    path = folder / MANIFEST
    try:
        fd = open_regular(path)
    except CheckpointNotFound:
        return None
    except CheckpointError as error:
        raise StoreCorrupt(f"unreadable manifest: {error.what}", where=path, hint=REMOVE) from error
    try:
        size = files.status(fd, path).st_size
        if size > MAX_HEADER:
            raise _corrupt(f"it has {size} bytes, more than the {MAX_HEADER} allowed", path)
        data = bytearray(size)
        got = files.read_at(fd, memoryview(data), 0, path)
    finally:
        files.close(fd)
    return parse_manifest(bytes(data[:got]), path)


def parse_manifest(text: bytes, where: Path) -> Manifest:
    """Check a manifest, believing nothing.

    Args:
        text: what is in the file.
        where: the file, for messages.

    Raises:
        StoreCorrupt: it is not JSON as :func:`~tuckaway.checkpoint.header.loads_strictly` wants it, differs from its
            checksum, lacks something, or describes pages that cannot be.
        StoreStale: it is somebody else's file, or was written by another version of tuckaway.
    """
    ours = _ABOUT.encode() in text  # nobody is told to remove what may be another program's
    content = loads_strictly(text, where, error=StoreCorrupt, hint=REMOVE if ours else EMPTY)
    intact = is_intact(text, content)
    if intact is False:
        raise _corrupt("it differs from its checksum", where)
    if content.get("about") != _ABOUT:
        raise StoreStale("a manifest that is none of tuckaway's", where=where, hint=EMPTY)
    version = content.get("version")
    if type(version) is not int:
        raise _corrupt("it has no version", where)
    if version != VERSION:
        raise StoreStale(
            f"the pages were written by another version of tuckaway, in format {version} instead of {VERSION}",
            where=where,
            hint=REMOVE,
        )
    if intact is None:
        raise _corrupt("it has no checksum", where)
    if content.keys() != _KEYS or content["checksum"] != "crc32":
        raise _corrupt("its keys are not those of a manifest", where)
    return _checked(content, where)


def _checked(content: dict[str, Any], where: Path) -> Manifest:
    """Check types, ranges and what follows from one another."""
    fingerprint, nbytes, cell = content["fingerprint"], content["nbytes"], content["cell"]
    starts, checksums = content["starts"], content["checksums"]
    if type(fingerprint) is not str or not _FINGERPRINT.fullmatch(fingerprint):
        raise _corrupt("its fingerprint is none", where)
    if not _is_extent(nbytes) or not _is_extent(cell) or cell == 0:
        raise _corrupt("its sizes are no multiples of 4096", where)
    if type(starts) is not list or not all(map(_is_extent, starts)):
        raise _corrupt("its pages do not start at multiples of 4096", where)
    edges = [*starts, nbytes]
    sizes = [end - start for start, end in pairwise(edges)]
    if edges[0] != 0 or any(size < 0 for size in sizes):
        raise _corrupt("its pages do not follow one another", where)
    if type(checksums) is not list or len(checksums) != len(sizes):
        raise _corrupt("it has no checksums for each page", where)
    for number, (page, size) in enumerate(zip(checksums, sizes, strict=True)):
        if type(page) is not list or len(page) != -(-size // cell):
            raise _corrupt(f"it does not have the checksums of page {number}", where)
        if not all(type(value) is int and value < 2**32 for value in page):
            raise _corrupt(f"a checksum of page {number} is none", where)
    return Manifest(fingerprint, nbytes, tuple(starts), cell, tuple(tuple(page) for page in checksums))


def _is_extent(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES and value % EXTENT == 0


def _corrupt(what: str, where: Path) -> StoreCorrupt:
    return StoreCorrupt(f"damaged manifest: {what}", where=where, hint=REMOVE)


def refuse_foreign(folder: Path, manifest: Manifest | None) -> None:
    """Leave alone what belongs to somebody else."""
    # weights that were in no file are never used again, so their pages are nobody's loss
    if manifest is not None and not manifest.once:
        raise StoreStale(
            "the offload folder holds another model, or this one in another format", where=folder, hint=EMPTY
        )
    names = files.names_in(folder)
    if "index.json" in names or any(name.endswith(".dat") for name in names):
        raise StoreStale(
            "the offload folder holds weights that accelerate offloaded", where=folder, hint=EMPTY
        )
