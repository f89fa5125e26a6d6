"""The kernel in Triton's interpreter, which rounds bf16 wrongly: bf16 outputs are tested on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tuckaway_kernels.dequantize_4bit.reference import dequantize_4bit

LAUNCH = "tuckaway_kernels.dequantize_4bit.launch"


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("n", [1, 77, 4096, 8195])
def test_equals_the_reference(
    interpret: Callable[..., Any], format: str, dtype: torch.dtype, blocksize: int, n: int
) -> None:
    codes = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // blocksize))
    absmax[0] = torch.finfo(torch.float32).tiny  # products below it are flushed
    room = torch.full((n + 2,), torch.nan, dtype=dtype)
    *_, out = interpret(LAUNCH, "launch_out", codes, absmax, format, blocksize, room[1:-1])
    expected = dequantize_4bit(codes, absmax, format, blocksize, [n], dtype)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
