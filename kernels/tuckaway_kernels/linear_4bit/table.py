"""Decode 4-bit codes a byte at a time, by a table in shared memory: one load gives two weights as a pair of fp16.

The product at small batch is bound by what decoding takes, so it is counted. Byte permutes on a 16-entry table
(`decode`) take 21 integer instructions for 8 weights, of which a multiprocessor of an H100 does 64 lanes a clock: 12 us
for 8192x8192, as long as reading the codes. Here a byte takes a shift and a mask, 8 for 8 weights, and a load, of which
it does 32 lanes a clock if no two lanes want the same bank: 4.5 us each, on two pipes. For that every lane has a column
of the table of its own, 256 entries of 4 bytes: 32 KiB, filled by each program when it starts.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.linear_4bit.decode import REGISTERS, decode_word, table_registers


def _fill(format: str, threads: int) -> str:
    """PTX that fills the table with ``threads`` threads; $1 is the thread's number, $0 its lane's offset.

    Thread q decodes the bytes 4q to 4q + 3 and writes its part of their 32 copies, 16 bytes at a time, in an order that
    keeps eight neighbouring threads on different banks. The declaration is at the level of the function: what looks
    values up names it.
    """
    share = max(threads // 64, 1)
    lines = [
        ".shared .align 128 .b8 tuckaway_table[32768];",
        REGISTERS + " .reg .b32 n, at, w, z, part, k;",
        *table_registers(format),
        "mov.u32 at, tuckaway_table;",
    ]
    for round_ in range(max(64 // threads, 1)):
        lines += [
            f"add.u32 n, $1, {round_ * threads};",
            "and.b32 n, n, 63;",
            "shr.u32 part, $1, 6;",
            "mul.lo.u32 w, n, 0x04040404;",
            "add.u32 w, w, 0x03020100;",
            *decode_word("w", ["p", "q", "u", "v"]),
            "shl.b32 z, n, 9;",
            "add.u32 z, z, at;",
        ]
        for j in range(8 // share):
            lines += [
                f"add.u32 k, part, {j * share};" if share > 1 else f"mov.u32 k, {j};",
                "add.u32 k, k, n;",
                "and.b32 k, k, 7;",
                "shl.b32 k, k, 4;",
                "add.u32 k, k, z;",
                *(f"st.shared.v4.b32 [k+{128 * i}], {{{r}, {r}, {r}, {r}}};" for i, r in enumerate("pquv")),
            ]
    lines += ["bar.sync 0;", "and.b32 $0, $1, 31;", "shl.b32 $0, $0, 2;", "}"]
    return "\n".join(lines)


def look_up(word: str, lane: str, pairs: list[str], bytes_: tuple[int, ...] = (0, 1, 2, 3)) -> list[str]:
    """PTX that decodes ``word`` to ``pairs`` of fp16, one a byte; first the weight of its high nibble."""
    lines = []
    for i, pair in zip(bytes_, pairs, strict=True):
        shift = "shl.b32 s, {0}, 7;" if i == 0 else "shr.u32 s, {0}, {1};"
        lines += [
            shift.format(word, 8 * i - 7),
            f"lop3.b32 s, s, 0x7f80, {lane}, 0xea;",  # (s & 0x7f80) | lane
            "add.u32 s, s, at;",  # into the offset of the load
            f"ld.shared.b32 {pair}, [s];",
        ]
    return lines


def _dot(m: int) -> str:
    """$0.. = m sums; then the word, the lane, m sums, and four pairs of x for each."""
    arguments = [f"${m + i}" for i in range(2 + 5 * m)]
    word, lane, sums, x = arguments[0], arguments[1], arguments[2 : 2 + m], arguments[2 + m :]
    lines = [
        "{ .reg .b32 s, at, p, q, u, v;",
        "mov.u32 at, tuckaway_table;",
        *look_up(word, lane, ["p", "q", "u", "v"]),
    ]
    for i in range(m):
        into = sums[i]
        for pair, value in zip("pquv", x[4 * i : 4 * i + 4], strict=True):
            lines.append(f"fma.rn.f16x2 ${i}, {pair}, {value}, {into};")
            into = f"${i}"
    return "\n".join([*lines, "}"])


FILLS = tl.constexpr(
    {
        (fp4, threads): _fill("fp4" if fp4 else "nf4", threads)
        for fp4 in (0, 1)
        for threads in (32, 64, 128, 256, 512)
    }
)
TABLE_DOTS = tl.constexpr({m: _dot(m) for m in (1, 2, 3, 4)})
TABLE_DOT_TYPES = tl.constexpr({m: ",".join(["=&r"] * m + ["r"] * (2 + 5 * m)) for m in (1, 2, 3, 4)})


@triton.constexpr_function
def fill_assembly(fp4, threads):
    """PTX of `fill_table`."""
    return FILLS.value[(int(fp4), threads)]


@triton.constexpr_function
def table_dot_assembly(m):
    """PTX of `add_looked_up`."""
    return TABLE_DOTS.value[m]


@triton.constexpr_function
def table_dot_types(m):
    """Operands of `add_looked_up`."""
    return TABLE_DOT_TYPES.value[m]


@triton.jit
def fill_table(THREADS: tl.constexpr, FP4: tl.constexpr):
    """Fill the table, once, before anything is looked up; returns each thread's offset in it, int32 [THREADS]."""
    assembly: tl.constexpr = fill_assembly(FP4, THREADS)
    return tl.inline_asm_elementwise(
        assembly, "=r,r", [tl.arange(0, THREADS)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def add_looked_up(word, lane, x, sums, M: tl.constexpr):
    """Add the products of 8 weights (``word``, int32) and ``x`` to ``sums``: a tuple of M int32 of two fp16 each.

    lane: from `fill_table`. x: 4 * M int32 of two fp16, four for each of the M rows.
    """
    args = (word, lane) + sums + x
    assembly: tl.constexpr = table_dot_assembly(M)
    types: tl.constexpr = table_dot_types(M)
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
