"""Which kernel serves a product: what was measured on this GPU, else a rule that is safe on any.

A table in ``configs/`` holds what was measured, one file a kind of GPU, read at the first product. A choice depends on
shapes, dtypes and the kind of GPU alone, never on addresses or on what ran before: the same call gives the same bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch

from tuckaway_kernels.launching import has_ptx, processors

_CONFIGS: Final = Path(__file__).parent / "configs"

LARGEST_FUSED: Final = 128
"""Rows of x up to which a fused product is faster than decoding first: 8192x8192, m = 128: 89 against 113 us."""

LARGEST_WGMMA: Final = 1280
"""Rows of x up to which a product by wgmma is faster than decoding first, where it runs."""

_FEWEST_TURNS: Final = 4
"""Turns of 128 columns that a part of them has at the least."""

MOST_INT8_MMA_WARPS: Final = 2
"""More did no better; from 4 on Triton takes wgmma on Hopper."""


@dataclass(frozen=True)
class Choice:
    """One kernel and its constants.

    Args:
        kernel: ``"gemv"``, dot products in ordinary registers; ``"mma"``, tensor cores; ``"wgmma"``, Hopper's, which
            warps drive by fours.
        tile_rows: rows of the matrix a program takes (4-bit mma: a warp).
        warps: 32 threads each, a program.
        tile_m: rows of x a program takes.
        blocks: runs of 64 columns a step (4-bit mma).
        columns: columns a step (int8).
        stages: of the software pipeline (int8); places of the ring (wgmma).
        split: parts the columns are split into, among programs.
        across: warps of a program that take different rows; the others take different columns (4-bit mma).
        programs: that go through all rows (4-bit gemv); 0: one for each ``tile_rows``.
    """

    kernel: Literal["gemv", "mma", "wgmma"]
    tile_rows: int
    warps: int
    tile_m: int = 1
    blocks: int = 1
    columns: int = 0
    stages: int = 1
    split: int = 1
    across: int = 1
    programs: int = 0


@dataclass(frozen=True)
class _Tile:
    """What a program of the kernel by wgmma takes.

    Args:
        tile_m: rows of x.
        warps: four for each 64 rows of the matrix.
        stages: places of its ring.
        resident: programs that a multiprocessor of an H100 has room for.
        most_parts: of the columns; adding up the parts takes time.
        turn_us: microseconds that ``resident`` programs take for a turn of 128 columns there.
    """

    tile_m: int
    warps: int
    stages: int
    resident: int
    most_parts: int
    turn_us: float


_WGMMA_TILES: Final = (
    _Tile(64, 4, 4, 4, 8, 1.9),
    _Tile(128, 4, 3, 4, 8, 2.4),
    _Tile(256, 8, 4, 1, 4, 1.8),
)


def fuses(device: torch.device) -> bool:
    """Tell whether the fused kernels run on ``device``: NVIDIA GPUs from Ampere on, which have pairs of bf16."""
    return has_ptx() and device.type == "cuda" and _capability(device) >= (8, 0)


@cache
def runs_wgmma(device: torch.device) -> bool:
    """Tell whether `linear_4bit.wgmma` runs on ``device``: on Hopper, by a Triton whose Gluon it was tried with."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return fuses(device) and _capability(device) == (9, 0) and (3, 6) <= version <= (3, 9)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def choose_4bit(
    device: torch.device, m: int, rows: int, cols: int, blocksize: int, nested: bool
) -> Choice | None:
    """Return the kernel for ``x [m, cols] @ S^T`` with 4-bit S ``[rows, cols]``; None: decode and multiply."""
    if m > 32:
        choice = _wgmma(device, m, rows, cols, blocksize)
        if choice is not None:
            return choice
    mma = cols % 64 == 0 and blocksize >= 64
    if not 1 <= m <= LARGEST_FUSED or cols % 32 or not (mma or m in (1, 2, 4)):
        return None
    entry = _measured(device, "linear_4bit", m, rows, cols, nested) or {}
    if mma and (m > 2 or entry.get("kernel") == "mma"):
        return _fragments(device, m, rows, cols, entry)
    return _rows_alone(device, m, rows, cols, entry if entry.get("kernel") == "gemv" else {})


def _rows_alone(device: torch.device, m: int, rows: int, cols: int, entry: dict[str, Any]) -> Choice:
    """Return the choice for 1, 2 or 4 rows of x by dot products in ordinary registers."""
    tile_rows, split = entry.get("tile_rows") or 4, 1
    # a thread takes 32 columns: as many threads as take a whole row, whose x then stays in registers
    warps = min(1 << max((cols - 1).bit_length() - 10, 0), 8)
    if 8192 < cols <= 16_384:
        # parts of 4,096 columns: 4096x11008, a row of x: 12.7 us against 15.3 with 16 warps and 19 with 8 in two turns
        warps, split = 4, -(-cols // 4096)
    elif cols > 16_384 and m == 1:
        tile_rows = 8  # 8192x28672: 54 us against 60
    while rows % tile_rows:
        tile_rows //= 2
    programs = entry.get("programs") or (16 if m == 1 else 8) // warps * processors(device)
    if split > 1:
        programs = max(16 // warps * processors(device) // split, 1)
    elif cols > 16_384:
        programs = 0
    return Choice("gemv", tile_rows, warps, m, split=split, programs=programs)


def _wgmma(device: torch.device, m: int, rows: int, cols: int, blocksize: int) -> Choice | None:
    """Return the choice for more than 32 rows of x; None where the kernel does not run, or not faster than decoding."""
    fits = rows % 64 == 0 and cols % 128 == 0 and blocksize >= 64 and cols % blocksize == 0
    if not fits or m > LARGEST_WGMMA or not runs_wgmma(device):
        return None
    # 4096x4096: 128 rows of x 26 us against 29 by decoding first, 256 rows 36 against 33; 11008x4096: 54 against 84
    if m > 128 and rows * cols < 1 << 25:
        return None
    most, turns = processors(device), cols // 128
    tiles = [t for t in _WGMMA_TILES if rows % (16 * t.warps) == 0 and (t.tile_m >= min(m, 128))]
    if m <= 128:
        tiles = tiles[:1]

    def split(tile: _Tile) -> int:
        programs = rows // (16 * tile.warps) * -(-m // tile.tile_m)
        parts = tile.resident * most // programs
        # 448 programs where 528 fit, 28672x8192 and 64 rows of x: 121 us in two parts, more than 128 in one
        if parts == 1 and tile.tile_m == 64 and 2 * programs > tile.resident * most:
            parts = 2
        parts = min(max(parts, 1), tile.most_parts, max(turns // _FEWEST_TURNS, 1))
        return -(-turns // -(-turns // parts))  # without an empty part

    def time(tile: _Tile) -> float:
        programs, parts = rows // (16 * tile.warps) * -(-m // tile.tile_m), split(tile)
        return -(-programs * parts // (tile.resident * most)) * -(-turns // parts) * tile.turn_us

    best = min(tiles, key=time)
    return Choice("wgmma", 16 * best.warps, best.warps, best.tile_m, stages=best.stages, split=split(best))


def _fragments(device: torch.device, m: int, rows: int, cols: int, entry: dict[str, Any]) -> Choice | None:
    tile_m = entry.get("tile_m") or (8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64)
    blocks = entry.get("blocks") or (4 if tile_m <= 16 else 2 if tile_m == 32 else 1)
    steps, tiles, most = -(-cols // (64 * blocks)), -(-m // tile_m), processors(device)

    def split(warps: int, limit: float) -> tuple[int, int]:
        """Return in how many parts the columns are split, and how many programs that makes."""
        programs, parts = -(-rows // (16 * warps)) * tiles, 1
        while parts < 8 and 2 * parts * programs <= limit * most and 2 * parts <= steps:
            parts *= 2
        return parts, parts * programs

    # The warps of a program all take different rows: they share what they read of x in the first-level cache.
    # 28672x8192, 16 rows of x: 82 us in one part, 81 in two; 8192x8192: 32 in two, 24 in four
    warps, (parts, programs) = 4, split(4, 7.0)
    if tile_m == 64:
        # 16 warps fill a multiprocessor; where the last round of programs leaves many idle, 8 do better, for
        # 11008x4096, 64 rows of x, 46 us against 55
        warps, (parts, programs) = 16, split(16, 1.75)
        if programs < 0.8 * most * -(-programs // most):
            warps, (parts, programs) = 8, split(8, 3.5)
        # 128 rows of x, 8192x8192: 85 us against 108 by decoding first; 28672x8192: 508 against 390
        if m > 64 and 2 * -(-rows // 256) * tiles > most:
            return None
    return Choice("mma", 16, warps, tile_m, blocks=blocks, split=parts, across=warps)


def choose_int8(
    device: torch.device, m: int, rows: int, cols: int, compute_dtype: torch.dtype
) -> Choice | None:
    """Return the kernel for ``x [m, cols] @ S^T`` with int8 S ``[rows, cols]``; None: decode and multiply."""
    if not 1 <= m <= LARGEST_FUSED:
        return None
    entry = _measured(device, "linear_int8", m, rows, cols, False) or {}
    if m == 1 or (m <= 4 and (cols % 128 or compute_dtype == torch.float32)):
        widest = entry["columns"] if entry.get("kernel") == "gemv" else 2048
        columns = min(widest, max(1 << (cols - 1).bit_length(), 512))
        return Choice("gemv", 4, max(columns // 512, 1), columns=columns)
    if compute_dtype == torch.float32 or cols % 128:
        return None
    tile_m = 16 if m <= 16 else 32 if m <= 32 else 64
    return Choice(
        "mma",
        64,
        MOST_INT8_MMA_WARPS,
        tile_m,
        columns=128,
        stages=entry.get("stages") or (4 if tile_m == 16 else 3),
        split=_split(device, m, tile_m, rows, cols // 128),
    )


def _split(device: torch.device, m: int, tile_m: int, rows: int, steps: int) -> int:
    """In how many parts the steps along the columns are split: enough programs, but 4 steps or more in each.

    28672x8192, m = 16: 101 us in 2 parts, 91 in 4, 101 in 8; 8192x8192: 33, 32 and 36.
    """
    programs = -(-rows // 64) * -(-m // tile_m)
    split = 4 if programs * 4 >= 2 * processors(device) else 8
    while split > 1 and steps < 4 * split:
        split //= 2
    return split


def _measured(
    device: torch.device, op: str, m: int, rows: int, cols: int, nested: bool
) -> dict[str, Any] | None:
    for entry in _entries(device):
        sizes = {"m": m, "rows": rows, "cols": cols}
        inside = all(entry[k][0] <= v <= entry[k][1] for k, v in sizes.items() if k in entry)
        if entry["op"] == op and inside and entry.get("nested", nested) == nested:
            return entry
    return None


@cache
def _entries(device: torch.device) -> tuple[dict[str, Any], ...]:
    """The measured entries for the kind of GPU that ``device`` is; none for a kind never measured."""
    if device.type != "cuda":
        return ()
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    for path in sorted(_CONFIGS.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if any(name in words for name in table["devices"]):
            return tuple(table["entries"])
    return ()
