"""The product with one matrix, all but its input settled: what an eager call without a gradient takes.

Checks, the choice of the kernels and their plan are made once a matrix and shape of input; allocations and launches are
left (`plans`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuckaway_kernels.library import eager
from tuckaway_kernels.plans import BoundPlan, Plan

Settled = tuple[torch.Tensor, ...]
PlanFor = Callable[[torch.device, int, torch.dtype, torch.Tensor | None], tuple[Plan, Settled] | None]
"""``plan_for(device, m, dtype, bias)``: what to launch for ``m`` rows of ``dtype``; None where the op is the way."""

_MOST = 64  # shapes of input remembered a matrix: prompts have many lengths, and are not what this is for


class BoundProduct:
    """``x @ S^T + bias`` for one S ``[rows, cols]``.

    Args:
        codes: of S; they must stay where they are.
        rows: of S.
        cols: of S.
        plan_for: chooses the launches.
    """

    __slots__ = ("_address", "_codes", "_direct", "_plan_for", "_shape")

    def __init__(self, codes: torch.Tensor, rows: int, cols: int, plan_for: PlanFor) -> None:
        self._codes = codes
        self._address = codes.data_ptr()
        self._shape = rows, cols
        self._plan_for = plan_for
        self._direct: dict[tuple[torch.Size, torch.dtype, int], BoundPlan | None] = {}

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Return the product, or None if the op has to be asked: another device, a gradient, too many rows."""
        if not eager(x, bias):
            return None
        key = x.shape, x.dtype, 0 if bias is None else bias.data_ptr()
        try:
            direct = self._direct[key]
        except KeyError:
            direct = self._make(x, bias)
            if len(self._direct) < _MOST:
                self._direct[key] = direct
        if direct is None or not x.is_contiguous() or self._codes.data_ptr() != self._address:
            return None
        return direct(x)

    def _make(self, x: torch.Tensor, bias: torch.Tensor | None) -> BoundPlan | None:
        """Return the launches for inputs like ``x``, or None where the op itself is the way."""
        rows, cols = self._shape
        if x.device != self._codes.device or not rows or not cols or x.shape[-1:] != (cols,):
            return None
        if bias is not None and (bias.device != x.device or bias.shape != (rows,)):
            return None
        m = x.numel() // cols
        found = self._plan_for(x.device, m, x.dtype, bias) if m else None
        if found is None:
            return None
        plan, settled = found
        return plan.bind((*x.shape[:-1], rows), x.dtype, *settled)
