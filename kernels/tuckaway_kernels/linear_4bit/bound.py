"""What `tuckaway_kernels.bound` launches for a 4-bit matrix."""

from __future__ import annotations

import torch

from tuckaway_kernels.bound import BoundProduct, Settled
from tuckaway_kernels.linear_4bit.fused import plan_of, settled_tensors
from tuckaway_kernels.linear_4bit.reference import check_linear_4bit
from tuckaway_kernels.plans import Plan
from tuckaway_kernels.selection import choose_4bit, fuses


def bind_4bit(
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    format: str,
    blocksize: int,
    rows: int,
    cols: int,
    compute_dtype: torch.dtype | None,
) -> BoundProduct:
    """Return ``x @ S^T + bias`` as a function of ``x`` and bias; arguments as `reference` has them.

    ``compute_dtype`` may be None: that of ``x``.
    """
    check_linear_4bit(
        codes,
        scales,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        rows,
        cols,
        compute_dtype or torch.bfloat16,
    )
    nested = nested_absmax is not None

    def plan_for(
        device: torch.device, m: int, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> tuple[Plan, Settled] | None:
        if not fuses(device) or compute_dtype not in (None, dtype):
            return None
        if dtype not in (torch.bfloat16, torch.float16) or (bias is not None and bias.dtype != dtype):
            return None
        choice = choose_4bit(device, m, rows, cols, blocksize, nested)
        if choice is None or choice.kernel == "wgmma":  # which takes a descriptor made for every launch
            return None
        bf16 = dtype == torch.bfloat16
        plan = plan_of(choice, device, m, rows, cols, format, blocksize, nested, bias is not None, bf16)
        return plan, settled_tensors(codes, scales, nested_absmax, nested_offset, bias)

    return BoundProduct(codes, rows, cols, plan_for)
