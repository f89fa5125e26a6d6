"""The launches of a product by `wgmma`, for a `Choice`; imports Gluon only when one is made."""

from __future__ import annotations

from functools import partial

from tuckaway_kernels.launching import Launch
from tuckaway_kernels.selection import Choice

_SCALES_A_PROGRAM = 4096
_ROW_TILE = 8192


def order_turns(choice: Choice, m: int, rows: int, cols: int, blocksize: int, overlap: bool) -> Launch:
    """Return the launch that puts x in order and finds the powers of two of its rows and of those of the matrix."""
    from tuckaway_kernels.linear_4bit.wgmma import order_turns_kernel

    padded, blocks = -(-m // choice.tile_m) * choice.tile_m, cols // blocksize
    columns = min(1 << (cols - 1).bit_length(), _ROW_TILE)
    wide = 1 << (blocks - 1).bit_length()
    high = max(_SCALES_A_PROGRAM // wide, 1)
    constants = {
        "COLUMNS": columns,
        "ONCE": cols <= columns,
        "ROWS": high,
        "BLOCKS": wide,
        "OVERLAP": overlap,
    }
    return Launch(
        order_turns_kernel,
        (padded + -(-rows // high), 1, 1),
        (m, padded, cols, rows, blocks),
        constants,
        warps=8 if columns >= 4096 else 4,
        aligned=True,
    )


def wgmma(
    choice: Choice, m: int, rows: int, cols: int, format: str, blocksize: int, bias: bool, overlap: bool
) -> Launch:
    """Return the launch that multiplies what `order_turns` left."""
    from tuckaway_kernels.linear_4bit.wgmma import COLUMNS, describe_x, wgmma_kernel

    constants = {
        "WARPS": choice.warps,
        "M": choice.tile_m,
        "STAGES": choice.stages,
        "BLOCKSIZE": blocksize,
        "SPLIT": choice.split,
        "BIAS": bias,
        "FP4": format == "fp4",
        "OVERLAP": overlap,
    }
    return Launch(
        wgmma_kernel,
        (rows // (16 * choice.warps) * choice.split, -(-m // choice.tile_m), 1),
        (m, rows, cols, -(-(cols // COLUMNS) // choice.split)),
        constants,
        warps=choice.warps,
        words=(3,),
        aligned=True,
        overlap=overlap,
        describe=partial(describe_x, choice.tile_m),
    )
