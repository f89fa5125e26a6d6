"""Checkpoints: open and check them, stream their tensors in bounded memory, write them atomically."""

from tuckaway.checkpoint.batches import Request
from tuckaway.checkpoint.checkpoint import Checkpoint
from tuckaway.checkpoint.entry import TensorEntry
from tuckaway.checkpoint.header import Header, read_header
from tuckaway.checkpoint.progress import Progress
from tuckaway.checkpoint.reader import PIECE_BYTES, Piece, stream
from tuckaway.checkpoint.ring import Ring
from tuckaway.checkpoint.writer import CheckpointWriter

__all__ = [
    "PIECE_BYTES",
    "Checkpoint",
    "CheckpointWriter",
    "Header",
    "Piece",
    "Progress",
    "Request",
    "Ring",
    "TensorEntry",
    "read_header",
    "stream",
]
