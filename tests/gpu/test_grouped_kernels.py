"""Products of groups of rows on a real GPU: against loops over decoded matrices in float64, and captured."""

from __future__ import annotations

import pytest
import torch

import tuckaway_kernels  # noqa: F401
from tuckaway_kernels.backend import has_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator in this machine"),
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
]

OPS = torch.ops.tuckaway
EXPERTS = 8
ENDS = [[3, 3, 10, 40, 41, 41, 90, 96], [0, 0, 0, 0, 0, 0, 0, 1], [0] * 8, [100] * 8]


def by_loop(x: torch.Tensor, stack: torch.Tensor, ends: list[int], transpose: bool) -> torch.Tensor:
    out = torch.zeros(x.shape[0], stack.shape[1 if transpose else 2], dtype=torch.float64, device=x.device)
    begin = 0
    for matrix, end in zip(stack.double(), ends, strict=True):
        out[begin:end] = x[begin:end].double() @ (matrix.t() if transpose else matrix)
        begin = max(begin, end)
    return out


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(256, 512), (33, 96)])
@pytest.mark.parametrize("format", ["nf4", "nf4 nested", "int8"])
def test_is_the_loop_over_matrices(
    ends: list[int], transpose: bool, dtype: torch.dtype, rows: int, cols: int, format: str
) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    weight = torch.randn(EXPERTS, rows, cols, device=device) * 0.05
    x = torch.randn(100, cols if transpose else rows, device=device, dtype=dtype)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    if format == "int8":
        codes, absmax = OPS.quantize_int8(weight.view(-1, cols))
        stack = OPS.dequantize_int8(codes, absmax, dtype).view_as(weight)
        arguments = (x, codes.view_as(weight), absmax, offs, transpose, dtype)
        first, again = (OPS.grouped_linear_int8(*arguments) for _ in range(2))
    else:
        codes, absmax = OPS.quantize_4bit(weight, "nf4", 64)
        parts = (codes, absmax, None, None)
        if format.endswith("nested"):
            parts = codes, *OPS.quantize_nested(absmax)
            absmax = OPS.dequantize_nested(*parts[1:])
        stack = OPS.dequantize_4bit(codes, absmax, "nf4", 64, weight.shape, dtype)
        arguments = (x, *parts, offs, "nf4", 64, rows, cols, transpose, dtype)
        first, again = (OPS.grouped_linear_4bit(*arguments) for _ in range(2))
    exact = by_loop(x, stack, ends, transpose)
    assert torch.equal(first, again)
    scale = exact.norm() + 1e-9
    assert (first.double() - exact).norm() / scale < 2 * torch.finfo(dtype).eps + 3e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs of CUDA")
def test_a_captured_graph_follows_the_groups() -> None:
    codes, absmax = OPS.quantize_4bit(torch.randn(EXPERTS, 128, 256, device="cuda"), "nf4", 64)
    x = torch.randn(96, 256, device="cuda", dtype=torch.bfloat16)
    offs = torch.tensor(ENDS[0], dtype=torch.int32, device="cuda")

    def product() -> torch.Tensor:
        result: torch.Tensor = OPS.grouped_linear_4bit(
            x, codes, absmax, None, None, offs, "nf4", 64, 128, 256, True, x.dtype
        )
        return result

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product()
    offs.copy_(torch.tensor([96] * EXPERTS, dtype=torch.int32))
    graph.replay()
    assert torch.equal(captured, product())
