from __future__ import annotations

import pytest
import torch

import tuckaway_kernels
import tuckaway_kernels.piece_sizes as piece_sizes
from golden import DTYPES, golden, values
from tuckaway_kernels.linear_int8.reference import integer_product, linear_int8

ops = torch.ops.tuckaway
assert tuckaway_kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def quantized(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_int8(
        torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 1000 + cols))
    )


@pytest.mark.parametrize(
    "case", golden()["llm_int8"], ids=lambda c: f"{c['dtype']}-{c['m']}-{c['threshold']}"
)
def test_gives_what_bitsandbytes_gives_on_a_gpu(case: dict) -> None:  # type: ignore[type-arg]
    m, k, n, dtype, seed = case["m"], case["k"], case["n"], case["dtype"], case["seed"]
    w, x, bias = (
        values(seed, (n, k), dtype),
        values(seed + 1000, (m, k), dtype) * 50,
        values(seed + 2000, (n,), dtype),
    )
    x[:, 3] = x[:, 3] * 0 + 8.5
    x[0, 10] = 6.0
    codes, absmax = ops.quantize_int8(w)
    result = ops.linear_int8(x, codes, absmax, bias, case["threshold"], True, x.dtype)
    expected = torch.tensor(case["out"])
    assert result.dtype == x.dtype
    # the sum over outlier columns is rounded to the dtype of x, in an order that is the library's
    step = torch.finfo(torch.bfloat16 if dtype == "bfloat16" else torch.float16).eps
    torch.testing.assert_close(result.float(), expected, rtol=step, atol=step * 0.1)
    if case["threshold"] == 0.0:
        assert torch.equal(result.float(), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (33, 96), (31, 129)])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("piece", [600, 1 << 24])
def test_without_threshold_is_the_product_with_the_decoded_matrix(
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    lead: tuple[int, ...],
    rows: int,
    cols: int,
    transpose: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setitem(piece_sizes.PIECE_BYTES, "cpu", piece)
    codes, absmax = quantized(rows, cols)
    inner, outer = (cols, rows) if transpose else (rows, cols)
    x, bias = torch.randn(*lead, inner).to(dtype), torch.randn(outer).to(dtype)
    result = ops.linear_int8(x, codes, absmax, bias, None, transpose, dtype)
    weight = ops.dequantize_int8(codes, absmax, dtype).double()
    exact = x.double() @ (weight.t() if transpose else weight) + bias.double()
    assert result.shape == (*lead, outer)
    assert result.dtype == dtype
    scale = exact.abs().amax() if exact.numel() else 1.0
    assert ((result.double() - exact).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 1e9])
def test_llm_int8_is_close_to_the_product(
    threshold: float, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes, absmax = quantized(48, 200)
    x = torch.randn(*lead, 200).to(dtype)
    result = ops.linear_int8(x, codes, absmax, None, threshold, True, dtype)
    exact = x.double() @ ops.dequantize_int8(codes, absmax, torch.float32).double().t()
    assert result.shape == (*lead, 48)
    if exact.numel():
        assert (result.double() - exact).norm() <= 0.02 * exact.norm()


def test_a_row_of_outliers_only_is_multiplied_by_decoded_weights() -> None:
    codes, absmax = quantized(16, 32)
    x = torch.full((2, 32), 7.0, dtype=torch.float16)
    result = ops.linear_int8(x, codes, absmax, None, 6.0, True, torch.float16)
    exact = x.double() @ ops.dequantize_int8(codes, absmax, torch.float16).double().t()
    torch.testing.assert_close(result.double(), exact, rtol=2e-3, atol=2e-3)


def test_integer_product_is_exact_on_every_path() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-128, 128, (3, 3000), dtype=torch.int8, generator=generator)
    right = torch.randint(-128, 128, (5, 3000), dtype=torch.int8, generator=generator)
    left[0], right[0] = -128, -128
    expected = left.long() @ right.long().t()
    assert torch.equal(integer_product(left, right).long(), expected)


@pytest.mark.parametrize("threshold", [None, 0.0, 2.0])
def test_gradient_is_that_of_the_decoded_weights(threshold: float | None) -> None:
    codes, absmax = quantized(24, 40)
    x, bias = torch.randn(2, 3, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    result = ops.linear_int8(x, codes, absmax, bias, threshold, True, torch.float32)
    grad = torch.randn(2, 3, 24)
    dx, db = torch.autograd.grad(result, (x, bias), grad)
    torch.testing.assert_close(dx, grad @ ops.dequantize_int8(codes, absmax, torch.float32))
    torch.testing.assert_close(db, grad.sum((0, 1)))


@pytest.mark.parametrize(("threshold", "transpose"), [(None, True), (None, False), (2.0, True)])
def test_op_is_registered_as_torch_expects(threshold: float | None, transpose: bool) -> None:
    codes, absmax = quantized(16, 32)
    x = torch.randn(3, 32 if transpose else 16, requires_grad=True)
    torch.library.opcheck(
        ops.linear_int8.default, (x, codes, absmax, None, threshold, transpose, torch.float32)
    )


def test_refuses_what_does_not_go_together() -> None:
    codes, absmax = quantized(8, 64)
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
        linear_int8(x[:, :63], codes, absmax, None, None, True, torch.float32)
    with pytest.raises(ValueError, match="threshold must be None"):
        linear_int8(x[:, :8], codes, absmax, None, 6.0, False, torch.float32)
    with pytest.raises(ValueError, match=r"0\.0 or more"):
        linear_int8(x, codes, absmax, None, -1.0, True, torch.float32)
    with pytest.raises(ValueError, match="absmax must have 8"):
        linear_int8(x, codes, absmax[:7], None, None, True, torch.float32)
