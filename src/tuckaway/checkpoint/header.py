"""Read the header of a safetensors file, believing nothing: :func:`read_header`.

A file is 8 bytes (the header's length, little-endian), the header (a JSON object: name to dtype, shape and
``data_offsets``, and ``__metadata__``, strings to strings), and the tensors without a hole. Whatever the safetensors
library refuses is refused; so are names that occur twice, which it lets the last one win.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from tuckaway import files
from tuckaway.checkpoint.entry import FileIdentity, TensorEntry, open_regular, reading
from tuckaway.checkpoint.seal import verified
from tuckaway.errors import CheckpointError, HeaderError, StoreError, TruncatedError, TuckawayError

__all__ = ["DTYPES", "MAX_HEADER", "Header", "header_length", "loads_strictly", "parse_header", "read_header"]

MAX_HEADER = 100_000_000
"""Bytes of the longest header that safetensors accepts."""

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    key: getattr(torch, name) for key, name in _NAMES.items() if hasattr(torch, name)
}
"""The format's names of dtypes, and torch's; those that torch cannot hold (sub-byte floats) are left out."""

_MAX_COUNT = 2**63 - 1  # torch counts elements and bytes in int64
_AGAIN = "write or download it again"
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Header:
    """The checked header of one file.

    Args:
        entries: every tensor by its name, in file order.
        metadata: the ``__metadata__`` of the file.
        identity: the file as it was.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    identity: FileIdentity


def read_header(path: files.PathLike, *, verify: bool = True) -> Header:
    """Read and check the header of a safetensors file; its tensors are not read.

    Args:
        path: the file.
        verify: compare the header with its checksum, and take those of the tensors over; where there are any.

    Raises:
        ChecksumError: the header is not what tuckaway wrote.
        HeaderError: the header breaks a rule of the format, or the file has bytes behind its tensors.
        TruncatedError: the file ends before its header or its tensors do.
        CheckpointNotFound: there is no such file.
        UnsafePathError: it is no regular file.
        CheckpointError: the system refused to read.
    """
    path = Path(path)
    fd = open_regular(path)
    try:
        with reading(path):
            identity = FileIdentity.of(fd)
        start, text = _read_text(fd, identity.size, path)
    finally:
        files.close(fd)
    return parse_header(text, path, start, identity, verify=verify)


def parse_header(
    text: bytes, path: Path, start: int, identity: FileIdentity, *, verify: bool = True
) -> Header:
    """Check a header's text, in a file of which ``identity`` gives the size and whose tensors begin at ``start``.

    Raises:
        HeaderError, TruncatedError, ChecksumError: as :func:`read_header`.
    """
    content = loads_strictly(text, path, offset=8)
    metadata = content.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise HeaderError("__metadata__ does not map strings to strings", where=path, hint=_AGAIN)
    entries = _entries(content, path, start, identity)
    return Header(verified(text, metadata, entries, path, verify=verify), metadata, identity)


def _read_text(fd: int, size: int, path: Path) -> tuple[int, bytes]:
    """Return where the tensors start and the header's bytes; nothing is allocated before sizes are checked."""
    length = header_length(_read(fd, 0, 8, path), size, path)
    return 8 + length, _read(fd, 8, length, path)


def header_length(first: bytes, size: int, path: Path) -> int:
    """Return the header's length, of which ``first`` are the 8 bytes, in a file of ``size`` bytes.

    Raises:
        HeaderError: it is longer than the format allows.
        TruncatedError: the file is too short for it.
    """
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise HeaderError(
            f"the header is to have {length} bytes, more than the {MAX_HEADER} allowed",
            where=f"{path}, byte 0",
            hint="this is hardly a safetensors file",
        )
    if 8 + length > size:
        raise _truncated(path, 8 + length, size, "its header does")
    return length


def _read(fd: int, offset: int, count: int, path: Path) -> bytes:
    data = bytearray(count)
    try:
        got = files.read_at(fd, memoryview(data), offset, path)
    except StoreError as error:
        raise CheckpointError(f"cannot read the header: {error.what}", where=path) from error
    if got < count:
        raise _truncated(path, offset + count, offset + got, "its header does")
    return bytes(data)


def _truncated(path: Path, expected: int, got: int, what: str) -> TruncatedError:
    return TruncatedError(
        f"the file ends before {what}: {expected} bytes expected, {got} found",
        where=path,
        hint=_AGAIN,
    )


class _DuplicateKey(ValueError):
    """A JSON object names a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKey(max(counts, key=counts.__getitem__))
    return content


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"the number {literal[:40]} is not allowed here")


def _natural(literal: str) -> int:
    if literal[0] == "-" or len(literal) > 20:  # 20 digits: more than any count of 64 bits has
        _refuse(literal)
    return int(literal)


def loads_strictly(
    text: bytes,
    path: Path,
    *,
    offset: int = 0,
    error: type[TuckawayError] = HeaderError,
    floats: bool = False,
    hint: str = _AGAIN,
) -> dict[str, Any]:
    """Parse a JSON object in UTF-8 whose keys are unique and whose numbers are natural.

    Args:
        text: the JSON.
        path: the file, for messages.
        offset: byte of the file that ``text`` starts at, for messages.
        error: what to raise.
        floats: allow any number.
        hint: what the error's reader can do.
    """
    with _positions(text, path, offset, error, hint):
        if not floats and not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        decoded = text.decode("utf-8")
        if floats:
            content = json.loads(decoded, object_pairs_hook=_unique)
        else:
            content = json.loads(
                decoded,
                object_pairs_hook=_unique,
                parse_int=_natural,
                parse_float=_refuse,
                parse_constant=_refuse,
            )
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if "\\u" in decoded:  # half a surrogate pair, which is no character, can only come from an escape
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


@contextmanager
def _positions(text: bytes, path: Path, offset: int, kind: type[TuckawayError], hint: str) -> Iterator[None]:
    """Turn what a parser raises into ``kind`` with the file and, where known, the byte."""
    at: int | None = None
    cause: Exception
    try:
        yield
        return
    except json.JSONDecodeError as error:
        at, cause = len(error.doc[: error.pos].encode()), error
        what = f"invalid JSON: {error.msg[0].lower()}{error.msg[1:]}"
    except UnicodeDecodeError as error:
        at, cause, what = error.start, error, "the text is not UTF-8"
    except UnicodeEncodeError as error:
        cause, what = error, "a string has half a surrogate pair"
    except _DuplicateKey as error:
        at = max(0, text.rfind(json.dumps(error.args[0], ensure_ascii=False).encode("utf-8", "replace")))
        cause, what = error, f"the name {error.args[0][:200]!r} occurs twice"
    except (ValueError, RecursionError, MemoryError) as error:
        cause = error
        what = (
            "the JSON is nested too deep" if isinstance(error, RecursionError) else f"invalid JSON: {error}"
        )
    where = path if at is None else f"{path}, byte {offset + at}"
    raise kind(what, where=where, hint=hint) from cause


def _entries(
    content: dict[str, Any], path: Path, start: int, identity: FileIdentity
) -> dict[str, TensorEntry]:
    """Check every tensor by itself, then all of them as one gapless row from ``start`` to the file's end."""
    found = [_entry(name, info, path, start, identity) for name, info in content.items()]
    found.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = start
    for entry in found:
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else f"leaves a hole from byte {end} on"
            raise _bad(entry.name, what, path, entry.offset)
        end += entry.nbytes
    if end > identity.size:
        raise _truncated(path, end, identity.size, "its tensors do")
    if end < identity.size:
        raise HeaderError(
            f"{identity.size - end} bytes lie behind the last tensor",
            where=f"{path}, byte {end}",
            hint=_AGAIN,
        )
    return {entry.name: entry for entry in found}


def _entry(name: str, info: Any, path: Path, start: int, identity: FileIdentity) -> TensorEntry:
    if type(info) is not dict or info.keys() != _KEYS:
        raise _bad(name, "is not described by exactly dtype, shape and data_offsets", path)
    dtype = DTYPES.get(info["dtype"]) if type(info["dtype"]) is str else None
    if dtype is None:
        raise _bad(name, f"has the unknown dtype {str(info['dtype'])[:40]!r}", path)
    shape, offsets = info["shape"], info["data_offsets"]
    if type(shape) is not list or not all(type(size) is int for size in shape):
        raise _bad(name, "has a shape that is no list of integers", path)
    if type(offsets) is not list or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise _bad(name, "has data_offsets that are not two integers", path)
    nbytes = dtype.itemsize
    for size in shape:  # one by one: [2**62, 8, 0] has no element and still overflows
        nbytes *= size
        if nbytes > _MAX_COUNT or size > _MAX_COUNT:
            raise _bad(name, f"has a shape too big to count: {str(shape)[:100]}", path)
    begin, end = offsets
    if end - begin != nbytes:
        raise _bad(
            name, f"has {end - begin} bytes where its shape and dtype make {nbytes}", path, start + begin
        )
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, nbytes, identity)


def _bad(name: str, what: str, path: Path, byte: int | None = None) -> HeaderError:
    where = path if byte is None else f"{path}, byte {byte}"
    return HeaderError(f"tensor {name[:200]!r} {what}", where=where, hint=_AGAIN)
