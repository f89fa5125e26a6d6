"""Read pickled checkpoints (``pytorch_model.bin``) as places in a file: :func:`read_pickle`.

``torch.load`` with ``weights_only=True`` runs on the meta device: it builds tensors without data, each of whose
storages says at which byte of the archive it lies. From there on the stream reads them as it reads safetensors. What
the archive says of itself is checked with a parser of its own first: records are stored, not compressed, and all lie
in the file.

A pickle is a program. ``weights_only`` knows few words, none of which does harm, but was beaten twice
(CVE-2025-32434, CVE-2026-24747; both before torch 2.10); so every pickle is warned of, and none is read without it.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuckaway.checkpoint.entry import (
    FileIdentity,
    ResidentEntry,
    StridedEntry,
    TensorEntry,
    open_regular,
    reading,
)
from tuckaway.errors import CheckpointError, HeaderError, TruncatedError, UnsafeFormatError

__all__ = ["read_pickle"]

_log = logging.getLogger("tuckaway")

_SAFE_TORCH = (2, 10)  # the first without a known way round weights_only
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes before the name of a record; the lengths of name and extra field are its last four
_MAX_PICKLE = (
    100_000_000  # bytes of the pickle itself, which holds names and shapes only: as a safetensors header
)
_AGAIN = "write or download it again"
_SAFER = "use a safetensors version of this checkpoint, or convert it where harm can be borne"


def read_pickle(path: Path) -> dict[str, TensorEntry]:
    """Find the tensors of a pickled state dict. Tied tensors are two entries of the same bytes.

    Of an archive (torch 1.6 and later) no tensor is read; a file of the older format is read into memory whole.

    Raises:
        UnsafeFormatError: it is anything but a dictionary of tensors, or wants to run code, which is not run.
        TruncatedError: the archive is cut.
        HeaderError: sizes that contradict each other or the file.
        CheckpointNotFound: there is no such file.
        UnsafePathError: it is no regular file.
    """
    with reading(path), os.fdopen(open_regular(path), "rb") as file:
        identity = FileIdentity.of(file.fileno())
        if file.read(len(_ZIP)) != _ZIP:
            file.seek(0)
            _log.warning("%s has the format of torch before 1.6: all of it is read into memory", path)
            tensors = _tensors(_load(file, path, "cpu"), path)
            return {name: _resident(name, tensor, path, identity) for name, tensor in tensors.items()}
        records = _records(file, identity.size, path)
        file.seek(0)
        tensors = _tensors(_load(file, path, "meta"), path)
        if not all(_offset(tensor) in records for tensor in tensors.values()):
            _log.warning("%s was not written by torch.save alone: all of it is read into memory", path)
            file.seek(0)
            tensors = _tensors(_load(file, path, "cpu"), path)
            return {name: _resident(name, tensor, path, identity) for name, tensor in tensors.items()}
    entries = [_entry(name, tensor, records, path, identity) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: entry.offset)
    return {entry.name: entry for entry in entries}


def _records(file: io.BufferedReader, size: int, path: Path) -> dict[int, int]:
    """Return the bytes of every record by its offset, having checked that the file can hold them all."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        if isinstance(error.__context__, OSError):  # zipfile calls a file that it could not read no archive
            raise error.__context__ from None
        raise TruncatedError(
            f"the archive's directory cannot be read: {error}", where=path, hint=_AGAIN
        ) from error
    records: dict[int, int] = {}
    names = set()
    for info in infos:
        what = f"the record {info.filename[:200]!r}"
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsafeFormatError(
                f"{what} is compressed, which torch.save never does", where=path, hint=_SAFER
            )
        if info.filename in names:
            raise UnsafeFormatError(f"{what} is there twice", where=path, hint=_SAFER)
        names.add(info.filename)
        head = b""
        if 0 <= info.header_offset < size:
            file.seek(info.header_offset)
            head = file.read(_LOCAL_HEADER)
        if len(head) < _LOCAL_HEADER or not head.startswith(_ZIP):
            raise TruncatedError(
                f"{what} has no header", where=f"{path}, byte {info.header_offset}", hint=_AGAIN
            )
        start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", head[-4:]))
        if start + info.file_size > size:
            raise TruncatedError(
                f"{what} ends behind the file: {start + info.file_size} bytes expected, {size} found",
                where=path,
                hint=_AGAIN,
            )
        if info.filename.endswith("data.pkl") and info.file_size > _MAX_PICKLE:
            raise UnsafeFormatError(
                f"a pickle of {info.file_size} bytes is more than names", where=path, hint=_SAFER
            )
        if info.filename.endswith("/byteorder"):
            file.seek(start)
            if file.read(info.file_size) != b"little":
                raise UnsafeFormatError(
                    "the numbers are big-endian", where=path, hint="convert it where it was made"
                )
        records[start] = info.file_size
    if sum(records.values()) > size:
        raise UnsafeFormatError(
            "the records overlap: together they are bigger than the file", where=path, hint=_SAFER
        )
    return records


def _load(file: io.BufferedReader, path: Path, device: str) -> Any:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise UnsafeFormatError(
            f"pickles are not read with torch {torch.__version__}, whose weights_only can be got round",
            where=path,
            hint=f"install torch {'.'.join(map(str, _SAFE_TORCH))} or newer, or use a safetensors version",
        )
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises is anything: KeyError, IndexError, struct.error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UnsafeFormatError(
            f"torch.load with weights_only=True refuses it: {reason}", where=path, hint=_SAFER
        ) from error


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict's tensors, of which the content may be one or hold one as ``state_dict``."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise UnsafeFormatError(f"it holds no state dict but {type(content).__name__}", where=path)
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    others = [str(name)[:100] for name in content if name not in tensors]
    if others and not tensors:
        raise UnsafeFormatError(f"it holds no tensors but {', '.join(others[:5])}", where=path)
    if others:
        _log.warning(
            "%s: %d items are no tensors and are passed over: %s", path, len(others), ", ".join(others[:5])
        )
    for name, tensor in tensors.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if type(name) is not str or not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}"
            raise UnsafeFormatError(f"{str(name)[:200]!r} is no plain tensor ({kind})", where=path)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _offset(tensor: torch.Tensor) -> int | None:
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _entry(
    name: str, tensor: torch.Tensor, records: dict[int, int], path: Path, identity: FileIdentity
) -> TensorEntry:
    record = _offset(tensor)
    if record is None:  # the caller looked: this cannot be
        raise CheckpointError(f"{name!r} has no place", where=path)
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    itemsize = tensor.dtype.itemsize
    nbytes = tensor.numel() * itemsize
    span = 0
    if nbytes:
        span = (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * itemsize
    first = int(tensor.storage_offset()) * itemsize
    if nbytes and (first + span > records[record] or nbytes > identity.size):
        raise HeaderError(
            f"tensor {name[:200]!r} is to be {nbytes} bytes of a storage of {records[record]}",
            where=f"{path}, byte {record}",
            hint=_AGAIN,
        )
    offset = record + (first if nbytes else 0)
    if tensor.is_contiguous():
        return TensorEntry(name, tensor.dtype, shape, path, offset, nbytes, identity)
    return StridedEntry(name, tensor.dtype, shape, path, offset, nbytes, identity, stride, span)


def _resident(name: str, tensor: torch.Tensor, path: Path, identity: FileIdentity) -> ResidentEntry:
    if tensor.numel() * tensor.dtype.itemsize > identity.size:
        raise HeaderError(f"tensor {name[:200]!r} is bigger than the file", where=path, hint=_AGAIN)
    return ResidentEntry(
        name, tensor.dtype, tuple(tensor.shape), path, 0, tensor.nbytes, identity, tensor.contiguous()
    )
