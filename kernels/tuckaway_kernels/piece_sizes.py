"""How many rows of a matrix are decoded at once: as memory allows, and as fills the multiprocessors of a GPU.

A library's product takes tiles of 128 rows of x and 256 columns of the result, one a multiprocessor at a time. What
counts is how many rounds of tiles all pieces take together: 4096x11008, 2,048 rows of x, in three pieces of 1,524 rows
takes an H100 660 us; two of 2,048 are 128 tiles each, a round for 132 multiprocessors, as the whole matrix would take.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import torch

from tuckaway_kernels.launching import processors

PIECE_BYTES: Final = {"cpu": 16 << 20}
"""Decoded weights held at once, by type of device; on the CPU little, because a product may copy them once more."""

DEFAULT_PIECE_BYTES: Final = 64 << 20
"""On GPUs: 8192 x 4096 bf16 weights keep every multiprocessor of an H100 busy in the product."""

AHEAD_TERMS: Final = 2 * 10**11
"""Multiplications from which pieces are decoded on another stream: 0.5 ms of an H100, whose host needs 0.1 for it."""

_ROUNDS_MATTER: Final = 512
"""Rows of x from which rounds are counted; with fewer, reading the weights takes as long."""

_TILE: Final = 128, 256
_TERMS_US: Final = 3.05e6
"""Multiplications a microsecond that a multiprocessor of an H100 does."""
_DECODED_US: Final = 1.1e6
"""Weights a microsecond that an H100 decodes."""
_PIECE_US: Final = 4.0
"""What another piece costs: two launches, and the tail of a product."""


def rows_at_once(cols: int, dtype: torch.dtype, device: torch.device, unit: int = 1) -> int:
    """Return how many rows a piece has at most: at least one, a multiple of ``unit`` where it can be."""
    limit = PIECE_BYTES.get(device.type, DEFAULT_PIECE_BYTES)
    rows = max(limit // (dtype.itemsize * max(cols, 1)), 1)
    return rows - rows % unit if rows >= unit else rows


def decodes_ahead(m: int, rows: int, cols: int, device: torch.device) -> bool:
    """Tell whether each piece but the first is decoded on another stream while the one before is multiplied."""
    return device.type == "cuda" and m * rows * cols >= AHEAD_TERMS


def rows_of_pieces(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, unit: int = 1, m: int = 1
) -> int:
    """Return how many rows each piece of a matrix ``[rows, cols]`` has, to multiply ``m`` rows of x by.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        dtype: of decoded weights.
        device: where.
        unit: pieces start at a multiple of this row where they can.
        m: rows of x.
    """
    most = rows_at_once(cols, dtype, device, unit)
    ahead = decodes_ahead(m, rows, cols, device)
    if rows <= most and not ahead:
        return rows
    if device.type != "cuda" or m < _ROUNDS_MATTER:
        return min(most, rows)
    return _least_rounds(rows, cols, most, math.lcm(_TILE[1], unit), m, ahead, processors(device))


@lru_cache(maxsize=1024)
def _least_rounds(rows: int, cols: int, most: int, unit: int, m: int, ahead: bool, busy: int) -> int:
    """Return the number of rows, ``most`` or less, with which the product is expected to be done first."""

    def rounds(columns: int) -> int:
        return -(-(-(-m // _TILE[0]) * -(-columns // _TILE[1])) // busy)

    round_us = _TILE[0] * _TILE[1] * cols / _TERMS_US
    best, least = min(most, rows), math.inf
    fewest = -(-rows // most)
    for count in range(fewest, fewest + 8):
        step = min(-(-rows // (count * unit)) * unit, rows)
        if step > most:
            continue
        full, rest = divmod(rows, step)
        pieces = full + bool(rest)
        expected = (full * rounds(step) + (rounds(rest) if rest else 0)) * round_us + pieces * _PIECE_US
        # all but the first piece is decoded while another is multiplied
        expected += rows * cols / _DECODED_US / (pieces if ahead else 1)
        if expected < least:
            best, least = step, expected
    return best
