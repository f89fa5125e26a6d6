from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from golden import DTYPES, cases, digest, edge_blocks, golden
from tuckaway_kernels.codebooks import (
    BLOCKSIZES,
    FP4_ORDER,
    FP4_THRESHOLDS,
    NF4,
    NF4_THRESHOLDS,
    codebook,
)
from tuckaway_kernels.quantize_4bit.reference import PIECE, quantize_4bit, quantize_4bit_out


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_bytes_that_bitsandbytes_gives_on_a_gpu(format: str, dtype: str) -> None:
    chosen = [c for c in cases() if c.format == format and c.dtype == dtype]
    assert len(chosen) == 72
    for case in chosen:
        codes, absmax = quantize_4bit(case.weights(), case.format, case.blocksize)
        assert (digest(codes), digest(absmax)) == (case.codes, case.absmax), case


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_bytes_of_bitsandbytes_for_edge_blocks(format: str, dtype: str) -> None:
    expected = golden()["edges"][f"{format}/{dtype}"]
    codes, absmax = quantize_4bit(edge_blocks(dtype), format, 64)
    assert codes.numpy().tobytes().hex() == expected["codes"]
    assert absmax.numpy().tobytes().hex() == expected["absmax"]


def nibbles(codes: torch.Tensor) -> list[int]:
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1).tolist()


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("n", [1, 2, 31, 65, 4097])
def test_nf4_counts_the_thresholds_below_and_puts_the_first_of_a_pair_high(blocksize: int, n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    codes, absmax = quantize_4bit(x, "nf4", blocksize)
    assert codes.shape == ((n + 1) // 2,)
    assert absmax.shape == (math.ceil(n / blocksize),)
    for i, (weight, code) in enumerate(zip(x.tolist(), nibbles(codes), strict=False)):
        scale = x[i // blocksize * blocksize :][:blocksize].abs().max().item()
        assert absmax[i // blocksize].item() == scale
        y = Fraction(weight) / Fraction(scale)  # a random weight lies on no threshold
        assert code == sum(y > Fraction(t) for t in NF4_THRESHOLDS)


def test_fp4_decides_on_the_magnitude_and_keeps_the_sign() -> None:
    x = torch.tensor([1.0, *torch.linspace(-1, 1, 255).tolist()])
    codes, _ = quantize_4bit(x, "fp4", 256)
    limits = torch.tensor(FP4_THRESHOLDS).tolist()
    for y, code in zip(x.tolist(), nibbles(codes), strict=True):
        magnitude = FP4_ORDER[sum(abs(y) > t for t in limits)]
        assert code == magnitude + 8 * (y < 0)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_every_value_of_the_codebook_keeps_its_code(format: str) -> None:
    values = codebook(format, torch.device("cpu")).clone()
    x = torch.cat([values, torch.ones(16)]) * 0.375  # the ones make 0.375 the scale in both halves
    codes, absmax = quantize_4bit(x, format, 32)
    assert absmax.tolist() == [0.375]
    expected = list(range(16))
    if format == "fp4":
        expected[8] = 0  # -0.0 counts as positive
    assert nibbles(codes)[:16] == expected
    assert len(NF4) == 16


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_subnormal_weights_count_as_zero(format: str) -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.zeros(64)
    x[0], x[1], x[2], x[3] = 2 * tiny, -tiny / 2, tiny / 2, -tiny
    codes, absmax = quantize_4bit(x, format, 64)
    zero = 7 if format == "nf4" else 0
    assert absmax.item() == 2 * tiny
    assert nibbles(codes)[1:3] == [zero, zero]
    assert nibbles(codes)[3] != zero  # -0.5: tiny itself is normal
    only, scale = quantize_4bit(torch.full((64,), tiny / 2), format, 64)
    assert scale.item() == 0
    assert set(only.tolist()) == {0}


def test_a_product_that_rounds_up_to_the_smallest_normal_number_is_zero() -> None:
    """Weights and code of an H100: y is -2**-126 only after rounding, so .ftz makes it a zero, which has no sign."""
    x = torch.zeros(32, dtype=torch.bfloat16)
    x[0], x[1], x[2] = 1.1636636369282575e29, -4966055936.0, -1.367880031466484e-09
    codes, _ = quantize_4bit(x, "fp4", 32)
    assert nibbles(codes)[1:3] == [8, 0]
    powers = torch.zeros(32)
    powers[0], powers[1] = 2.0**64, -(2.0**-62)  # exactly -2**-126
    assert nibbles(quantize_4bit(powers, "fp4", 32)[0])[1] == 8


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_nan_takes_code_zero_and_leaves_its_block_and_the_others_alone(format: str) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(5))
    expected, scales = quantize_4bit(x, format, 64)
    x[70] = torch.nan
    codes, absmax = quantize_4bit(x, format, 64)
    assert nibbles(codes)[70] == 0
    assert nibbles(codes)[:70] + nibbles(codes)[71:] == nibbles(expected)[:70] + nibbles(expected)[71:]
    assert absmax.tolist() == scales.tolist()


def test_pieces_join_without_a_seam_and_out_writes_only_its_slice() -> None:
    n = 2 * PIECE + 4096 + 33
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, absmax = quantize_4bit(x, "nf4", 4096)
    split = 5 * 4096
    room = torch.full((codes.numel() + 7,), 0xAB, dtype=torch.uint8)
    scales = torch.full((absmax.numel() + 2,), torch.nan)
    for start, stop in ((0, split), (split, n)):
        quantize_4bit_out(
            x[start:stop],
            "nf4",
            4096,
            room[3 + start // 2 : 3 + (stop + 1) // 2],
            scales[1 + start // 4096 : 1 + -(-stop // 4096)],
        )
    assert torch.equal(room[3:-4], codes)
    assert torch.equal(scales[1:-1], absmax)
    assert set(room[:3].tolist() + room[-4:].tolist()) == {0xAB}
    assert scales[0].isnan()
    assert scales[-1].isnan()


def test_empty() -> None:
    codes, absmax = quantize_4bit(torch.empty(0, 5), "nf4", 64)
    assert codes.shape == (0,)
    assert absmax.shape == (0,)


def test_a_transposed_weight_is_taken_in_the_order_of_its_elements() -> None:
    x = torch.randn(64, 96)
    assert torch.equal(quantize_4bit(x.T, "fp4", 64)[0], quantize_4bit(x.T.contiguous(), "fp4", 64)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(64), "nf5", 64), "'nf4' or 'fp4'"),
        ((torch.zeros(64), "nf4", 48), "blocksize"),
        ((torch.zeros(64, dtype=torch.float64), "nf4", 64), "float64"),
    ],
)
def test_refuses_what_it_cannot_quantize(arguments: tuple[torch.Tensor, str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_4bit(*arguments)


@pytest.mark.parametrize(
    ("codes", "absmax", "message"),
    [
        (torch.zeros(31, dtype=torch.uint8), torch.zeros(1), "codes must have 32"),
        (torch.zeros(32, dtype=torch.int8), torch.zeros(1), "codes must be torch.uint8"),
        (torch.zeros(64, dtype=torch.uint8)[::2], torch.zeros(1), "codes must be contiguous"),
        (torch.zeros(32, dtype=torch.uint8), torch.zeros(2), "absmax must have 1"),
    ],
)
def test_refuses_storage_that_does_not_fit(codes: torch.Tensor, absmax: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_4bit_out(torch.zeros(64), "nf4", 64, codes, absmax)
