"""The product with one matrix, all but its input settled: what an eager call without a gradient takes.

At batch 1 the kernel takes 7 us and the Python in front of it five times that on the slow host of an H100. So checks,
the choice of the kernel and its plan are made once a matrix and shape of input; an allocation and a launch are left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuckaway_kernels.codebooks import dynamic_map
from tuckaway_kernels.library import eager
from tuckaway_kernels.linear_4bit.fused import plan_of
from tuckaway_kernels.linear_4bit.reference import check_linear_4bit
from tuckaway_kernels.selection import choose_4bit, fuses

_Direct = Callable[[torch.Tensor], torch.Tensor]
_MOST = 64  # shapes of input remembered a matrix: prompts have many lengths, and are not what this is for


class BoundProduct:
    """``x @ S^T + bias`` for one S ``[rows, cols]``; arguments as `tuckaway_kernels.linear_4bit.reference` has them."""

    __slots__ = ("_address", "_compute_dtype", "_direct", "_format", "_shape", "_tensors")

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        nested_offset: torch.Tensor | None,
        format: str,
        blocksize: int,
        rows: int,
        cols: int,
        compute_dtype: torch.dtype | None,
    ) -> None:
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
        self._tensors = (
            codes,
            scales,
            scales if nested_absmax is None else nested_absmax,
            scales if nested_offset is None else nested_offset,
        )
        self._address = codes.data_ptr()
        self._format = format, blocksize, nested_absmax is not None
        self._shape = rows, cols
        self._compute_dtype = compute_dtype
        self._direct: dict[tuple[torch.Size, torch.dtype, int], _Direct | None] = {}

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
        if direct is None or not x.is_contiguous() or self._tensors[0].data_ptr() != self._address:
            return None
        return direct(x)

    def _make(self, x: torch.Tensor, bias: torch.Tensor | None) -> _Direct | None:
        """Return the launches for inputs like ``x``, or None where the op itself is the way."""
        rows, cols = self._shape
        format, blocksize, nested = self._format
        dtype, device = x.dtype, x.device
        if device != self._tensors[0].device or not fuses(device) or not cols or x.shape[-1:] != (cols,):
            return None
        if self._compute_dtype not in (None, dtype) or dtype not in (torch.bfloat16, torch.float16):
            return None
        if bias is not None and (bias.dtype != dtype or bias.device != device or bias.shape != (rows,)):
            return None
        m = x.numel() // cols
        choice = choose_4bit(device, m, rows, cols, blocksize, nested)
        if choice is None or choice.kernel != "gemv" or choice.tile_m != m or choice.split != 1:
            return None
        bf16 = dtype == torch.bfloat16
        plan = plan_of(choice, m, rows, cols, format, blocksize, nested, bias is not None, bf16)
        added = self._tensors[1] if bias is None else bias
        multiply = plan.multiply.bind(None, *self._tensors, dynamic_map(device), added, None)
        shape = (*x.shape[:-1], rows)

        def direct(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(shape, dtype=dtype, device=device)
            multiply(x, out)
            return out

        return direct
