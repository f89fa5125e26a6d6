"""The product for many rows of x on Hopper: decoded weights are the register operand of ``wgmma``.

Transposed, ``y^T [rows, m] = S [rows, cols] @ x^T [cols, m]``: a warp group takes 64 rows of S, and up to 256 rows of x
from shared memory, so that what is decoded goes from registers into the tensor cores and never through memory. The A
operand gives a lane two neighbouring columns of every eight; which columns those are is free as long as x is permuted
alike. So x is brought into the order (`order_turns_kernel`) in which a lane's 32 columns of a turn of 128 lie in a row:
16 bytes of codes, one load, and they share a scale for every blocksize.

x comes by the bulk copy engine (TMA) into a ring, one tile of 64 columns a step; one product stays in flight while the
next step is decoded, and the codes of the next turn are on their way. Weights are scaled in registers, in fp16, by a
power of two for each row of S that brings its largest scale to 2**13..2**14 (found by each program for its own columns,
before x is there); so are the rows of x, to 4..8. One fp32 accumulator does for all columns.

8192x8192 nf4 on an H100, m = 64 / 128 / 512: 39 / 55 / 111 us; by warp-level tensor core instructions
(`fragments`) 49 / 84 us, by decoding first 152. With weights decoded once, and wrong, it would be 23 us at m = 64 and
88 at 512, which is cuBLAS' rate; with codes that are always in the first-level cache 33 and 97.

It is written in Gluon, which Triton's interpreter does not run. ``tests/kernels/linear_4bit/test_wgmma.py`` checks the
order of weights and x against each other and compiles it; ``tests/gpu`` runs it.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tuckaway_kernels.linear_4bit.decode import REGISTERS, decode_word, table_registers
from tuckaway_kernels.overlap import after_launch_before, begin_next_launch

COLUMNS = 128
"""Columns of a turn."""

# their names changed after Triton 3.6
_bulk_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def describe_x(tile_m, ordered):
    """The descriptor by which the bulk copy engine takes tiles [tile_m, 64] from what `order_turns_kernel` wrote."""
    return TensorDescriptor.from_tensor(ordered, [tile_m, 64], TILE)


def _decode_scaled(format: str) -> str:
    """PTX: $0..$3 are the weights of the codes in $4, two fp16 each, times the two fp16 in $5."""
    lines = [REGISTERS + " .reg .b32 s2, w;", "mov.b32 s2, $5;", "mov.b32 w, $4;"]
    lines += table_registers(format) + decode_word("w", ["p", "q", "u", "v"])
    lines += [f"mul.rn.f16x2 ${i}, {name}, s2;" for i, name in enumerate("pquv")]
    return "\n".join([*lines, "}"])


_DECODE = tl.constexpr({False: _decode_scaled("nf4"), True: _decode_scaled("fp4")})
_DECODE_TYPES = tl.constexpr("=&r,=&r,=&r,=&r,r,r")


@gluon.constexpr_function
def decode_assembly(fp4):
    """The decoding PTX of a format."""
    return _DECODE.value[bool(fp4)]


@gluon.constexpr_function
def layout_of(warps, columns):
    """[16 * warps, 4 * columns]: a lane of four takes ``columns`` neighbours, of rows g and g + 8 of its warp's 16."""
    bits = columns.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1 << i] for i in range(bits)] + [[8, 0]],
        lane_bases=[[0, columns], [0, 2 * columns], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << i, 0] for i in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[16 * warps, 4 * columns],
    )


@gluon.jit
def halves_of(pair):
    """Int32 of two fp16 -> fp16 [.., 2]."""
    low = (pair & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True)
    return gl.join(low, high)


@gluon.jit
def decode_step(words, scale, ROWS: gl.constexpr, FP4: gl.constexpr, WORDS: gl.constexpr, A: gl.constexpr):
    """Words int32 [ROWS, 8] of a step, scale fp32 [ROWS, 4] for its lanes' two words each -> fp16 [ROWS, 64]."""
    pair = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [scale], dtype=gl.int32, is_pure=True, pack=1
    )
    pair = gl.convert_layout(gl.reshape(gl.join(pair, pair), [ROWS, 8]), WORDS)
    assembly: gl.constexpr = decode_assembly(FP4)
    p, q, u, v = gl.inline_asm_elementwise(
        assembly,
        _DECODE_TYPES,
        [words, pair],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    # [ROWS, lane 4 * word 2, byte 4]; then k = (word, byte, lane, nibble), as the operand has it
    pairs = gl.join(gl.join(p, u), gl.join(q, v))
    both = halves_of(gl.reshape(pairs, [ROWS, 4, 4, 2]))
    return gl.convert_layout(gl.reshape(gl.permute(both, [0, 2, 3, 1, 4]), [ROWS, 64]), A)


@gluon.jit
def steps_of(words, ROWS: gl.constexpr, WORDS: gl.constexpr):
    """Words int32 [ROWS, 16] of a turn -> those of its two steps, [ROWS, 8] each: half of every lane's four."""
    first, second = gl.split(gl.permute(gl.reshape(words, [ROWS, 4, 2, 2]), [0, 1, 3, 2]))
    first = gl.convert_layout(gl.reshape(first, [ROWS, 8]), WORDS)
    return first, gl.convert_layout(gl.reshape(second, [ROWS, 8]), WORDS)


@gluon.jit
def row_powers(start, begin, end, WARPS: gl.constexpr):
    """Powers of two, fp32, that bring the largest of these blocks' scales of a row to 2**13..2**14.

    There fp16 has 28 powers of two below it before it loses bits. start: where the rows' scales begin.
    """
    WIDE: gl.constexpr = layout_of(WARPS, 8)
    rows = gl.convert_layout(start, gl.SliceLayout(1, WIDE))[:, None]
    block = gl.arange(0, 32, gl.SliceLayout(0, WIDE))[None, :]
    largest = gl.zeros([16 * WARPS, 32], gl.float32, WIDE)
    for first in range(begin, end, 32):
        scale = gl.load(rows + first + block, mask=first + block < end, other=0.0)
        largest = gl.maximum(largest, gl.abs(scale))
    found = (gl.max(largest, axis=1).to(gl.int32, bitcast=True) >> 23) & 0xFF
    power = gl.minimum(gl.maximum(267 - found, 1), 253)  # and its inverse is a normal number
    return gl.convert_layout((power << 23).to(gl.float32, bitcast=True), start.type.layout)


@gluon.jit
def bring(x, ring, bars, place, first_x, column, M: gl.constexpr):
    """Start the copy of x [M, 64] from this column on to a place of the ring that all warps have multiplied.

    Columns past the end are zeros.
    """
    mbarrier.expect(bars.index(place), M * 128)
    _barrier()
    _bulk_copy(x, [first_x, column], bars.index(place), ring.index(place))


@gluon.jit
def next_place(stage, phase, STAGES: gl.constexpr):
    """The next place of the ring, and the phase of its barrier."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def wgmma_kernel(
    x,
    powers,
    codes,
    scales,
    bias,
    out,
    m,
    rows,
    cols,
    share,
    WARPS: gl.constexpr,
    M: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCKSIZE: gl.constexpr,
    SPLIT: gl.constexpr,
    BIAS: gl.constexpr,
    FP4: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Write x @ S^T + bias to out [m, rows], or partial sums fp32 [SPLIT, m, rows].

    x: descriptor of fp16 [.., cols] in the order of `order_turns_kernel`, rows a multiple of M. powers fp32 [m]: from
    there. codes int32; scales fp32. share: turns a part. rows is a multiple of 16 * WARPS, cols of 128 and of
    BLOCKSIZE, which is 64 or more.
    """
    ROWS: gl.constexpr = 16 * WARPS
    TURN: gl.constexpr = layout_of(WARPS, 4)
    WORDS: gl.constexpr = layout_of(WARPS, 2)
    SCALES: gl.constexpr = layout_of(WARPS, 1)
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, M, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2)
    part = gl.program_id(0) % SPLIT
    first_row = gl.program_id(0) // SPLIT * ROWS
    first_x = gl.program_id(1) * M
    begin = part * share
    end = gl.minimum(begin + share, cols // 128)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, TURN))
    stride = gl.multiple_of(cols // 8, 16)  # so that Triton loads a lane's four words at once
    at = codes + row[:, None].to(gl.int64) * stride + gl.arange(0, 16, gl.SliceLayout(0, TURN))[None, :]
    scale_row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCALES))
    scale_start = scales + scale_row.to(gl.int64) * (cols // BLOCKSIZE)
    lane_column = gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :] * 32
    words = gl.load(at + begin * 16)
    scale = gl.load(scale_start[:, None] + (begin * 128 + lane_column) // BLOCKSIZE)
    power = row_powers(scale_start, begin * 128 // BLOCKSIZE, (end * 128 + BLOCKSIZE - 1) // BLOCKSIZE, WARPS)
    ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, 64], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    if OVERLAP:
        first_x = gl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, $1;",
            "=r,r",
            [first_x],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    for i in gl.static_range(STAGES - 1):
        bring(x, ring, bars, i, first_x, begin * 128 + i * 64, M)
    first, second = steps_of(words, ROWS, WORDS)
    left = decode_step(first, scale * power[:, None], ROWS, FP4, WORDS, A)
    total = gl.zeros([ROWS, M], gl.float32, PRODUCT)
    held = left
    stage = 0
    phase = 0
    behind = STAGES - 1
    # two steps a turn, so that the operand in flight and the one being decoded have registers of their own
    for turn in range(begin, end):
        mbarrier.wait(bars.index(stage), phase)
        token = warpgroup_mma(left, ring.index(stage).permute((1, 0)), total, is_async=True)
        next_turn = gl.minimum(turn + 1, end - 1)
        next_words = gl.load(at + next_turn * 16)
        next_scale = gl.load(scale_start[:, None] + (next_turn * 128 + lane_column) // BLOCKSIZE)
        total, held = warpgroup_mma_wait(1, deps=(token, held))
        bring(x, ring, bars, behind, first_x, turn * 128 + (STAGES - 1) * 64, M)
        right = decode_step(second, scale * power[:, None], ROWS, FP4, WORDS, A)
        behind = stage
        stage, phase = next_place(stage, phase, STAGES)
        mbarrier.wait(bars.index(stage), phase)
        token = warpgroup_mma(right, ring.index(stage).permute((1, 0)), total, is_async=True)
        first, second = steps_of(next_words, ROWS, WORDS)
        scale = next_scale
        total, left = warpgroup_mma_wait(1, deps=(token, left))
        bring(x, ring, bars, behind, first_x, turn * 128 + STAGES * 64, M)
        left = decode_step(first, scale * power[:, None], ROWS, FP4, WORDS, A)
        held = right
        behind = stage
        stage, phase = next_place(stage, phase, STAGES)
    total, held = warpgroup_mma_wait(0, deps=(total, held))
    # copies beyond the last step were begun too: all must have landed before the ring is another program's
    for _i in gl.static_range(STAGES - 1):
        mbarrier.wait(bars.index(stage), phase)
        stage, phase = next_place(stage, phase, STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))
    # a thread stores 8 neighbouring rows of S, which are neighbours in memory
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
    x_row = first_x + gl.arange(0, M, gl.SliceLayout(0, OUT))
    out_row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    inverse = ((254 << 23) - power.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    result = gl.convert_layout(total, OUT) * gl.convert_layout(inverse, gl.SliceLayout(1, OUT))[:, None]
    result *= gl.load(powers + x_row, mask=x_row < m, other=0.0)[None, :]
    if BIAS and SPLIT == 1:
        result += gl.load(bias + out_row).to(gl.float32)[:, None]
    place = out + (part.to(gl.int64) * m + x_row)[None, :] * rows + out_row[:, None]
    gl.store(place, result.to(out.dtype.element_ty), mask=(x_row < m)[None, :])


@triton.jit
def order_turns_kernel(
    x, ordered, powers, m, cols, COLUMNS: tl.constexpr, ONCE: tl.constexpr, OVERLAP: tl.constexpr
):
    """Bring x [m, cols] to fp16, each row divided by a power of two, in the order of `wgmma_kernel`.

    With rows of zeros up to as many as there are programs. powers fp32 [m]: 2**k, such that 2**-k brings the largest of
    a row to 4..8. ONCE: a row has COLUMNS columns at most.
    """
    row = tl.program_id(0)
    if OVERLAP:
        row = begin_next_launch(after_launch_before(row))
    start = x + row.to(tl.int64) * cols
    target = ordered + row.to(tl.int64) * cols
    column = tl.arange(0, COLUMNS)
    inside = tl.zeros([COLUMNS], dtype=tl.int32) + row < m
    value = tl.load(start + column, mask=(column < cols) & inside, other=0.0).to(tl.float32)
    largest = tl.abs(value)
    if not ONCE:
        for first in range(COLUMNS, cols, COLUMNS):
            more = tl.load(start + first + column, mask=(first + column < cols) & inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(more.to(tl.float32)))
    exponent = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 5), 254)
    factor = ((256 - exponent) << 23).to(tl.float32, bitcast=True)
    if ONCE:
        tl.store(target + column, ordered_turns(value * factor, COLUMNS), mask=column < cols)
    else:
        for first in range(0, cols, COLUMNS):
            place = first + column
            value = tl.load(start + place, mask=(place < cols) & inside, other=0.0).to(tl.float32)
            tl.store(target + place, ordered_turns(value * factor, COLUMNS), mask=place < cols)
    power = ((exponent - 2) << 23).to(tl.float32, bitcast=True)
    tl.store(powers + row, power, mask=row < m)


@triton.jit
def ordered_turns(value, COLUMNS: tl.constexpr):
    """Columns (turn, lane 4, word 4 * byte 4, nibble 2) -> fp16 (turn, word and byte, lane, nibble)."""
    parts = tl.reshape(value.to(tl.float16), [COLUMNS // 128, 4, 16, 2])
    return tl.reshape(tl.permute(parts, (0, 2, 1, 3)), [COLUMNS])
