"""Tied weights that a checkpoint holds more than one copy of: they must be equal, or a tie would lose one."""

from __future__ import annotations

from contextlib import closing

import torch

from tuckaway.checkpoint import Piece, Request, TensorEntry, stream
from tuckaway.errors import MismatchError
from tuckaway.load.match import Match

__all__ = ["check_copies"]


def check_copies(match: Match, *, piece_bytes: int) -> None:
    """Compare all copies of tied weights, in the dtype the model will have them in, in bounded memory.

    Args:
        match: a model and a checkpoint that belong together.
        piece_bytes: bytes of a copy in memory at once.

    Raises:
        MismatchError: two names are one weight in the model and differ in the checkpoint.
        CheckpointError: a file is not what its header promised.
    """
    for feed in match.feeds:
        for copy in feed.copies:
            for component, entry in feed.entries.items():
                other = copy[component]
                if not _equal(entry, other, feed.spec.dtype if component == "" else None, piece_bytes):
                    raise MismatchError(
                        f"{entry.name!r} and {other.name!r} are one weight in the model and differ in the checkpoint",
                        where=entry.path.name,
                        hint="untie them in the model (transformers: tie_word_embeddings=False)",
                    )


def _equal(one: TensorEntry, other: TensorEntry, dtype: torch.dtype | None, piece_bytes: int) -> bool:
    if one.numel != other.numel:
        return False
    if type(one) is type(other) is TensorEntry and (one.path, one.offset, one.dtype) == (
        other.path,
        other.offset,
        other.dtype,
    ):
        return True  # a pickle keeps a tie: both names lie at one place
    count = max(piece_bytes // max(one.dtype.itemsize, other.dtype.itemsize), 1)
    left = stream([Request(one)], piece_bytes=count * one.dtype.itemsize)
    right = stream([Request(other)], piece_bytes=count * other.dtype.itemsize)
    with closing(left), closing(right):  # type: ignore[type-var]
        return all(
            torch.equal(_as_seen(a, dtype), _as_seen(b, dtype)) for a, b in zip(left, right, strict=True)
        )


def _as_seen(piece: Piece, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = piece.tensor if dtype is None else piece.tensor.to(dtype)
    return tensor.contiguous().view(torch.uint8)  # bit for bit: NaN is no difference
