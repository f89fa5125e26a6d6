"""Decode 4-bit codes eight at a time: a 32-bit word of codes to eight fp16 values of the codebook.

The product at small batch is bound by integer instructions (64 lanes a clock on an H100), not by memory, so they are
counted here: 21 for a word. The fp16 codebook is two tables of 16 bytes (high bytes, low bytes), four registers each. A byte
permute looks four codes up in eight entries at once; its selector is the word itself without the codes' top bits, and the
top bits select between the results for the lower and the upper eight entries. fp16 rather than bf16 because bf16 codes
alone make an error of 1.4e-3 in the product, fp16 codes 1.8e-4.
"""
# mypy: ignore-errors

from __future__ import annotations

import struct

import triton
import triton.language as tl

from tuckaway_kernels.codebooks import CODEBOOKS


def pair_tables(format: str) -> list[int]:
    """The fp16 codebook as eight 32-bit words: the high bytes of codes 0 to 15, then the low bytes.

    Kernels load them: constants in the code land in uniform registers, of which an instruction takes one, and each permute
    then costs a move.
    """
    bits = [struct.unpack("<H", struct.pack("<e", v))[0] for v in CODEBOOKS[format]]
    words = []
    for shift in (8, 0):
        table = [(b >> shift) & 255 for b in bits]
        words += [int.from_bytes(bytes(table[i : i + 4]), "little", signed=True) for i in (0, 4, 8, 12)]
    return words


def _decode(word: str, tables: list[str], pairs: list[str], wide: bool, halves: tuple[int, ...] = (0, 1)) -> list[str]:
    """PTX that decodes ``word`` to ``pairs``, two for each half word; ``wide``: shift by multiplying, on the other pipe.

    A byte of codes holds weight 2i in its high nibble, so the permuted bytes are those of weights 1, 0, 3, 2.
    """
    shift = "mul.hi.u32 {0}, {1}, {3};" if wide else "shr.u32 {0}, {1}, {2};"
    lines = [
        f"and.b32 s, {word}, 0x77777777;",
        shift.format("c", word, 1, "0x80000000"),
        "lop3.b32 c, c, 0x44444444, 0x32103210, 0xea;",  # (c & 0x44444444) | 0x32103210
    ]
    targets = iter(pairs)
    for half in halves:
        if half:
            lines += [shift.format("s", "s", 16, "0x10000"), shift.format("c", "c", 16, "0x10000")]
        for table, result in zip((tables[:4], tables[4:]), "hl", strict=True):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, s;",
                f"prmt.b32 b, {table[2]}, {table[3]}, s;",
                f"prmt.b32 {result}, a, b, c;",
            ]
        lines += [f"prmt.b32 {next(targets)}, l, h, 0x4051;", f"prmt.b32 {next(targets)}, l, h, 0x6273;"]
    return lines


_REGISTERS = "{ .reg .b32 s, c, a, b, h, l, p, q, u, v;"


def _dot(m: int, wide: bool) -> str:
    """$0.. = m sums; then the word, eight tables, m sums, and four pairs of x for each."""
    arguments = [f"${m + i}" for i in range(9 + 5 * m)]
    word, tables, sums, x = arguments[0], arguments[1:9], arguments[9 : 9 + m], arguments[9 + m :]
    lines = [_REGISTERS, *_decode(word, tables, ["p", "q", "u", "v"], wide)]
    for i in range(m):
        into = sums[i]
        for pair, value in zip("pquv", x[4 * i : 4 * i + 4], strict=True):
            lines.append(f"fma.rn.f16x2 ${i}, {pair}, {value}, {into};")
            into = f"${i}"
    return "\n".join([*lines, "}"])


def _quad(half: int, wide: bool) -> str:
    """$0, $1 = pairs of fp16 of one half of $2, four bytes of codes; then each table four times (one for each byte)."""
    tables = [f"${3 + 4 * i}" for i in range(8)]
    return "\n".join([_REGISTERS, *_decode("$2", tables, ["$0", "$1"], wide, (half,)), "}"])


DOT_1, DOT_2, DOT_3, DOT_4 = (tl.constexpr(_dot(m, False)) for m in (1, 2, 3, 4))
WIDE_DOT_1, WIDE_DOT_2, WIDE_DOT_3, WIDE_DOT_4 = (tl.constexpr(_dot(m, True)) for m in (1, 2, 3, 4))
FIRST_QUAD, LAST_QUAD, WIDE_FIRST_QUAD, WIDE_LAST_QUAD = (
    tl.constexpr(_quad(half, wide)) for wide in (False, True) for half in (0, 1)
)
DOT_1_TYPES, DOT_2_TYPES, DOT_3_TYPES, DOT_4_TYPES = (
    tl.constexpr(",".join(["=&r"] * m + ["r"] * (9 + 5 * m))) for m in (1, 2, 3, 4)
)
QUAD_TYPES = tl.constexpr("=&r,=&r," + ",".join(["r"] * 33))


@triton.jit
def load_tables(tables):
    """The eight words of `pair_tables`, from int32 [8, 32] that holds each 32 times."""
    return (
        tl.load(tables),
        tl.load(tables + 32),
        tl.load(tables + 64),
        tl.load(tables + 96),
        tl.load(tables + 128),
        tl.load(tables + 160),
        tl.load(tables + 192),
        tl.load(tables + 224),
    )


@triton.jit
def add_word(word, t, x, sums, M: tl.constexpr, WIDE: tl.constexpr):
    """Add the products of 8 weights (``word``, int32) and ``x`` to ``sums``: a tuple of M int32 of two fp16 each.

    x: 4 * M int32 of two fp16, four for each of the M rows.
    """
    args = (word,) + t + sums + x
    if M == 1:
        r = tl.inline_asm_elementwise(
            WIDE_DOT_1 if WIDE else DOT_1, DOT_1_TYPES, args, dtype=(tl.int32,), is_pure=True, pack=1
        )
    elif M == 2:
        r = tl.inline_asm_elementwise(
            WIDE_DOT_2 if WIDE else DOT_2, DOT_2_TYPES, args, dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    elif M == 3:
        r = tl.inline_asm_elementwise(
            WIDE_DOT_3 if WIDE else DOT_3, DOT_3_TYPES, args, dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        r = tl.inline_asm_elementwise(
            WIDE_DOT_4 if WIDE else DOT_4,
            DOT_4_TYPES,
            args,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return r


@triton.jit
def bytes_to_quad(codes, t, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Uint8 [.., 4j] -> fp16 of that shape: of each 8 weights the first four, or the last four.

    Two calls and not one with two results: Triton moves only operations with one result into the operand's layout.
    """
    if LAST:
        assembly: tl.constexpr = WIDE_LAST_QUAD if WIDE else LAST_QUAD
    else:
        assembly: tl.constexpr = WIDE_FIRST_QUAD if WIDE else FIRST_QUAD
    return tl.inline_asm_elementwise(assembly, QUAD_TYPES, (codes,) + t, dtype=tl.float16, is_pure=True, pack=4)


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
