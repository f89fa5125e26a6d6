"""Decode codes a byte at a time by a table of pairs of fp32 in shared memory, for weights of 16 bits.

Looking a code up in the first-level cache takes 10 instructions a weight, which is hidden where the weights go to
memory, and not where they stay in the second-level cache to be multiplied by next. Here it is 4. The table has 256
entries of 8 bytes, each 16 times, so that half a warp, which is served at once, finds 16 columns: 32 KiB, filled by
each program when it starts, so a program decodes many tiles.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


def _fill() -> str:
    """$0 = the lane's offset, from the thread's number $1; entry $1 is the pair $2, $3. 256 threads.

    Sixteen bytes at a time, in an order that keeps eight neighbouring threads on different banks.
    """
    lines = [
        ".shared .align 128 .b8 tuckaway_pairs[32768];",
        "{ .reg .b32 at, k, h, l;",
        "mov.u32 at, tuckaway_pairs;",
        "mov.b32 h, $2;",
        "mov.b32 l, $3;",
    ]
    for i in range(8):
        lines += [
            f"add.u32 k, $1, {i};",
            "and.b32 k, k, 7;",
            "shl.b32 k, k, 4;",
            "shl.b32 $0, $1, 7;",
            "add.u32 k, k, $0;",
            "add.u32 k, k, at;",
            "st.shared.v4.b32 [k], {h, l, h, l};",
        ]
    return "\n".join([*lines, "bar.sync 0;", "and.b32 $0, $1, 15;", "shl.b32 $0, $0, 3;", "}"])


def _decode(dtype: str) -> str:
    """$0..$3 = pairs of ``dtype``: the weights of the word $4, times the scale $6; $5: the lane's offset."""
    lines = ["{ .reg .b32 s, at; .reg .f32 h, l;", "mov.u32 at, tuckaway_pairs;"]
    for i in range(4):
        lines += [
            "shl.b32 s, $4, 7;" if i == 0 else f"shr.u32 s, $4, {8 * i - 7};",
            "lop3.b32 s, s, 0x7f80, $5, 0xea;",  # (s & 0x7f80) | $5
            "add.u32 s, s, at;",
            "ld.shared.v2.f32 {h, l}, [s];",
            "mul.rn.ftz.f32 h, h, $6;",
            "mul.rn.ftz.f32 l, l, $6;",
            f"cvt.rn.{dtype}x2.f32 ${i}, l, h;",
        ]
    return "\n".join([*lines, "}"])


FILL = tl.constexpr(_fill())
DECODE = tl.constexpr({"bf16": _decode("bf16"), "fp16": _decode("f16")})


@triton.constexpr_function
def decode_assembly(bf16):
    """PTX of the decoding to bf16 or fp16."""
    return DECODE.value["bf16" if bf16 else "fp16"]


@triton.jit
def decode_by_table_kernel(
    codes, absmax, out, codebook, tiles, BLOCKSIZE: tl.constexpr, WORDS: tl.constexpr, BF16: tl.constexpr
):
    """Codes as int32 of eight, ``tiles`` times 256 * WORDS of them, absmax fp32 -> out, int32 of two bf16 or fp16.

    codebook: fp32 [16]. 8 warps.
    """
    thread = tl.arange(0, 256)
    high = tl.load(codebook + thread // 16)
    low = tl.load(codebook + thread % 16)
    lane = tl.inline_asm_elementwise(
        FILL, "=&r,r,f,f", [thread, high, low], dtype=tl.int32, is_pure=False, pack=1
    )
    assembly: tl.constexpr = decode_assembly(BF16)
    per_scale: tl.constexpr = BLOCKSIZE // 8
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        first = tl.full([256], 256 * WORDS, dtype=tl.int64) * tile + thread
        words = ()
        scales = ()
        for i in tl.static_range(WORDS):
            words = words + (tl.load(codes + first + 256 * i),)
            scales = scales + (tl.load(absmax + (first + 256 * i) // per_scale),)
        for i in tl.static_range(WORDS):
            p, q, u, v = tl.inline_asm_elementwise(
                assembly,
                "=&r,=&r,=&r,=&r,r,r,f",
                [words[i], lane, scales[i]],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
            four = tl.reshape(tl.join(tl.join(p, u), tl.join(q, v)), [256, 4])
            tl.store(out + ((first + 256 * i) * 4)[:, None] + tl.arange(0, 4)[None, :], four)
