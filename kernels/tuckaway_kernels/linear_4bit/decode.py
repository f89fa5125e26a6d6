"""Decode 4-bit codes eight at a time: a 32-bit word of codes to eight fp16 values of the codebook.

The product at small batch is bound by integer instructions (64 lanes a clock on an H100), not by memory, so they are
counted here: 21 for a word. The fp16 codebook is two tables of 16 bytes (high bytes, low bytes), four registers each.
A byte permute looks four codes up in eight entries at once; its selector is the word itself without the codes' top
bits, and the top bits select between the results for the lower and the upper eight entries. fp16 rather than bf16
because bf16 codes alone make an error of 1.4e-3 in the product, fp16 codes 1.8e-4.
"""
# mypy: ignore-errors

from __future__ import annotations

import struct

import triton
import triton.language as tl

from tuckaway_kernels.codebooks import CODEBOOKS


def _tables(format: str) -> list[str]:
    """PTX that puts the fp16 codebook in eight registers: high bytes of codes 0 to 15 in t0..t3, low bytes in t4..t7.

    Plain constants would land in uniform registers, of which an instruction takes one, and each permute would cost a
    move. Adding what only the hardware knows to be zero keeps them in ordinary registers; it is done once, before the
    loop.
    """
    bits = [struct.unpack("<H", struct.pack("<e", v))[0] for v in CODEBOOKS[format]]
    lines = ["mov.u32 p, %lanemask_eq;", "mov.u32 q, %lanemask_lt;", "and.b32 p, p, q;"]
    for n, shift in enumerate((8, 0)):
        table = [(b >> shift) & 255 for b in bits]
        for i in range(4):
            word = int.from_bytes(bytes(table[4 * i : 4 * i + 4]), "little")
            lines.append(f"xor.b32 t{4 * n + i}, p, 0x{word:08x};")
    return lines


def _decode(word: str, pairs: list[str], wide: bool, halves: tuple[int, ...] = (0, 1)) -> list[str]:
    """PTX that decodes ``word`` to ``pairs``, two a half word; ``wide``: shift by multiplying, on the other pipe.

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
        for t, result in ((0, "h"), (4, "l")):
            lines += [
                f"prmt.b32 a, t{t}, t{t + 1}, s;",
                f"prmt.b32 b, t{t + 2}, t{t + 3}, s;",
                f"prmt.b32 {result}, a, b, c;",
            ]
        lines += [f"prmt.b32 {next(targets)}, l, h, 0x4051;", f"prmt.b32 {next(targets)}, l, h, 0x6273;"]
    return lines


_REGISTERS = "{ .reg .b32 s, c, a, b, h, l, p, q, u, v, t<8>;"


def _dot(format: str, m: int, wide: bool) -> str:
    """$0.. = m sums; then the word, m sums, and four pairs of x for each."""
    arguments = [f"${m + i}" for i in range(1 + 5 * m)]
    word, sums, x = arguments[0], arguments[1 : 1 + m], arguments[1 + m :]
    lines = [_REGISTERS, *_tables(format), *_decode(word, ["p", "q", "u", "v"], wide)]
    for i in range(m):
        into = sums[i]
        for pair, value in zip("pquv", x[4 * i : 4 * i + 4], strict=True):
            lines.append(f"fma.rn.f16x2 ${i}, {pair}, {value}, {into};")
            into = f"${i}"
    return "\n".join([*lines, "}"])


def _quad(format: str, half: int, wide: bool) -> str:
    """$0, $1 = pairs of fp16 of one half of $2, four bytes of codes."""
    return "\n".join([_REGISTERS, *_tables(format), *_decode("$2", ["$0", "$1"], wide, (half,)), "}"])


DOTS = tl.constexpr(
    {
        (fp4, m, wide): _dot("fp4" if fp4 else "nf4", m, wide)
        for fp4 in (0, 1)
        for m in (1, 2, 3, 4)
        for wide in (0, 1)
    }
)
DOT_TYPES = tl.constexpr({m: ",".join(["=&r"] * m + ["r"] * (1 + 5 * m)) for m in (1, 2, 3, 4)})
QUADS = tl.constexpr(
    {
        (fp4, half, wide): _quad("fp4" if fp4 else "nf4", half, wide)
        for fp4 in (0, 1)
        for half in (0, 1)
        for wide in (0, 1)
    }
)


@triton.constexpr_function
def dot_assembly(fp4, m, wide):
    """PTX of `add_word`."""
    return DOTS.value[(int(fp4), m, int(wide))]


@triton.constexpr_function
def dot_types(m):
    """Operands of `add_word`."""
    return DOT_TYPES.value[m]


@triton.constexpr_function
def quad_assembly(fp4, last, wide):
    """PTX of `bytes_to_quad`."""
    return QUADS.value[(int(fp4), int(last), int(wide))]


@triton.jit
def add_word(word, x, sums, M: tl.constexpr, FP4: tl.constexpr, WIDE: tl.constexpr):
    """Add the products of 8 weights (``word``, int32) and ``x`` to ``sums``: a tuple of M int32 of two fp16 each.

    x: 4 * M int32 of two fp16, four for each of the M rows.
    """
    args = (word,) + sums + x
    assembly: tl.constexpr = dot_assembly(FP4, M, WIDE)
    types: tl.constexpr = dot_types(M)
    if M == 1:
        r = tl.inline_asm_elementwise(assembly, types, args, dtype=(tl.int32,), is_pure=True, pack=1)
    elif M == 2:
        r = tl.inline_asm_elementwise(assembly, types, args, dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    elif M == 3:
        r = tl.inline_asm_elementwise(
            assembly, types, args, dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        r = tl.inline_asm_elementwise(
            assembly, types, args, dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    return r


@triton.jit
def bytes_to_quad(codes, LAST: tl.constexpr, FP4: tl.constexpr, WIDE: tl.constexpr):
    """Uint8 [.., 4j] -> fp16 of that shape: of each 8 weights the first four, or the last four.

    Two calls and not one with two results: Triton moves only operations with one result into the operand's layout.
    """
    assembly: tl.constexpr = quad_assembly(FP4, LAST, WIDE)
    return tl.inline_asm_elementwise(assembly, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


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
