"""The kernel in Triton's interpreter, which rounds bf16 wrongly: bf16 outputs are tested on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tuckaway_kernels.dequantize_int8.reference import dequantize_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (65, 128), (2, 3, 513), (3, 9001)])
def test_equals_the_reference(
    interpret: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    absmax = torch.rand(torch.Size(shape[:-1]).numel())
    out = interpret("tuckaway_kernels.dequantize_int8.launch", "launch", codes, absmax, dtype)
    assert torch.equal(out, dequantize_int8(codes, absmax, dtype))
