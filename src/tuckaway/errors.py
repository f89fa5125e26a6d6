"""Every error tuckaway raises, in one tree.

::

    TuckawayError
    ├── ConfigError               a quantization config that makes no sense, an unknown format     (ValueError)
    ├── CheckpointError           something is wrong with the files of a checkpoint
    │   ├── CheckpointNotFound        no checkpoint where one was named                            (FileNotFoundError)
    │   ├── HeaderError               a safetensors header that is not valid
    │   ├── ShardIndexError           index and shards disagree, a shard is missing
    │   ├── TruncatedError            a file ends before its tensors do
    │   ├── UnsafePathError           a path that leaves the checkpoint's folder, or no regular file
    │   ├── UnsafeFormatError         a pickle that wants to run code, or pickles refused
    │   └── ChecksumError             bytes differ from their recorded checksum
    ├── MismatchError             a checkpoint and a model that do not belong together             (ValueError)
    │   ├── KeyMismatch               missing or unexpected names
    │   ├── ShapeMismatch             a tensor of another shape
    │   ├── DTypeMismatch             an integer tensor for a float parameter, or the reverse
    │   └── NonFiniteError            NaN or infinity in a weight
    ├── PlanError                 a device map that cannot be, a model that does not fit           (ValueError)
    ├── PagingError               a paged model was asked for what it cannot do                    (RuntimeError)
    ├── StoreError                something is wrong with an offload folder                        (OSError)
    │   ├── StoreBusy                 another process uses it
    │   ├── StoreStale                it belongs to another model
    │   ├── StoreFull                 the disk has no room
    │   └── StoreCorrupt              its files are damaged
    └── LoadOutOfMemoryError      memory ran out while loading; the model is as it was             (MemoryError)

A message says what is wrong, where (name, file, byte) and what to do, in this order:

>>> str(TuckawayError("no tensor 'a.weight'", where="model.safetensors, byte 8", hint="check the model's class"))
"no tensor 'a.weight' (model.safetensors, byte 8). check the model's class"
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "ChecksumError",
    "ConfigError",
    "DTypeMismatch",
    "HeaderError",
    "KeyMismatch",
    "LoadOutOfMemoryError",
    "MismatchError",
    "NonFiniteError",
    "PagingError",
    "PlanError",
    "ShapeMismatch",
    "ShardIndexError",
    "StoreBusy",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreStale",
    "TruncatedError",
    "TuckawayError",
    "UnsafeFormatError",
    "UnsafePathError",
    "nearest_names",
]


class TuckawayError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong, one clause, lower case, without a full stop.
        where: the name, file or byte position it was found at.
        hint: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        message = what if self.where is None else f"{what} ({self.where})"
        super().__init__(message if hint is None else f"{message}. {hint}")

    def __str__(self) -> str:
        return str(self.args[0])  # OSError and KeyError subclasses would format their arguments otherwise


class ConfigError(TuckawayError, ValueError):
    """A quantization config that makes no sense, or a format nobody registered."""


class CheckpointError(TuckawayError):
    """Something is wrong with the files of a checkpoint."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """No checkpoint where one was named."""


class HeaderError(CheckpointError):
    """A safetensors header that is not valid."""


class ShardIndexError(CheckpointError):
    """Index and shards disagree, or a shard is missing."""


class TruncatedError(CheckpointError):
    """A file ends before its tensors do."""


class UnsafePathError(CheckpointError):
    """A path that leaves the checkpoint's folder, or that is no regular file."""


class UnsafeFormatError(CheckpointError):
    """A pickle that wants to run code, or a pickle where pickles were refused."""


class ChecksumError(CheckpointError):
    """Bytes differ from their recorded checksum."""


class MismatchError(TuckawayError, ValueError):
    """A checkpoint and a model that do not belong together."""


class KeyMismatch(MismatchError):
    """Names that the model has and the checkpoint lacks, or the reverse."""


class ShapeMismatch(MismatchError):
    """A tensor whose shape differs between checkpoint and model."""


class DTypeMismatch(MismatchError):
    """An integer tensor for a float parameter, or the reverse."""


class NonFiniteError(MismatchError):
    """NaN or infinity in a weight."""


class PlanError(TuckawayError, ValueError):
    """A device map that cannot be, or a model that does not fit.

    Args:
        what: as :class:`TuckawayError` has it.
        where: as there.
        hint: as there.
        shortfall_bytes: by how many bytes a model does not fit; ``None``: something else is wrong.
    """

    def __init__(
        self, what: str, *, where: object = None, hint: str | None = None, shortfall_bytes: int | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.shortfall_bytes = shortfall_bytes


class PagingError(TuckawayError, RuntimeError):
    """A paged model was asked for what it cannot do."""


class StoreError(TuckawayError, OSError):
    """Something is wrong with an offload folder."""


class StoreBusy(StoreError):
    """Another process uses the offload folder."""


class StoreStale(StoreError):
    """The offload folder belongs to another model."""


class StoreFull(StoreError):
    """The disk has no room for the offloaded weights."""


class StoreCorrupt(StoreError):
    """The offload folder's files are damaged."""


class LoadOutOfMemoryError(TuckawayError, MemoryError):
    """Memory ran out while loading; the model is as it was."""


def nearest_names(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Name what a misspelt ``name`` may have meant, ready to end a message; empty when nothing is close.

    >>> nearest_names("lm_haed.weight", ["lm_head.weight", "h.0.ln_1.bias"])
    "did you mean 'lm_head.weight'?"
    """
    close = get_close_matches(name, list(candidates), n=limit, cutoff=0.6)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
