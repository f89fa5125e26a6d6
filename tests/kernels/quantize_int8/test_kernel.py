"""The kernel in Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from golden import DTYPES
from tuckaway_kernels.quantize_int8.reference import quantize_int8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (64, 128), (2, 3, 513), (3, 20_001)])
def test_equals_the_reference(interpret: Callable[..., Any], dtype: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DTYPES[dtype])
    if w.dim() > 1:
        w[0] = 0
        w[1, 0] = torch.nan
    codes, absmax = interpret("tuckaway_kernels.quantize_int8.launch", "launch", w)
    expected, scales = quantize_int8(w)
    assert torch.equal(absmax, scales)
    assert torch.equal(codes, expected)
