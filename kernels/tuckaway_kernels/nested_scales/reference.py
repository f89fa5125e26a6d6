"""Quantize the scales of 4-bit weights to 8 bits, and back, in plain torch: the definition, and the path on the CPU.

Nested (double) quantization stores each scale as one byte: ``absmax - offset`` in blocks of 256, each with an fp32
scale of its own, against the 256 values of the signed dynamic map. It saves 0.373 bits a weight at blocksize 64.
Everything here is 1/64 the size of the weights, so it is written plainly.
"""

from __future__ import annotations

import torch

from tuckaway_kernels.codebooks import NESTED_BLOCKSIZE, check_storage, dynamic_map, dynamic_thresholds
from tuckaway_kernels.reciprocal import flush, reciprocal

PIECE = 1 << 18
"""Scales taken at once."""


def quantize_nested(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the scales ``absmax``.

    The offset is their mean in float64, rounded to fp32. bitsandbytes takes the fp32 mean, whose last bits depend
    on the order in which a device adds up, so that the same weights give other bytes on another device; the
    float64 mean comes out the same everywhere. Either is a valid file: a reader takes the offset from the file.

    Args:
        absmax: fp32 with ``nb`` elements.

    Returns:
        codes uint8 ``[nb]``, nested absmax fp32 ``[ceil(nb / 256)]`` and offset fp32 ``[]`` (0 if nb is 0).
    """
    check_storage("absmax", absmax, torch.float32, absmax.numel())
    parts = empty_nested(absmax)
    quantize_nested_out(absmax, *parts)
    return parts


def quantize_nested_out(
    absmax: torch.Tensor, codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor
) -> None:
    """Quantize the scales ``absmax`` into ``codes``, ``nested_absmax`` and ``offset``; see `quantize_nested`.

    Raises:
        ValueError: a tensor of the wrong dtype or size.
    """
    check_nested(absmax, codes, nested_absmax, offset)
    # a piece at a time: the mean in another dtype makes a copy of everything
    total = torch.zeros((), dtype=torch.float64, device=absmax.device)
    for piece in absmax.view(-1).split(PIECE):
        total += piece.sum(dtype=torch.float64)
    offset.view(()).copy_(total / max(absmax.numel(), 1))
    _quantize_with_offset(absmax, offset, codes, nested_absmax)


def empty_nested(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for what `quantize_nested` gives for ``absmax``."""
    nb, device = absmax.numel(), absmax.device
    return (
        torch.empty(nb, dtype=torch.uint8, device=device),
        torch.empty(-(-nb // NESTED_BLOCKSIZE), dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.float32, device=device),
    )


def check_nested(
    absmax: torch.Tensor, codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor
) -> None:
    """Raise ValueError unless the scales ``absmax`` and the storage for their codes go together."""
    nb = absmax.numel()
    check_storage("absmax", absmax, torch.float32, nb)
    check_storage("codes", codes, torch.uint8, nb)
    check_storage("nested_absmax", nested_absmax, torch.float32, -(-nb // NESTED_BLOCKSIZE))
    check_storage("offset", offset, torch.float32, 1)


def quantize_nested_with_offset(
    absmax: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``absmax - offset``; see `quantize_nested`. Returns codes and nested absmax."""
    check_storage("absmax", absmax, torch.float32, absmax.numel())
    codes, nested, _ = empty_nested(absmax)
    _quantize_with_offset(absmax, offset, codes, nested)
    return codes, nested


def _quantize_with_offset(
    absmax: torch.Tensor, offset: torch.Tensor, codes: torch.Tensor, nested: torch.Tensor
) -> None:
    flat, codes, nested = absmax.view(-1), codes.view(-1), nested.view(-1)
    nb = flat.numel()
    offset = offset.view(())
    thresholds = dynamic_thresholds(absmax.device)
    for start in range(0, nb, PIECE):
        piece = flat[start : start + PIECE]
        used = -(-piece.numel() // NESTED_BLOCKSIZE)
        x = torch.zeros(used * NESTED_BLOCKSIZE, dtype=torch.float32, device=absmax.device)
        torch.sub(piece, offset, out=x[: piece.numel()])
        x = flush(x).view(used, NESTED_BLOCKSIZE)
        scale = nested[start // NESTED_BLOCKSIZE : start // NESTED_BLOCKSIZE + used]
        torch.amax(x.abs().nan_to_num_(nan=0.0, posinf=torch.inf), 1, out=scale)
        y = flush(x * reciprocal(scale).unsqueeze(1)).nan_to_num_(nan=-2.0).view(-1)  # NaN takes code 0
        found = torch.bucketize(y[: piece.numel()], thresholds, out_int32=True)
        codes[start : start + PIECE] = found


def dequantize_nested(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Restore scales: ``dynamic_map[code] * nested_absmax[block]``, rounded to fp32, then plus ``offset``, rounded.

    Args:
        codes: uint8 with ``nb`` elements.
        nested_absmax: fp32 with ``ceil(nb / 256)`` elements.
        offset: fp32, one element.

    Returns:
        fp32 ``[nb]``.

    Raises:
        ValueError: a tensor of the wrong dtype or size.
    """
    nb = codes.numel()
    check_storage("codes", codes, torch.uint8, nb)
    check_storage("nested_absmax", nested_absmax, torch.float32, -(-nb // NESTED_BLOCKSIZE))
    check_storage("offset", offset, torch.float32, 1)
    table = dynamic_map(codes.device)
    out = torch.empty(nb, dtype=torch.float32, device=codes.device)
    flat, scales = codes.view(-1), flush(nested_absmax.view(-1))
    for start in range(0, nb, PIECE):
        values = torch.index_select(table, 0, flat[start : start + PIECE].int())
        blocks = scales[start // NESTED_BLOCKSIZE : -(-(start + values.numel()) // NESTED_BLOCKSIZE)]
        each = blocks.repeat_interleave(NESTED_BLOCKSIZE)[: values.numel()]
        torch.add(flush(values * each), offset.view(()), out=out[start : start + PIECE])
    return out
