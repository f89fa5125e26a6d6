"""The launches of a product by `wgmma`, for a `Choice`; imports Gluon only when one is made."""

from __future__ import annotations

from functools import partial

from tuckaway_kernels.launching import Launch
from tuckaway_kernels.selection import Choice

ROW_TILE = 8192
"""Columns of x that a program which orders them loads at once, at the most."""


def order_turns(choice: Choice, m: int, cols: int, overlap: bool) -> Launch:
    """Return the launch that puts x in order, its rows' powers of two taken out."""
    from tuckaway_kernels.linear_4bit.wgmma import order_turns_kernel

    columns = min(1 << (cols - 1).bit_length(), ROW_TILE)
    return Launch(
        order_turns_kernel,
        (-(-m // choice.tile_m) * choice.tile_m, 1, 1),
        (m, cols),
        {"COLUMNS": columns, "ONCE": cols <= columns, "OVERLAP": overlap},
        warps=8 if columns >= 4096 else 4,
        aligned=True,
        overlap=overlap,
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
        words=(2,),
        aligned=True,
        overlap=overlap,
        describe=partial(describe_x, choice.tile_m),
    )
