"""Decode eight 4-bit codes, a 32-bit word, to fp16 by byte permutes; and pairs of fp16 or bf16 in one register.

The fp16 codebook is two tables of 16 bytes (high bytes, low bytes), four registers each. A byte permute looks four
codes up in eight entries at once; its selector is the word itself without the codes' top bits, and the top bits select
between the results for the lower and the upper eight entries: 21 integer instructions a word. fp16 rather than bf16
because bf16 codes alone make an error of 1.4e-3 in the product, fp16 codes 1.8e-4.
"""
# mypy: ignore-errors

from __future__ import annotations

import struct

import triton
import triton.language as tl

from tuckaway_kernels.codebooks import CODEBOOKS


def table_registers(format: str) -> list[str]:
    """PTX that puts the fp16 codebook in eight registers: high bytes of its values in t0..t3, low bytes in t4..t7."""
    bits = [struct.unpack("<H", struct.pack("<e", v))[0] for v in CODEBOOKS[format]]
    lines = []
    for n, shift in enumerate((8, 0)):
        table = [(b >> shift) & 255 for b in bits]
        for i in range(4):
            word = int.from_bytes(bytes(table[4 * i : 4 * i + 4]), "little")
            lines.append(f"mov.u32 t{4 * n + i}, 0x{word:08x};")
    return lines


def decode_word(word: str, pairs: list[str]) -> list[str]:
    """PTX that decodes ``word`` to ``pairs``, two a half word.

    A byte of codes holds weight 2i in its high nibble, so the permuted bytes are those of weights 1, 0, 3, 2.
    """
    lines = [
        f"and.b32 s, {word}, 0x77777777;",
        f"shr.u32 c, {word}, 1;",
        "lop3.b32 c, c, 0x44444444, 0x32103210, 0xea;",  # (c & 0x44444444) | 0x32103210
    ]
    targets = iter(pairs)
    for half in (0, 1):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 c, c, 16;"]
        for t, result in ((0, "h"), (4, "l")):
            lines += [
                f"prmt.b32 a, t{t}, t{t + 1}, s;",
                f"prmt.b32 b, t{t + 2}, t{t + 3}, s;",
                f"prmt.b32 {result}, a, b, c;",
            ]
        lines += [f"prmt.b32 {next(targets)}, l, h, 0x4051;", f"prmt.b32 {next(targets)}, l, h, 0x6273;"]
    return lines


REGISTERS = "{ .reg .b32 s, c, a, b, h, l, p, q, u, v, t<8>;"


@triton.jit
def sum_of_pair(pair):
    """Int32 of two fp16 -> their sum in fp32."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h; "
        "add.f32 $0, a, b; }",
        "=f,r",
        [pair],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def bf16_pair_magnitude(a, b):
    """The larger magnitudes of two int32 that are two bf16 each."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 p, q; abs.bf16x2 p, $1; abs.bf16x2 q, $2; max.bf16x2 $0, p, q; }",
        "=r,r,r",
        [a, b],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def scale_bf16_pair(pair, factor):
    """Int32 of two bf16, times ``factor`` fp32 -> int32 of two fp16."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b; .reg .f32 l, h; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; "
        "mul.f32 l, a, $2; mul.f32 h, b, $2; cvt.rn.f16x2.f32 $0, h, l; }",
        "=r,r,f",
        [pair, factor],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def scale_fp16_pair(pair, factor):
    """Int32 of two fp16, times ``factor`` fp32 -> int32 of two fp16."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 p, q; .reg .f32 l, h; mov.b32 {p, q}, $1; cvt.f32.f16 l, p; cvt.f32.f16 h, q; "
        "mul.f32 l, l, $2; mul.f32 h, h, $2; cvt.rn.f16x2.f32 $0, h, l; }",
        "=r,r,f",
        [pair, factor],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def fp16_pair_magnitude(a, b):
    """The larger magnitudes of two int32 that are two fp16 each."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 p, q; abs.f16x2 p, $1; abs.f16x2 q, $2; max.f16x2 $0, p, q; }",
        "=r,r,r",
        [a, b],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
