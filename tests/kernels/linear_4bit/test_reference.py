from __future__ import annotations

import pytest
import torch

import tuckaway_kernels
import tuckaway_kernels.piece_sizes as piece_sizes
from golden import DTYPES
from tuckaway_kernels.linear_4bit.reference import linear_4bit

ops = torch.ops.tuckaway
assert tuckaway_kernels

# bf16 has 8 significant bits, fp16 11; the product is rounded once (twice where pieces add up), x and bias before
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def quantized(
    rows: int, cols: int, format: str, blocksize: int, nested: bool
) -> tuple[torch.Tensor | None, ...]:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 1000 + cols))
    codes, absmax = ops.quantize_4bit(w, format, blocksize)
    if not nested:
        return codes, absmax, None, None
    return codes, *ops.quantize_nested(absmax)


def decoded(
    parts: tuple[torch.Tensor | None, ...],
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    codes, scales, nested, offset = parts
    absmax = scales if nested is None else ops.dequantize_nested(scales, nested, offset)
    return ops.dequantize_4bit(codes, absmax, format, blocksize, (rows, cols), dtype)


def close(result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    scale = exact.abs().amax() if exact.numel() else 1.0
    return bool(((result.double() - exact).abs() <= TOLERANCE[dtype] * scale).all())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (33, 96), (64, 128), (31, 129)])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 3)])
def test_is_the_product_with_the_decoded_matrix(
    lead: tuple[int, ...],
    rows: int,
    cols: int,
    format: str,
    nested: bool,
    transpose: bool,
    dtype: torch.dtype,
) -> None:
    parts = quantized(rows, cols, format, 64, nested)
    inner, outer = (cols, rows) if transpose else (rows, cols)
    x, bias = torch.randn(*lead, inner).to(dtype), torch.randn(outer).to(dtype)
    result = ops.linear_4bit(x, *parts, bias, format, 64, rows, cols, transpose, dtype)
    weight = decoded(parts, format, 64, rows, cols, dtype).double()
    exact = x.double() @ (weight.t() if transpose else weight) + bias.double()
    assert result.shape == (*lead, outer)
    assert result.dtype == dtype
    assert close(result, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("compute_dtype", DTYPES.values(), ids=str)
def test_computes_in_compute_dtype_and_answers_in_the_dtype_of_x(
    dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    parts = quantized(48, 80, "nf4", 64, False)
    x, bias = torch.randn(3, 80).to(dtype), torch.randn(48)
    result = ops.linear_4bit(x, *parts, bias, "nf4", 64, 48, 80, True, compute_dtype)
    weight = decoded(parts, "nf4", 64, 48, 80, compute_dtype).double()
    exact = x.to(compute_dtype).double() @ weight.t() + bias.to(compute_dtype).double()
    assert result.dtype == dtype
    assert close(result, exact, max(dtype, compute_dtype, key=lambda d: TOLERANCE[d]))
    assert torch.equal(result, result.to(compute_dtype).to(dtype))


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("cols", [63, 64, 200])
def test_takes_the_matrix_in_pieces(
    monkeypatch: pytest.MonkeyPatch, cols: int, blocksize: int, dtype: torch.dtype, transpose: bool
) -> None:
    rows = 50
    parts = quantized(rows, cols, "nf4", blocksize, False)
    x, bias = torch.randn(4, cols if transpose else rows).to(dtype), torch.randn(rows if transpose else cols)
    monkeypatch.setitem(piece_sizes.PIECE_BYTES, "cpu", 3000)
    result = ops.linear_4bit(x, *parts, bias, "nf4", blocksize, rows, cols, transpose, dtype)
    weight = decoded(parts, "nf4", blocksize, rows, cols, dtype).double()
    exact = x.double() @ (weight.t() if transpose else weight) + bias.to(dtype).double()
    assert close(result, exact, dtype)


@pytest.mark.parametrize("transpose", [True, False])
def test_gradient_is_the_other_product_and_the_weight_has_none(transpose: bool) -> None:
    rows, cols = 40, 56
    parts = quantized(rows, cols, "nf4", 64, True)
    inner, outer = (cols, rows) if transpose else (rows, cols)
    x, bias = torch.randn(2, 3, inner, requires_grad=True), torch.randn(outer, requires_grad=True)
    result = ops.linear_4bit(x, *parts, bias, "nf4", 64, rows, cols, transpose, torch.float32)
    grad = torch.randn(2, 3, outer)
    dx, db = torch.autograd.grad(result, (x, bias), grad)
    weight = decoded(parts, "nf4", 64, rows, cols, torch.float32)
    torch.testing.assert_close(dx, grad @ (weight if transpose else weight.t()))
    torch.testing.assert_close(db, grad.sum((0, 1)))


def test_bias_keeps_its_dtype_in_the_gradient() -> None:
    parts = quantized(8, 64, "nf4", 64, False)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    ops.linear_4bit(x, *parts, bias, "nf4", 64, 8, 64, True, torch.bfloat16).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[union-attr]
    assert bias.grad.tolist() == [5.0] * 8  # type: ignore[union-attr]


@pytest.mark.parametrize("transpose", [True, False])
def test_op_is_registered_as_torch_expects(transpose: bool) -> None:
    parts = quantized(16, 32, "nf4", 64, True)
    x = torch.randn(3, 32 if transpose else 16, requires_grad=True)
    bias = torch.randn(16 if transpose else 32, requires_grad=True)
    torch.library.opcheck(
        ops.linear_4bit.default, (x, *parts, bias, "nf4", 64, 16, 32, transpose, torch.float32)
    )


def test_gives_the_same_bits_again() -> None:
    parts = quantized(300, 257, "nf4", 64, True)
    x = torch.randn(7, 257)
    first, second = (
        ops.linear_4bit(x, *parts, None, "nf4", 64, 300, 257, True, torch.float32) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_refuses_what_does_not_go_together() -> None:
    parts = quantized(8, 64, "nf4", 64, False)
    x = torch.randn(2, 64)

    def run(
        x: torch.Tensor = x, bias: torch.Tensor | None = None, format: str = "nf4", rows: int = 8
    ) -> torch.Tensor:
        return linear_4bit(x, *parts, bias, format, 64, rows, 64, True, torch.float32)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
        run(x[:, :63])
    with pytest.raises(ValueError, match="floating-point"):
        run(x.int())
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        run(bias=torch.zeros(9))
    with pytest.raises(ValueError, match="format"):
        run(format="nf5")
    with pytest.raises(ValueError, match="codes must have"):
        run(rows=9)
