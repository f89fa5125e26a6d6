"""The fused 4-bit products: what is launched, in which order, for a `Choice`."""

from __future__ import annotations

from functools import lru_cache

import torch

from tuckaway_kernels.codebooks import dynamic_map
from tuckaway_kernels.launching import Launch, overlaps
from tuckaway_kernels.linear_4bit.wgmma_launch import ROW_TILE, order_turns, wgmma
from tuckaway_kernels.nested_scales.launch import dequantize_launch
from tuckaway_kernels.plans import OUT, SETTLED, Plan, Room, X
from tuckaway_kernels.selection import Choice

_COMBINE_TILE = 512

CODES, SCALES, NESTED, OFFSET, DYNAMIC, BIAS = range(SETTLED, SETTLED + 6)
"""Operands of the plans, in the order of `settled_tensors`."""


def settled_tensors(
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return what a plan multiplies by; what is not there is never read."""
    return (
        codes,
        scales,
        scales if nested_absmax is None else nested_absmax,
        scales if nested_offset is None else nested_offset,
        dynamic_map(codes.device),
        scales if bias is None else bias,
    )


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
    overlap: bool | None = None,
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
        overlap: launches may begin before those in front of them have ended; None: where the GPU can.
    """
    m, rows = out.shape
    nested, bf16 = nested_absmax is not None, x.dtype == torch.bfloat16
    plan = plan_of(
        choice,
        x.device,
        m,
        rows,
        x.shape[1],
        format,
        blocksize,
        nested,
        bias is not None,
        bf16,
        overlap,
    )
    plan.run(x, out, *settled_tensors(codes, scales, nested_absmax, nested_offset, bias))


@lru_cache(maxsize=1024)
def plan_of(
    choice: Choice,
    device: torch.device,
    m: int,
    rows: int,
    cols: int,
    format: str,
    blocksize: int,
    nested: bool,
    bias: bool,
    bf16: bool,
    overlap: bool | None = None,
) -> Plan:
    """Return the launches of a product ``[m, cols] @ [rows, cols]^T``; arguments as `fused_product` has them."""
    if overlap is None:
        overlap = overlaps(device)
    steps: list[tuple[Launch, tuple[int, ...]]] = []
    rooms: list[Room] = []

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> int:
        rooms.append(Room(shape, dtype))
        return ~(len(rooms) - 1)

    scales: tuple[int, ...] = SCALES, NESTED, OFFSET
    if nested and choice.tile_m >= 64:
        # with one block a step a scale is looked up 8 times over, 14 us for 8192x8192; restored at once it is 4 us
        restored = room(-(-rows * cols // blocksize))
        restore = dequantize_launch(-(-rows * cols // blocksize))
        steps.append((restore, (*scales, DYNAMIC, restored)))
        scales, nested = (restored, restored, restored), False
    target = OUT if choice.split == 1 else room(choice.split, m, rows)
    settled = CODES, *scales, DYNAMIC, BIAS
    if choice.kernel == "gemv":
        multiply = _gemv(choice, rows, cols, format, blocksize, nested, bias, bf16, overlap)
        steps.append((multiply, (X, *settled, target)))
    elif choice.kernel == "wgmma":
        ordered = room(-(-m // choice.tile_m) * choice.tile_m, cols, dtype=torch.float16)
        powers = room(m)
        steps.append((order_turns(choice, m, cols, overlap), (X, ordered, powers)))
        multiply = wgmma(choice, m, rows, cols, format, blocksize, bias, overlap)
        steps.append((multiply, (ordered, powers, CODES, scales[0], BIAS, target)))
    else:
        # x in fp16, its powers of two taken out, in the order tensor cores take it
        ordered = room(-(-m // choice.tile_m) * choice.tile_m, cols, dtype=torch.float16)
        powers = room(choice.split, m)
        steps.append((_order(choice, m, cols, overlap), (X, ordered, powers)))
        multiply = _fragments(choice, m, rows, cols, format, blocksize, nested, bias, overlap)
        steps.append((multiply, (ordered, powers, *settled, target)))
    combine = combine_launch(choice.split, m, rows, bias, overlap)
    if combine is not None:
        steps.append((combine, (target, BIAS, OUT)))
    return Plan(tuple(steps), tuple(rooms))


def _gemv(
    choice: Choice,
    rows: int,
    cols: int,
    format: str,
    blocksize: int,
    nested: bool,
    bias: bool,
    bf16: bool,
    overlap: bool,
) -> Launch:
    from tuckaway_kernels.linear_4bit.kernel import gemv_kernel

    halves = 32 * choice.warps
    part = -(-(cols // 32) // (choice.split * 32)) * 32
    constants = {
        "ROWS": choice.tile_rows,
        "HALVES": halves,
        "M": choice.tile_m,
        "BLOCKSIZE": blocksize,
        "NESTED": nested,
        "BIAS": bias,
        "SPLIT": choice.split,
        "BF16": bf16,
        "FP4": format == "fp4",
        # fp16 results show the error of fp16 sums of 16 terms: theirs are of 8
        "CHAINS": 1 if bf16 else 2,
        "ONCE": min(part, cols // 32) <= halves,
        "OVERLAP": overlap,
    }
    groups = rows // choice.tile_rows
    return Launch(
        gemv_kernel,
        (min(groups, choice.programs or groups), choice.split, 1),
        (rows, cols, part),
        constants,
        warps=choice.warps,
        words=(0, 1),
        aligned=True,
        overlap=overlap,
    )


def _share(choice: Choice, cols: int) -> int:
    """Return how many steps of the columns a program takes."""
    steps = -(-(cols // 64) // (choice.blocks * (choice.warps // choice.across)))
    return -(-steps // choice.split)


def _order(choice: Choice, m: int, cols: int, overlap: bool) -> Launch:
    from tuckaway_kernels.linear_4bit.fragments import order_rows_kernel

    share = _share(choice, cols) * 64 * choice.blocks * (choice.warps // choice.across)
    columns = min(1 << (share - 1).bit_length(), ROW_TILE)
    return Launch(
        order_rows_kernel,
        (-(-m // choice.tile_m) * choice.tile_m, choice.split, 1),
        (m, cols, share),
        {"COLUMNS": columns, "ONCE": share <= columns, "OVERLAP": overlap},
        warps=8 if columns >= 4096 else 4,
        aligned=True,
        overlap=overlap,
    )


def _fragments(
    choice: Choice,
    m: int,
    rows: int,
    cols: int,
    format: str,
    blocksize: int,
    nested: bool,
    bias: bool,
    overlap: bool,
) -> Launch:
    from tuckaway_kernels.linear_4bit.fragments import fragment_kernel

    blocks, deep = cols // 64, choice.warps // choice.across
    program_rows = choice.tile_rows * choice.across
    constants = {
        "WARPS": choice.warps,
        "ACROSS": choice.across,
        "ROWS": choice.tile_rows // 8,
        "BLOCKS": choice.blocks,
        "TILES": choice.tile_m // 8,
        "BLOCKSIZE": blocksize,
        "NESTED": nested,
        "BIAS": bias,
        "SPLIT": choice.split,
        "FP4": format == "fp4",
        "EVEN": rows % program_rows == 0 and blocks % (choice.blocks * deep) == 0,
        "OVERLAP": overlap,
    }
    return Launch(
        fragment_kernel,
        (-(-rows // program_rows) * choice.split, -(-m // choice.tile_m), 1),
        (m, rows, cols, _share(choice, cols)),
        constants,
        warps=choice.warps,
        words=(0, 2),
        aligned=True,
        overlap=overlap,
    )


def combine_launch(split: int, m: int, rows: int, bias: bool, overlap: bool = False) -> Launch | None:
    """Return the launch that adds up ``split`` partial products ``[m, rows]``; None if there is one only."""
    if split == 1:
        return None
    from tuckaway_kernels.linear_4bit.kernel import combine_kernel

    n = m * rows
    constants = {"SPLIT": split, "BIAS": bias, "TILE": _COMBINE_TILE, "OVERLAP": overlap}
    grid = -(-n // _COMBINE_TILE), 1, 1
    return Launch(combine_kernel, grid, (n, rows), constants, warps=4, overlap=overlap)
