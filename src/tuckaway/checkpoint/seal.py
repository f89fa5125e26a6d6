"""Checksums of everything tuckaway writes into a checkpoint: the *seal* in a shard's header, and in an index.

::

    shard:  "__metadata__": {..., "tuckaway.checksums": "crc32", "tuckaway.crc32": "HHHHHHHH TTTTTTTT TTTTTTTT ..."}
    index:  "metadata": {"total_size": ..., "tuckaway.checksums": "crc32", "tuckaway.crc32": "HHHHHHHH"}

Eight hexadecimal digits each: ``T`` of a tensor's bytes, in the order the tensors lie in the file (empty ones in the
header's order); ``H`` of the header's JSON, or of the index, as it stands but with ``H`` itself written as eight zeros.
The two keys vouch for each other, so that no single wrong byte can make a sealed file look unsealed.
safetensors and everything built on it passes over the keys. Any other program may write them; files without them are
read unverified.

The digits have their place from the start and are filled in last, so the header's length is known before any tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tuckaway import files
from tuckaway.checkpoint.entry import TensorEntry
from tuckaway.errors import ChecksumError

__all__ = [
    "INDEX_PLACEHOLDER",
    "check_index",
    "is_intact",
    "is_sealed",
    "placeholder",
    "seal",
    "sealed_index",
    "verified",
]

_ALGORITHM_KEY, _SUMS_KEY = "tuckaway.checksums", "tuckaway.crc32"
_ALGORITHM = "crc32"
_SUMS = re.compile(r"[0-9a-f]{8}( [0-9a-f]{8})*")
_PLACE = re.compile(rb'"tuckaway\.crc32":\s*"')  # in a string the quotes would be escaped: it is the key
_KEYS = re.compile(rb'"tuckaway\.(checksums|crc32)":')
_ZEROS = b"0" * 8
_AGAIN = "write or download it again, or read it with verify_checksums=False"


INDEX_PLACEHOLDER = {_ALGORITHM_KEY: _ALGORITHM, _SUMS_KEY: "0" * 8}
"""The metadata that an index is made with before :func:`sealed_index`."""


def placeholder(count: int) -> dict[str, str]:
    """Return the metadata that a header of ``count`` tensors is planned with."""
    return {_ALGORITHM_KEY: _ALGORITHM, _SUMS_KEY: " ".join(["0" * 8] * (count + 1))}


def seal(text: bytes, sums: Sequence[int]) -> bytes:
    """Fill the checksums into a header's JSON that was planned with :func:`placeholder`.

    Args:
        text: the header without its length.
        sums: CRC-32 of every tensor's bytes, in file order.
    """
    place = _place_of(text)
    if place is None:
        raise ValueError("the header was planned without checksums")
    tail = "".join(f" {value:08x}" for value in sums).encode()
    filled = text[: place + 8] + tail + text[place + 8 + len(tail) :]
    return filled[:place] + f"{files.crc32(filled):08x}".encode() + filled[place + 8 :]


def is_sealed(metadata: dict[str, str]) -> bool:
    """Whether a header's metadata has checksums, whole or damaged."""
    return _SUMS_KEY in metadata or _ALGORITHM_KEY in metadata


def verified(
    text: bytes, metadata: dict[str, str], entries: dict[str, TensorEntry], path: Path, *, verify: bool
) -> dict[str, TensorEntry]:
    """Compare a header with its checksum and return the entries with theirs; take the seal out of ``metadata``.

    Args:
        text: the header's JSON.
        metadata: its ``__metadata__``; changed.
        entries: every tensor, in file order.
        path: the file, for messages.
        verify: ``False``: take the seal out and believe everything.

    Raises:
        ChecksumError: the header is not what was written.
    """
    if not is_sealed(metadata):
        return entries
    algorithm, sums = metadata.pop(_ALGORITHM_KEY, None), metadata.pop(_SUMS_KEY, "")
    if not verify:
        return entries
    place = _place_of(text)
    if algorithm != _ALGORITHM or place is None or not _SUMS.fullmatch(sums):
        raise ChecksumError("the header's checksums are damaged", where=path, hint=_AGAIN)
    recorded, *each = [int(word, 16) for word in sums.split(" ")]
    if len(each) != len(entries) or files.crc32(_without(text, place)) != recorded:
        raise ChecksumError("the header differs from its checksum", where=path, hint=_AGAIN)
    return {
        name: replace(entry, crc32=value) for (name, entry), value in zip(entries.items(), each, strict=True)
    }


def sealed_index(text: bytes) -> bytes:
    """Fill its checksum into an index, or another JSON text, that was made with :data:`INDEX_PLACEHOLDER` in it."""
    place = _place_of(text)
    if place is None:
        raise ValueError("the index was made without a checksum")
    return text[:place] + f"{files.crc32(text):08x}".encode() + text[place + 8 :]


def check_index(text: bytes, metadata: dict[str, object], path: Path, *, verify: bool) -> None:
    """Compare an index with its checksum, if it has one, and take that out of ``metadata``.

    Args:
        text: the index.
        metadata: its ``metadata``; changed.
        path: the file, for messages.
        verify: ``False``: take the seal out and believe everything.

    Raises:
        ChecksumError: the index is not what was written.
    """
    if is_intact(text, metadata) is False and verify:
        raise ChecksumError("the index differs from its checksum", where=path, hint=_AGAIN)


def is_intact(text: bytes, metadata: dict[str, object]) -> bool | None:
    """Compare a JSON text with the checksum in it, and take that out of ``metadata``.

    Args:
        text: what :func:`sealed_index` returned, or a stranger's.
        metadata: the object of it that had :data:`INDEX_PLACEHOLDER`; changed.

    Returns:
        ``None``: it has no checksum, and no trace of one.
    """
    algorithm, recorded = metadata.pop(_ALGORITHM_KEY, None), metadata.pop(_SUMS_KEY, None)
    if not _KEYS.search(text):  # looked for in the text: "metadata" may be what was damaged
        return None
    place = _place_of(text)
    return (
        algorithm == _ALGORITHM
        and place is not None
        and recorded == f"{files.crc32(_without(text, place)):08x}"
    )


def _place_of(text: bytes) -> int | None:
    """Return where the first checksum's digits are; ``None`` unless there is exactly one such place."""
    found = [match.end() for match in _PLACE.finditer(text)]
    return found[0] if len(found) == 1 else None


def _without(text: bytes, place: int) -> bytes:
    return text[:place] + _ZEROS + text[place + 8 :]
