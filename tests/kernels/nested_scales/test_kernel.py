"""The kernels in Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tuckaway_kernels.codebooks import dynamic_thresholds
from tuckaway_kernels.nested_scales.reference import dequantize_nested, quantize_nested

LAUNCH = "tuckaway_kernels.nested_scales.launch"


@pytest.mark.parametrize("n", [1, 255, 257, 5000, 70_001])
def test_quantize_equals_the_reference(interpret: Callable[..., Any], n: int) -> None:
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 4
    codes, nested, offset = interpret(LAUNCH, "launch_quantize", absmax)
    expected = quantize_nested(absmax)
    assert torch.equal(offset, expected[2])
    assert torch.equal(nested, expected[1])
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("n", [1, 300, 70_001])
def test_quantize_into_given_storage(interpret: Callable[..., Any], n: int) -> None:
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n))
    room = torch.full((n + 4,), 9, dtype=torch.uint8), torch.full((-(-n // 256),), torch.nan)
    _, codes, nested, offset = interpret(
        LAUNCH, "launch_quantize_out", absmax, room[0][2 : n + 2], room[1], torch.tensor(torch.nan)
    )
    expected = quantize_nested(absmax)
    assert torch.equal(codes, expected[0])
    assert torch.equal(nested, expected[1])
    assert torch.equal(offset, expected[2])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scales_give_zeros(interpret: Callable[..., Any], value: float) -> None:
    codes, nested, offset = interpret(LAUNCH, "launch_quantize", torch.full((300,), value))
    assert set(codes.tolist()) == {0}  # 0 * inf is NaN, which takes code 0
    assert set(nested.tolist()) == {0.0}
    assert offset == value


def test_the_guess_is_right_at_every_threshold(interpret: Callable[..., Any]) -> None:
    limits = dynamic_thresholds(torch.device("cpu"))
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    decades = 10.0 ** torch.arange(-8.0, 1.0)
    near = [limits, torch.nextafter(limits, up), torch.nextafter(limits, down), decades, -decades]
    y = torch.cat([*near, torch.linspace(-1, 1, 100_001), torch.linspace(-2e-5, 2e-5, 10_001)])
    y = torch.cat([y, -y])  # a mean so near to zero that y itself is what is quantized
    blocks = torch.zeros(-(-y.numel() // 254), 256)
    blocks[:, 0], blocks[:, 1] = 1.0, -1.0  # the largest of every block
    index = torch.arange(y.numel())
    blocks.view(-1)[index // 254 * 256 + index % 254 + 2] = y
    absmax = blocks.view(-1)
    codes, nested, offset = interpret(LAUNCH, "launch_quantize", absmax)
    assert abs(offset) < 1e-17
    assert set(nested.tolist()) == {1.0}
    assert torch.equal(codes, quantize_nested(absmax)[0])


@pytest.mark.parametrize("n", [1, 256, 5001])
def test_dequantize_equals_the_reference(interpret: Callable[..., Any], n: int) -> None:
    arguments = (torch.randint(256, (n,), dtype=torch.uint8), torch.rand(-(-n // 256)), torch.tensor(0.7))
    assert torch.equal(interpret(LAUNCH, "launch_dequantize", *arguments), dequantize_nested(*arguments))
