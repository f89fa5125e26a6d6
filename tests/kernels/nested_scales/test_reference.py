from __future__ import annotations

import pytest
import torch

from golden import cases, digest, golden
from tuckaway_kernels.codebooks import dynamic_map, dynamic_thresholds
from tuckaway_kernels.nested_scales.reference import (
    PIECE,
    dequantize_nested,
    quantize_nested,
    quantize_nested_out,
    quantize_nested_with_offset,
)
from tuckaway_kernels.quantize_4bit.reference import quantize_4bit

CPU = torch.device("cpu")


def test_gives_the_bytes_that_bitsandbytes_gives_on_a_gpu_from_its_offset() -> None:
    for case in cases():
        _, absmax = quantize_4bit(case.weights(), case.format, case.blocksize)
        offset = torch.tensor(case.nested_offset)
        codes, nested = quantize_nested_with_offset(absmax, offset)
        assert (digest(codes), digest(nested)) == (case.nested_codes, case.nested_absmax), case
        torch.testing.assert_close(quantize_nested(absmax)[2], offset, rtol=1e-6, atol=0)


@pytest.mark.parametrize("index", range(3))
def test_gives_the_bytes_of_bitsandbytes_for_edges(index: int) -> None:
    edge = golden()["nested_edges"][index]  # all zero after the offset, two values, a ramp
    codes, nested = quantize_nested_with_offset(torch.tensor(edge["input"]), torch.tensor(0.0))
    assert codes.numpy().tobytes().hex() == edge["codes"]
    assert nested.tolist() == edge["absmax"]


def test_the_map_is_the_one_that_files_store() -> None:
    values = dynamic_map(CPU).tolist()
    assert values == sorted(values)
    assert [values[i] for i in (0, 127, 128, 255)] == [-0.992968738079071, 0.0, 5.500000384017767e-07, 1.0]


def test_the_offset_is_the_mean_whatever_the_order() -> None:
    absmax = torch.rand(10_001) * 10.0 ** torch.randint(-6, 6, (10_001,))
    offset = quantize_nested(absmax)[2]
    assert offset == torch.tensor(sum(absmax.tolist()) / 10_001).float()
    assert offset == quantize_nested(absmax.flip(0))[2]
    assert offset.shape == ()


@pytest.mark.parametrize("n", [1, 255, 256, 257, PIECE + 300])
def test_takes_the_nearest_value_of_the_map(n: int) -> None:
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n))
    codes, nested, offset = quantize_nested(absmax)
    each = nested.repeat_interleave(256)[:n]
    y = ((absmax - offset) / each).nan_to_num_(nan=-1.0)
    error = (dynamic_map(CPU)[codes.int()] - y).abs()
    thresholds = dynamic_thresholds(CPU)
    for neighbour in (-1, 1):
        other = dynamic_map(CPU)[(codes.int() + neighbour).clamp(0, 255)]
        assert bool((error <= (other - y).abs() + 1e-6).all())
    assert nested.shape == (-(-n // 256),)
    assert bool((thresholds.diff() > 0).all())


@pytest.mark.parametrize("n", [1, 256, 700, PIECE + 300])
def test_restores_product_then_sum_each_rounded(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(256, (n,), dtype=torch.uint8, generator=generator)
    nested = torch.rand(-(-n // 256), generator=generator)
    offset = torch.tensor(0.7)
    out = dequantize_nested(codes, nested, offset)
    product = dynamic_map(CPU)[codes.int()] * nested.repeat_interleave(256)[:n]
    assert torch.equal(out, product + offset)


@pytest.mark.parametrize("n", [0, 1, 256, 700, PIECE + 300])
def test_writes_into_what_it_is_given(n: int) -> None:
    absmax = torch.rand(n)
    codes = torch.full((n + 2,), 7, dtype=torch.uint8)
    nested, offset = torch.full((-(-n // 256), 1), torch.nan), torch.full((1,), torch.nan)
    quantize_nested_out(absmax.view(1, -1), codes[1:-1], nested, offset)
    expected = quantize_nested(absmax)
    assert torch.equal(codes[1:-1], expected[0])
    assert torch.equal(nested.view(-1), expected[1])
    assert torch.equal(offset.view(()), expected[2])
    assert (codes[0], codes[-1]) == (7, 7)


def test_empty() -> None:
    codes, nested, offset = quantize_nested(torch.empty(0))
    assert codes.shape == nested.shape == (0,)
    assert offset == 0
    assert dequantize_nested(codes, nested, offset).shape == (0,)


def test_refuses_what_does_not_fit() -> None:
    codes, nested, offset = quantize_nested(torch.rand(300))
    with pytest.raises(ValueError, match="nested_absmax must have 2"):
        dequantize_nested(codes, nested[:1], offset)
    with pytest.raises(ValueError, match="codes must be"):
        dequantize_nested(codes.int(), nested, offset)
    with pytest.raises(ValueError, match="absmax must be"):
        quantize_nested(codes)
    with pytest.raises(ValueError, match="codes must have 200"):
        quantize_nested_out(torch.rand(200), codes, nested, offset)
    with pytest.raises(ValueError, match="offset must have 1"):
        quantize_nested_out(torch.rand(300), codes, nested, nested)
