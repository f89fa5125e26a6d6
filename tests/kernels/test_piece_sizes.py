"""The sizes of pieces: within their memory, aligned, and with no more rounds of tiles than the whole matrix has."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import tuckaway_kernels.piece_sizes as piece_sizes
from tuckaway_kernels.piece_sizes import DEFAULT_PIECE_BYTES, PIECE_BYTES, rows_at_once, rows_of_pieces

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = [
    (1, 1),
    (300, 96),
    (4096, 4096),
    (4096, 11_008),
    (11_008, 4096),
    (8192, 8192),
    (28_672, 8192),
    (64, 200_000),
]


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_sizes, "processors", lambda device: 132)
    piece_sizes._least_rounds.cache_clear()


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_keep_to_their_memory_and_begin_where_they_should(
    device: torch.device, dtype: torch.dtype
) -> None:
    limit = PIECE_BYTES.get(device.type, DEFAULT_PIECE_BYTES)
    for (rows, cols), m, unit in product(SHAPES, [1, 600, 2048, 65_536], [1, 2, 32]):
        step = rows_of_pieces(rows, cols, dtype, device, unit, m)
        assert 1 <= step <= rows
        assert step * cols * dtype.itemsize <= max(limit, cols * dtype.itemsize)
        assert step == rows or step % unit == 0 or rows_at_once(cols, dtype, device) < unit


def test_pieces_add_few_rounds_of_tiles() -> None:
    """Of 128 rows of x and 256 columns, on 132 multiprocessors."""

    def rounds(m: int, columns: int) -> int:
        return math.ceil(math.ceil(m / 128) * math.ceil(columns / 256) / 132)

    for (rows, cols), m in product(SHAPES[2:7], [1024, 2048, 4096, 8192]):
        step = rows_of_pieces(rows, cols, torch.bfloat16, GPU, 1, m)
        taken = rows // step * rounds(m, step) + (rounds(m, rows % step) if rows % step else 0)
        assert taken <= rounds(m, rows) * 4 / 3 + 1, (rows, cols, m, step)


def test_the_sizes_that_were_measured() -> None:
    assert rows_of_pieces(4096, 11_008, torch.bfloat16, GPU, 1, 2048) == 2048  # 1524: 660 us
    assert rows_of_pieces(8192, 8192, torch.bfloat16, GPU, 1, 4096) == 2048
    assert rows_of_pieces(4096, 4096, torch.bfloat16, GPU, 1, 2048) == 4096
    assert rows_of_pieces(8192, 8192, torch.bfloat16, GPU, 1, 16) == 4096
