"""The choices of kernels: every one must be within what its kernel can do, on GPUs measured and not."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import tuckaway_kernels.selection as selection
from tuckaway_kernels.selection import Choice, choose_4bit, choose_int8, fuses

GPU = torch.device("cuda", 0)
BATCHES = [0, 1, 2, 3, 4, 5, 16, 17, 64, 65, 128, 129, 4096]
SHAPES = [(1, 1), (7, 33), (33, 96), (50_257, 1600), (6400, 1600), (4096, 4096), (8192, 8192), (28_672, 8192)]


@pytest.fixture(params=["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"])
def _gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: request.param)
    monkeypatch.setattr(selection, "processors", lambda device: 132)
    selection._entries.cache_clear()


@pytest.mark.usefixtures("_gpu")
def test_4bit_choices_keep_to_their_kernels_rules() -> None:
    found = set()
    for m, (rows, cols), blocksize, nested in product(BATCHES, SHAPES, [32, 64, 4096], [True, False]):
        choice = choose_4bit(GPU, m, rows, cols, blocksize, nested)
        if choice is None:
            wide = m > 64 and rows > 8192
            assert m in (0, 129, 4096) or cols % 32 or (m > 2 and (cols % 64 or blocksize < 64)) or wide
        elif choice.kernel == "gemv":
            assert choice.tile_m == m
            assert m in (1, 2, 4)
            assert rows % choice.tile_rows == cols % 32 == 0
        else:
            assert blocksize >= 64
            assert cols % 64 == 0
            assert choice.warps % choice.across == 0
            assert choice.tile_m in (8, 16, 32, 64)
            assert choice.split <= max(cols // (64 * choice.blocks), 1)
        found.add(choice)
    assert None in found
    assert {c.kernel for c in found if c} == {"gemv", "mma"}


@pytest.mark.usefixtures("_gpu")
def test_choices_of_wgmma_keep_to_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "runs_wgmma", lambda device: True)
    taken = 0
    for m, (rows, cols), blocksize in product([33, 64, 65, 128, 129, 512, 4096], SHAPES, [32, 64, 4096]):
        choice = choose_4bit(GPU, m, rows, cols, blocksize, False)
        if choice is None or choice.kernel != "wgmma":
            small = m > 128 and rows * cols < 2**25
            assert m == 4096 or small or rows % 64 or cols % 128 or blocksize < 64 or cols % blocksize
            continue
        taken += 1
        assert rows % (16 * choice.warps) == cols % 128 == cols % blocksize == 0
        share = -(-(cols // 128) // choice.split)
        assert (choice.split - 1) * share < cols // 128  # no part is empty
        assert choice.tile_m in (64, 128, 256)
    assert taken
    assert choose_4bit(GPU, 32, 8192, 8192, 64, False).kernel == "mma"  # type: ignore[union-attr]


@pytest.mark.usefixtures("_gpu")
def test_int8_choices_keep_to_their_kernels_rules() -> None:
    for m, (rows, cols), dtype in product(BATCHES, SHAPES, [torch.float32, torch.bfloat16]):
        choice = choose_int8(GPU, m, rows, cols, dtype)
        if choice is not None and choice.kernel == "mma":
            assert dtype != torch.float32
            assert cols % choice.columns == 0
        elif choice is not None:
            assert m <= 4
            assert choice.columns % 512 == 0


def test_the_measured_table_is_used_on_the_gpu_it_was_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(selection, "processors", lambda device: 132)
    selection._entries.cache_clear()
    assert choose_4bit(GPU, 1, 8192, 8192, 64, False) == Choice("gemv", 4, 8, 1, programs=264)
    tile = choose_4bit(GPU, 64, 11_008, 4096, 64, False)
    assert tile == Choice("mma", 16, 8, 64, split=4, across=8)
    assert choose_4bit(GPU, 1, 4096, 4096, 64, False) == Choice("gemv", 4, 4, 1, programs=528)
    selection._entries.cache_clear()


def test_devices_without_ptx_take_no_ptx() -> None:
    assert not fuses(torch.device("cpu"))
    assert not fuses(torch.device("xpu", 0))
