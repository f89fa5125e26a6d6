"""What `tuckaway_kernels.bound` launches for an int8 matrix."""

from __future__ import annotations

import torch

from tuckaway_kernels.bound import BoundProduct, Settled
from tuckaway_kernels.linear_int8.fused import MOST_SCANNED_ROWS, llm_plan, llm_settled, weight_only_plan
from tuckaway_kernels.linear_int8.reference import check_linear_int8
from tuckaway_kernels.plans import Plan
from tuckaway_kernels.selection import choose_int8, fuses


def bind_int8(
    codes: torch.Tensor, absmax: torch.Tensor, threshold: float | None, compute_dtype: torch.dtype | None
) -> BoundProduct:
    """Return ``x @ S^T + bias`` as a function of ``x`` and bias; arguments as `reference` has them.

    ``compute_dtype`` may be None: that of ``x``. LLM.int8() is bound for as many rows as need no launch to find the
    outliers: with more the GPU is busy long enough.
    """
    check_linear_int8(codes, absmax, threshold, True, compute_dtype or torch.bfloat16)
    rows, cols = codes.shape

    def plan_for(
        device: torch.device, m: int, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> tuple[Plan, Settled] | None:
        if not fuses(device):
            return None
        if threshold is not None:
            if threshold > 0.0 and m > MOST_SCANNED_ROWS:
                return None
            return llm_plan(m, rows, cols, threshold, bias), llm_settled(codes, absmax, bias, threshold)
        if compute_dtype not in (None, dtype) or (bias is not None and bias.dtype != dtype):
            return None
        choice = choose_int8(device, m, rows, cols, dtype)
        if choice is None:
            return None
        plan = weight_only_plan(choice, m, rows, cols, bias is not None)
        return plan, (codes, absmax, absmax if bias is None else bias)

    return BoundProduct(codes, rows, cols, plan_for)
