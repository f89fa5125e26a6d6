from __future__ import annotations

import pytest
import torch

import tuckaway_kernels
from golden import DTYPES
from tuckaway_kernels.embedding.reference import embedding_4bit

ops = torch.ops.tuckaway
assert tuckaway_kernels

SHAPES = [(1, 1), (3, 5), (40, 96), (31, 129), (7, 4096)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_gives_the_rows_of_the_decoded_matrix(
    rows: int, cols: int, blocksize: int, format: str, nested: bool, dtype: torch.dtype
) -> None:
    codes, absmax = ops.quantize_4bit(torch.randn(rows, cols), format, blocksize)
    parts = (absmax, None, None)
    if nested:
        parts = ops.quantize_nested(absmax)
        absmax = ops.dequantize_nested(*parts)
    weight = ops.dequantize_4bit(codes, absmax, format, blocksize, (rows, cols), dtype)
    index = torch.randint(rows, (2, 3))
    result = ops.embedding_4bit(index, codes, *parts, format, blocksize, rows, cols, dtype)
    assert torch.equal(result, weight[index])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_gives_the_rows_of_decoded_int8(rows: int, cols: int, dtype: torch.dtype) -> None:
    codes, absmax = ops.quantize_int8(torch.randn(rows, cols))
    index = torch.randint(rows, (4,), dtype=torch.int32)
    result = ops.embedding_int8(index, codes, absmax, dtype)
    assert torch.equal(result, ops.dequantize_int8(codes, absmax, dtype)[index])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_keeps_the_shape_of_the_index(shape: tuple[int, ...]) -> None:
    codes, absmax = ops.quantize_4bit(torch.randn(4, 6), "nf4", 64)
    index = torch.zeros(shape, dtype=torch.long)
    args = (absmax, None, None, "nf4", 64, 4, 6, torch.float32)
    assert ops.embedding_4bit(index, codes, *args).shape == (*shape, 6)
    quantized = ops.quantize_int8(torch.randn(4, 6))
    assert ops.embedding_int8(index, *quantized, torch.float32).shape == (*shape, 6)


@pytest.mark.parametrize("bad", [-1, 4])
def test_refuses_a_row_that_is_not_there(bad: int) -> None:
    codes, absmax = ops.quantize_4bit(torch.randn(4, 6), "nf4", 64)
    with pytest.raises(IndexError, match=f"row {bad} asked for of a matrix with 4 rows"):
        embedding_4bit(torch.tensor([0, bad]), codes, absmax, None, None, "nf4", 64, 4, 6, torch.float32)


def test_ops_are_registered_as_torch_expects() -> None:
    index = torch.tensor([[1, 3], [0, 0]])
    codes, absmax = ops.quantize_4bit(torch.randn(4, 6), "nf4", 64)
    args = (index, codes, absmax, None, None, "nf4", 64, 4, 6, torch.bfloat16)
    torch.library.opcheck(ops.embedding_4bit.default, args)
    torch.library.opcheck(
        ops.embedding_int8.default, (index, *ops.quantize_int8(torch.randn(4, 6)), torch.float16)
    )
