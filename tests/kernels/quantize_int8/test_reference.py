from __future__ import annotations

import pytest
import torch

from golden import digest, row_cases
from tuckaway_kernels.quantize_int8.reference import PIECE, quantize_int8, quantize_int8_out


def test_gives_the_bytes_that_bitsandbytes_gives_on_a_gpu() -> None:
    assert len(row_cases()) == 18
    for case in row_cases():
        codes, absmax = quantize_int8(case.weights())
        assert (digest(codes), digest(absmax)) == (case.codes, case.absmax), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 130), (5, PIECE + 3)])
def test_codes_are_within_half_a_step_of_the_weight_in_fp16(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, absmax = quantize_int8(w)
    half = w.half().float().view(-1, shape[-1])
    assert codes.shape == shape
    assert torch.equal(absmax, half.abs().amax(1))
    steps = half * 127 / absmax[:, None]
    assert bool(((codes.view(-1, shape[-1]) - steps).abs() < 0.5001).all())


def test_ties_go_to_the_even_code() -> None:
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    assert quantize_int8(w)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


def test_rows_of_zeros_overflow_and_nan() -> None:
    w = torch.tensor([[0.0, 0.0], [1e5, 1.0], [torch.nan, 1.0], [1e-9, 0.0]])
    codes, absmax = quantize_int8(w)
    assert absmax.tolist() == [0.0, torch.inf, 1.0, 0.0]
    assert codes.tolist() == [[0, 0], [0, 0], [0, 127], [0, 0]]


def test_out_writes_only_its_rows() -> None:
    w = torch.randn(6, 33)
    codes, absmax = torch.full((8, 33), 55, dtype=torch.int8), torch.full((8,), torch.nan)
    quantize_int8_out(w[:4], codes[1:5], absmax[1:5])
    quantize_int8_out(w[4:], codes[5:7], absmax[5:7])
    expected, scales = quantize_int8(w)
    assert torch.equal(codes[1:7], expected)
    assert torch.equal(absmax[1:7], scales)
    assert set(codes[0].tolist() + codes[7].tolist()) == {55}
    assert absmax[[0, 7]].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    codes, absmax = quantize_int8(torch.empty(shape))
    assert codes.shape == shape
    assert absmax.tolist() == [0.0] * torch.Size(shape[:-1]).numel()


def test_refuses_what_it_cannot_quantize() -> None:
    with pytest.raises(ValueError, match="at least one dimension"):
        quantize_int8(torch.tensor(1.0))
    with pytest.raises(ValueError, match="float64"):
        quantize_int8(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="absmax must have 2"):
        quantize_int8_out(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(3))
