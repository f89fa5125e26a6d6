"""The fused kernels in Triton's interpreter, their PTX emulated (`kernels/ptx.py`), against products in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tuckaway_kernels  # noqa: F401
from tuckaway_kernels.selection import Choice

OPS = torch.ops.tuckaway
FUSED = "tuckaway_kernels.linear_4bit.fused"

# sums of 16 fp16 products (8 for fp16 x); fp16 codes alone; the rounding of x is exact in both
OWN_ERROR = {"gemv": 1.5e-3, "mma": 4e-4}


@pytest.fixture
def run(interpret: Callable[..., Any]) -> Callable[..., Any]:
    interpret("kernels.ptx", "install")

    def call(
        choice: Choice,
        rows: int,
        cols: int,
        m: int,
        *,
        format: str = "nf4",
        nested: bool = False,
        bias: bool = False,
        blocksize: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        spread: float = 1.0,
    ) -> float:
        """Return the relative error of the fused product."""
        codes, absmax = OPS.quantize_4bit(torch.randn(rows, cols) * 0.05, format, blocksize)
        parts: tuple[torch.Tensor | None, ...] = (absmax, None, None)
        if nested:
            parts = OPS.quantize_nested(absmax)
            absmax = OPS.dequantize_nested(*parts)
        x = (torch.randn(m, cols) * spread).to(dtype)
        x[:, :40] *= 1e-3
        added = torch.randn(rows) if bias else None
        out = torch.full((m, rows), torch.nan)
        arguments = (x, codes, *parts, added, out, format, blocksize, choice)
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        result = interpret(FUSED, "fused_product", *arguments)[
            next(i for i, a in enumerate(given) if a is out)
        ]
        weight = OPS.dequantize_4bit(codes, absmax, format, blocksize, (rows, cols), torch.float32)
        exact = x.double() @ weight.double().t() + (0 if added is None else added.double())
        return float((result.double() - exact).norm() / exact.norm())

    return call


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_gemv(run: Callable[..., float], m: int, dtype: torch.dtype, nested: bool, format: str) -> None:
    choice = Choice("gemv", 4, 1, tile_m=m)
    assert run(choice, 8, 352, m, format=format, nested=nested, dtype=dtype) < OWN_ERROR["gemv"]


@pytest.mark.parametrize(
    ("choice", "rows", "cols", "blocksize"),
    [
        (Choice("gemv", 8, 2, split=2), 16, 4096, 64),
        (Choice("gemv", 1, 1), 5, 32, 64),  # blocks cross rows
        (Choice("gemv", 2, 1), 2, 96, 32),
        (Choice("gemv", 8, 4), 8, 1056, 128),
        (Choice("gemv", 2, 2, programs=2), 12, 1024, 64),  # a program takes several rows
        (Choice("gemv", 2, 1, programs=2), 12, 2080, 64),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gemv_of_other_shapes(
    run: Callable[..., float], choice: Choice, rows: int, cols: int, blocksize: int, bias: bool
) -> None:
    assert run(choice, rows, cols, 1, blocksize=blocksize, bias=bias) < OWN_ERROR["gemv"]


@pytest.mark.parametrize("spread", [1e-30, 1e30])
def test_gemv_brings_bf16_to_the_range_of_fp16(run: Callable[..., float], spread: float) -> None:
    assert run(Choice("gemv", 8, 1), 8, 256, 1, spread=spread) < OWN_ERROR["gemv"]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("choice", "m"),
    [
        (Choice("mma", 16, 2, tile_m=8, blocks=4), 5),
        (Choice("mma", 32, 4, tile_m=16, blocks=2, across=2), 11),
        (Choice("mma", 16, 4, tile_m=16, blocks=1, across=4, split=2), 20),
        (Choice("mma", 32, 8, tile_m=32, blocks=1, across=2), 29),
    ],
)
def test_mma(
    run: Callable[..., float],
    choice: Choice,
    m: int,
    dtype: torch.dtype,
    bias: bool,
    nested: bool,
    format: str,
) -> None:
    error = run(choice, 40, 320, m, format=format, nested=nested, bias=bias, dtype=dtype, spread=300.0)
    assert error < OWN_ERROR["mma"]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("m", [40, 70])
def test_mma_of_many_rows(run: Callable[..., float], m: int, nested: bool) -> None:
    choice = Choice("mma", 16, 8, tile_m=64, blocks=1, split=2, across=8)
    assert run(choice, 144, 256, m, nested=nested, bias=True) < OWN_ERROR["mma"]


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("spread", [1e-30, 1e30])
def test_mma_of_whole_tiles_and_larger_blocks(
    run: Callable[..., float], blocksize: int, spread: float
) -> None:
    choice = Choice("mma", 16, 4, tile_m=8, blocks=2, across=2, split=2)
    assert run(choice, 64, 512, 5, blocksize=blocksize, spread=spread) < OWN_ERROR["mma"]
