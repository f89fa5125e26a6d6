from __future__ import annotations

import pytest
import torch

from tuckaway_kernels.dequantize_int8.reference import PIECE, dequantize_int8, dequantize_int8_out
from tuckaway_kernels.quantize_int8.reference import quantize_int8

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 130), (3, PIECE + 3)])
def test_is_code_times_scale_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    absmax = torch.rand(torch.Size(shape[:-1]).numel()) * 9
    room = torch.full((codes.numel() + 2,), torch.nan, dtype=dtype)
    out = room[1:-1].view(shape)
    dequantize_int8_out(codes, absmax, out)
    scale = absmax * torch.tensor(1 / 127)
    expected = (codes.view(-1, shape[-1]).float() * scale[:, None]).to(dtype).view(shape)
    assert torch.equal(out, expected)
    assert room[[0, -1]].isnan().all()
    assert torch.equal(dequantize_int8(codes, absmax, dtype), expected)


def test_a_round_trip_is_within_half_a_step() -> None:
    w = torch.randn(40, 300)
    codes, absmax = quantize_int8(w)
    error = (dequantize_int8(codes, absmax, torch.float32) - w).abs().amax(1)
    assert bool((error < absmax / 127 * 0.51 + absmax * 2**-11).all())


def test_empty() -> None:
    out = dequantize_int8(torch.empty(4, 0, dtype=torch.int8), torch.zeros(4), torch.float16)
    assert out.shape == (4, 0)


def test_refuses_what_does_not_fit() -> None:
    codes = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="absmax must have 2"):
        dequantize_int8(codes, torch.zeros(3), torch.float32)
    with pytest.raises(ValueError, match="codes must be"):
        dequantize_int8(codes.int(), torch.zeros(2), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        dequantize_int8(codes, torch.zeros(2), torch.float64)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_int8_out(codes, torch.zeros(2), torch.zeros(3, 2).T)
    with pytest.raises(ValueError, match="at least one dimension"):
        dequantize_int8(codes[0, 0], torch.zeros(1), torch.float32)
