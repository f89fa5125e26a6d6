"""The kernel in Triton's interpreter, against the reference (which is tested against bitsandbytes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from golden import DTYPES, edge_blocks, golden
from tuckaway_kernels.codebooks import FP4_THRESHOLDS, NF4_THRESHOLDS
from tuckaway_kernels.quantize_4bit.reference import quantize_4bit

LAUNCH = "tuckaway_kernels.quantize_4bit.launch"


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("n", [1, 77, 4096, 8195])
def test_equals_the_reference(
    interpret: Callable[..., Any], format: str, dtype: str, blocksize: int, n: int
) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(DTYPES[dtype])
    codes, absmax = interpret(LAUNCH, "launch", x, format, blocksize)
    expected, scales = quantize_4bit(x, format, blocksize)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, scales)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_bytes_of_bitsandbytes_for_edge_blocks(
    interpret: Callable[..., Any], format: str, dtype: str
) -> None:
    expected = golden()["edges"][f"{format}/{dtype}"]
    codes, absmax = interpret(LAUNCH, "launch", edge_blocks(dtype), format, 64)
    assert codes.numpy().tobytes().hex() == expected["codes"]
    assert absmax.numpy().tobytes().hex() == expected["absmax"]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_decides_exactly_at_thresholds_and_the_cells_borders(
    interpret: Callable[..., Any], format: str
) -> None:
    limits = torch.tensor([*NF4_THRESHOLDS, *FP4_THRESHOLDS, *(k / 32 for k in range(33))])
    limits = torch.cat([limits, -limits])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat([limits, torch.nextafter(limits, up), torch.nextafter(limits, down)])
    x = torch.ones(-(-near.numel() // 63), 64)  # a 1 in each block: what is quantized is the value itself
    x.view(-1)[torch.arange(near.numel()) // 63 * 64 + torch.arange(near.numel()) % 63 + 1] = near.clamp(
        -1, 1
    )
    assert torch.equal(interpret(LAUNCH, "launch", x, format, 64)[0], quantize_4bit(x, format, 64)[0])


def test_writes_into_slices(interpret: Callable[..., Any]) -> None:
    x = torch.randn(5000)
    codes = torch.full((2503,), 0xAB, dtype=torch.uint8)
    absmax = torch.full((81,), torch.nan)
    _, codes_slice, absmax_slice = interpret(LAUNCH, "launch_out", x, "nf4", 64, codes[3:], absmax[2:])
    expected, scales = quantize_4bit(x, "nf4", 64)
    assert torch.equal(codes_slice, expected)
    assert torch.equal(absmax_slice, scales)
