"""The ops ``tuckaway::quantize_nested``, ``quantize_nested_out`` and ``dequantize_nested``, and their launches."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from tuckaway_kernels.codebooks import NESTED_BLOCKSIZE, check_storage, dynamic_map, dynamic_thresholds
from tuckaway_kernels.launching import Launch, has_ptx, kernel_reciprocal_table, overlaps
from tuckaway_kernels.library import define
from tuckaway_kernels.nested_scales import reference

PARTS = 256
"""Pieces whose float64 sums the second kernel adds up; a power of two, about two for each processor of an H100."""

SUM_TILE = 4096
"""Scales that a program of the first kernel loads at once: all of its piece, up to 8192x8192 weights."""

SUM_WARPS = 8
BLOCKS = 4
"""Nested blocks (of 256 scales) a program quantizes: 1,024 programs for 8192x8192 weights at blocksize 64."""

WARPS = 4


@cache
def padded_thresholds(device: torch.device) -> torch.Tensor:
    """Return the 255 thresholds of the dynamic map between -inf and inf: fp32 ``[257]``."""
    inner = dynamic_thresholds(device)
    edge = inner.new_tensor([torch.inf])
    return torch.cat([-edge, inner, edge])


def launch_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize scales on their device, in two launches; see `reference.quantize_nested`."""
    check_storage("absmax", absmax, torch.float32, absmax.numel())
    parts = reference.empty_nested(absmax)
    _launch_quantize(absmax, *parts)
    return parts


def launch_quantize_out(
    absmax: torch.Tensor, codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor
) -> None:
    """Quantize scales into the others; see `reference.quantize_nested_out`."""
    reference.check_nested(absmax, codes, nested_absmax, offset)
    _launch_quantize(absmax, codes, nested_absmax, offset)


def _launch_quantize(
    absmax: torch.Tensor, codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor
) -> None:
    nb, device = absmax.numel(), absmax.device
    if nb == 0:
        offset.zero_()
        return
    partial = torch.empty(PARTS, dtype=torch.float64, device=device)
    sums, quantize = _prepared_quantize(nb, overlaps(device))
    sums(absmax, partial)
    tables = padded_thresholds(device), kernel_reciprocal_table(device)
    quantize(absmax, partial, codes, nested_absmax, offset, *tables)


@lru_cache(maxsize=1024)
def _prepared_quantize(nb: int, overlap: bool) -> tuple[Launch, Launch]:
    from tuckaway_kernels.nested_scales.kernel import partial_sums_kernel, quantize_nested_kernel

    sums = Launch(
        partial_sums_kernel,
        (PARTS, 1, 1),
        (nb, -(-nb // PARTS)),
        {"TILE": SUM_TILE, "OVERLAP": overlap},
        warps=SUM_WARPS,
        overlap=overlap,
    )
    constants = {
        "PARTS": PARTS,
        "BLOCKSIZE": NESTED_BLOCKSIZE,
        "BLOCKS": BLOCKS,
        "PTX": has_ptx(),
        "OVERLAP": overlap,
    }
    return sums, Launch(quantize_nested_kernel, _grid(nb), (nb,), constants, warps=WARPS, overlap=overlap)


def _grid(nb: int) -> tuple[int, int, int]:
    return -(-nb // (NESTED_BLOCKSIZE * BLOCKS)), 1, 1


def launch_dequantize(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Restore scales on their device; see `reference.dequantize_nested`."""
    nb = codes.numel()
    check_storage("codes", codes, torch.uint8, nb)
    check_storage("nested_absmax", nested_absmax, torch.float32, -(-nb // NESTED_BLOCKSIZE))
    check_storage("offset", offset, torch.float32, 1)
    out = torch.empty(nb, dtype=torch.float32, device=codes.device)
    if nb == 0:
        return out
    dequantize_launch(nb)(codes, nested_absmax, offset, dynamic_map(codes.device), out)
    return out


@lru_cache(maxsize=1024)
def dequantize_launch(nb: int) -> Launch:
    """Return the launch that restores ``nb`` scales: of codes, nested absmax, offset, dynamic map and the result."""
    from tuckaway_kernels.nested_scales.kernel import dequantize_nested_kernel

    constants = {"BLOCKSIZE": NESTED_BLOCKSIZE, "BLOCKS": BLOCKS, "PTX": has_ptx()}
    return Launch(dequantize_nested_kernel, _grid(nb), (nb,), constants, warps=WARPS)


def _fake_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nb = absmax.numel()
    return (
        absmax.new_empty((nb,), dtype=torch.uint8),
        absmax.new_empty(((nb + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE,)),
        absmax.new_empty(()),
    )


def _fake_quantize_out(
    absmax: torch.Tensor, codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor
) -> None:
    reference.check_nested(absmax, codes, nested_absmax, offset)


def _fake_dequantize(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return nested_absmax.new_empty((codes.numel(),))


define(
    "quantize_nested(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor offset)",
    reference=reference.quantize_nested,
    fake=_fake_quantize,
    triton=launch_quantize,
)
define(
    "quantize_nested_out(Tensor absmax, Tensor(a!) codes, Tensor(b!) nested_absmax, Tensor(c!) offset) -> ()",
    reference=reference.quantize_nested_out,
    fake=_fake_quantize_out,
    triton=launch_quantize_out,
)
define(
    "dequantize_nested(Tensor codes, Tensor nested_absmax, Tensor offset) -> Tensor",
    reference=reference.dequantize_nested,
    fake=_fake_dequantize,
    triton=launch_dequantize,
)
