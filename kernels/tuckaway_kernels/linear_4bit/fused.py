"""The fused 4-bit products: what is launched, in which order, for a `Choice`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tuckaway_kernels.codebooks import codebook, dynamic_map
from tuckaway_kernels.launching import Launch
from tuckaway_kernels.selection import Choice

_COMBINE_TILE = 512
_ROW_TILE = 4096


@dataclass(frozen=True)
class _Plan:
    """The launches of one product."""

    prepare: Launch | None  # x to fp16 and its powers of two, for tensor cores
    multiply: Launch
    combine: Launch | None


def fused_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    format: str,
    blocksize: int,
    choice: Choice,
) -> None:
    """Write ``x @ S^T + bias`` to ``out``.

    Args:
        x: fp16 or bf16 ``[m, cols]``, contiguous.
        codes: uint8, of S ``[rows, cols]``.
        scales: fp32, or uint8 if nested.
        nested_absmax: fp32, if nested.
        nested_offset: fp32, if nested.
        bias: ``[rows]`` or None.
        out: ``[m, rows]``, contiguous, just allocated; any float dtype.
        format: ``"nf4"`` or ``"fp4"``.
        blocksize: weights sharing one scale.
        choice: from `selection.choose_4bit`.
    """
    m, rows = out.shape
    cols = x.shape[1]
    if nested_absmax is not None and nested_offset is not None and choice.kernel == "mma":
        # in the loop of the tensor cores a scale would be looked up 8 times over; restored at once it is 4 us
        scales = torch.ops.tuckaway.dequantize_nested(scales, nested_absmax, nested_offset)
        nested_absmax = nested_offset = None
    nested = nested_absmax is not None
    bf16 = x.dtype == torch.bfloat16
    plan = plan_of(choice, m, rows, cols, format, blocksize, nested, bias is not None, bf16)
    shared = (
        codes,
        scales,
        scales if nested_absmax is None else nested_absmax,
        scales if nested_offset is None else nested_offset,
        dynamic_map(x.device),
    )
    added = scales if bias is None else bias
    target = out
    if choice.split > 1:
        target = torch.empty((choice.split, m, rows), dtype=torch.float32, device=x.device)
    if choice.kernel == "gemv":
        if choice.tile_m != m:  # 3 rows as 4
            padded = torch.nn.functional.pad(x, (0, 0, 0, choice.tile_m - m))
            target = torch.empty((choice.tile_m, rows), dtype=out.dtype, device=out.device)
            plan.multiply(padded, *shared, added, target)
            out.copy_(target[:m])
            return
        plan.multiply(x, *shared, added, target)
    elif plan.prepare is not None:
        halves = torch.empty((m, cols), dtype=torch.float16, device=x.device)
        powers = torch.empty(m, dtype=torch.float32, device=x.device)
        plan.prepare(x, halves, powers)
        plan.multiply(halves, powers, *shared, codebook(format, x.device), added, target)
    if plan.combine is not None:
        plan.combine(target, added, out)


@lru_cache(maxsize=1024)
def plan_of(
    choice: Choice,
    m: int,
    rows: int,
    cols: int,
    format: str,
    blocksize: int,
    nested: bool,
    bias: bool,
    bf16: bool,
) -> _Plan:
    """Return the launches of a product ``[m, cols] @ [rows, cols]^T``; arguments as `fused_product` has them."""
    from tuckaway_kernels.linear_4bit.kernel import fp16_rows_kernel, gemv_kernel, mma_kernel

    split, fp4 = choice.split, format == "fp4"
    combine = combine_launch(split, m, rows, bias)
    if choice.kernel == "gemv":
        constants = {
            "ROWS": choice.tile_rows,
            "HALVES": 32 * choice.warps,
            "M": choice.tile_m,
            "BLOCKSIZE": blocksize,
            "NESTED": nested,
            "BIAS": bias,
            "SPLIT": split,
            "BF16": bf16,
            "FP4": fp4,
            # fp16 results show the error of fp16 sums of 16 terms: theirs are of 8
            "CHAINS": 1 if bf16 else 2,
            "WIDE": False,
        }
        part = -(-(cols // 32) // (split * 32)) * 32
        multiply = Launch(
            gemv_kernel,
            (rows // choice.tile_rows, split, 1),
            (rows, cols, part),
            constants,
            warps=choice.warps,
            words=(0, 1),
            aligned=True,
        )
        return _Plan(None, multiply, combine)
    columns = min(1 << (cols - 1).bit_length(), _ROW_TILE)
    prepare = Launch(
        fp16_rows_kernel,
        (m, 1, 1),
        (cols,),
        {"COLUMNS": columns},
        warps=8 if columns == _ROW_TILE else 4,
        aligned=True,
    )
    constants = {
        "ROWS": choice.tile_rows,
        "M": choice.tile_m,
        "BLOCKS": choice.blocks,
        "BLOCKSIZE": blocksize,
        "NESTED": nested,
        "BIAS": bias,
        "SPLIT": split,
        "STAGES": choice.stages,
        "FP4": fp4,
        "WIDE": False,
        "PTX": True,
    }
    steps = cols // (64 * choice.blocks)
    multiply = Launch(
        mma_kernel,
        (-(-rows // choice.tile_rows), split, -(-m // choice.tile_m)),
        (m, rows, cols, -(-steps // split)),
        constants,
        warps=choice.warps,
        stages=choice.stages,
        aligned=True,
    )
    return _Plan(prepare, multiply, combine)


def combine_launch(split: int, m: int, rows: int, bias: bool) -> Launch | None:
    """Return the launch that adds up ``split`` partial products ``[m, rows]``; None if there is one only."""
    if split == 1:
        return None
    from tuckaway_kernels.linear_4bit.kernel import combine_kernel

    n = m * rows
    constants = {"SPLIT": split, "BIAS": bias, "TILE": _COMBINE_TILE}
    return Launch(combine_kernel, (-(-n // _COMBINE_TILE), 1, 1), (n, rows), constants, warps=4)
