from __future__ import annotations

import pytest
import torch

from golden import cases, digest
from tuckaway_kernels.codebooks import CODEBOOKS
from tuckaway_kernels.dequantize_4bit.reference import PIECE, dequantize_4bit, dequantize_4bit_out
from tuckaway_kernels.quantize_4bit.reference import quantize_4bit

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_gives_the_bytes_that_bitsandbytes_gives_on_a_gpu(format: str) -> None:
    for case in cases():
        if case.format == format:
            codes, absmax = quantize_4bit(case.weights(), format, case.blocksize)
            for dtype, expected in case.decoded().items():
                out = dequantize_4bit(codes, absmax, format, case.blocksize, case.shape, dtype)
                assert out.shape == tuple(case.shape)
                assert digest(out) == expected, case


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 97, 2 * 64 * 3 + 5])
def test_is_codebook_times_scale_rounded_once(format: str, dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(256, ((n + 1) // 2,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64), generator=generator) * 3
    out = torch.full((n,), torch.nan, dtype=dtype)
    dequantize_4bit_out(codes, absmax, format, 64, out)
    for i in range(n):
        code = int(codes[i // 2]) >> 4 if i % 2 == 0 else int(codes[i // 2]) & 15
        product = torch.tensor(CODEBOOKS[format][code]) * absmax[i // 64]
        assert out[i] == product.to(dtype)
        assert torch.signbit(out[i]) == torch.signbit(product)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pieces_join_without_a_seam_and_only_the_output_is_written(dtype: torch.dtype) -> None:
    n = 2 * PIECE + 77
    codes = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64))
    room = torch.full((n + 4,), torch.nan, dtype=dtype)
    dequantize_4bit_out(codes, absmax, "nf4", 64, room[1:-3])
    expected = torch.tensor(CODEBOOKS["nf4"])[torch.stack([codes >> 4, codes & 15], 1).view(-1)[:n].int()]
    expected = (expected * absmax.repeat_interleave(64)[:n]).to(dtype)
    assert torch.equal(room[1:-3], expected)
    assert room[[0, -3, -2, -1]].isnan().all()


def test_subnormal_scales_and_products_are_zeros_of_their_sign() -> None:
    tiny = torch.finfo(torch.float32).tiny
    codes = torch.full((64,), 0x0F, dtype=torch.uint8)  # nf4: -1, 1, ...
    out = dequantize_4bit(codes, torch.tensor([tiny / 2, tiny]), "nf4", 64, [128], torch.float32)
    assert out.unique().tolist() == [-tiny, 0.0, tiny]
    assert torch.signbit(out[:2]).tolist() == [True, False]
    small = dequantize_4bit(
        torch.full((32,), 0x68, dtype=torch.uint8), torch.tensor([tiny]), "nf4", 64, [64], torch.float32
    )
    assert small.tolist() == [0.0] * 64


def test_codes_in_the_shape_of_a_bitsandbytes_file() -> None:
    codes, absmax = quantize_4bit(torch.randn(8, 64), "nf4", 64)
    a = dequantize_4bit(codes, absmax, "nf4", 64, [8, 64], torch.float32)
    assert torch.equal(a, dequantize_4bit(codes[:, None], absmax, "nf4", 64, [8, 64], torch.float32))


def test_empty() -> None:
    nothing = torch.empty(0, dtype=torch.uint8)
    assert dequantize_4bit(nothing, torch.empty(0), "nf4", 64, [0, 5], torch.float16).shape == (0, 5)


@pytest.mark.parametrize(
    ("codes", "absmax", "dtype", "message"),
    [
        (31, 1, torch.float32, "codes must have 32"),
        (32, 2, torch.float32, "absmax must have 1"),
        (32, 1, torch.float64, "float64"),
    ],
)
def test_refuses_what_does_not_fit(codes: int, absmax: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_4bit(torch.zeros(codes, dtype=torch.uint8), torch.ones(absmax), "nf4", 64, [64], dtype)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_4bit_out(torch.zeros(32, dtype=torch.uint8), torch.ones(1), "nf4", 64, torch.ones(8, 8).T)
