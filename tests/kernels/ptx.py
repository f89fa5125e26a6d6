"""The few PTX instructions the kernels use, in numpy, so that Triton's interpreter can run kernels that contain them.

``install()`` teaches the interpreter of this process ``inline_asm_elementwise``. Registers are arrays of uint32 (fp32
by their bits); a packed operand of 8- or 16-bit elements takes one register for 4 or 2 of them, as on the GPU. Element
i of an array is lane i % 32 of a warp. There is one shared memory, and whatever is named in it begins at its byte 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any


def _f32(a: Array) -> Array:
    return a.view(np.float32)


def _bits(a: Array) -> Array:
    return np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)


def _flush(a: Array) -> Array:
    """Fp32 bits with subnormal numbers as zeros of their sign."""
    return np.where(a & np.uint32(0x7F800000), a, a & np.uint32(0x80000000))


def _multiply_flushed(a: Array, b: Array) -> Array:
    """Their product; zero of its sign if it is below 2**-126 when rounded to 24 bits."""
    tiny = np.abs(_f32(a).astype(np.float64) * _f32(b)) < 2.0**-126 - 2.0**-151
    return np.where(tiny, (a ^ b) & np.uint32(0x80000000), _bits(_f32(a) * _f32(b)))


def _halves(a: Array) -> tuple[Array, Array]:
    return (a & 0xFFFF).astype(np.uint16), (a >> 16).astype(np.uint16)


def _join(low: Array, high: Array) -> Array:
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        n = selector >> (4 * i) & 15
        byte = (both >> (8 * (n & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(n & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << (8 * i)
    return result


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros_like(a)
    for i in range(8):
        if int(np.ravel(table)[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _fma_pairs(a: Array, b: Array, c: Array) -> Array:
    parts = []
    for x, y, z in zip(_halves(a), _halves(b), _halves(c), strict=True):
        x, y, z = (v.view(np.float16).astype(np.float64) for v in (x, y, z))
        parts.append((x * y + z).astype(np.float16))
    return _join(*parts)


def _max_pairs(a: Array, b: Array) -> Array:
    """Larger of magnitudes, which compare as their bits do (fp16 or bf16)."""
    return _join(*(np.maximum(x, y) for x, y in zip(_halves(a), _halves(b), strict=True)))


_SHARED = np.zeros(1 << 13, dtype=np.uint32)


def _store_shared(operands: str, value: Callable[[str], Array]) -> None:
    """``[address], {a, b, c, d}``"""
    address, words = re.fullmatch(r"\[(.*?)\], \{(.*)\}", operands).groups()  # type: ignore[union-attr]
    register, _, offset = address.partition("+")
    for i, word in enumerate(words.split(", ")):
        _SHARED[(value(register) + np.uint32(int(offset or 0))) // 4 + i] = value(word)


def _matrix(
    registers: list[Array], lane: Callable[[Array], tuple[Array, Array]], shape: tuple[int, int]
) -> Array:
    """Registers of one warp, a value each, as the matrix whose element ``lane(l)`` lane l holds."""
    result = np.zeros((registers[0].size // 32, *shape), dtype=np.float32)
    number = np.arange(32)
    for i, register in enumerate(registers):
        at = lane(number, i)  # type: ignore[call-arg]
        result[:, at[0], at[1]] = register.reshape(-1, 32)
    return result


def _m16n8k16(operands: str, registers: dict[str, Array], value: Callable[[str], Array]) -> None:
    """``{d..}, {a..}, {b..}, {c..}`` of mma.m16n8k16 with fp16 factors and fp32 sums."""
    names = [part.split(", ") for part in re.findall(r"\{(.*?)\}", operands)]

    def pairs(group: list[str]) -> list[Array]:
        return [half.view(np.float16).astype(np.float32) for n in group for half in _halves(value(n))]

    a = _matrix(
        pairs(names[1]), lambda n, i: (n // 4 + i // 2 % 2 * 8, n % 4 * 2 + i % 2 + i // 4 * 8), (16, 16)
    )
    b = _matrix(pairs(names[2]), lambda n, i: (n % 4 * 2 + i % 2 + i // 2 * 8, n // 4), (16, 8))
    product = a.astype(np.float64) @ b.astype(np.float64)
    lane = np.arange(32)
    for i, (d, c) in enumerate(zip(names[0], names[3], strict=True)):
        part = product[:, lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2].reshape(-1)
        registers[d] = _bits((part + _f32(value(c))).astype(np.float32))


_INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "mov.f32": lambda a: a,
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "ld.shared.b32": lambda a: _SHARED[a // 4],
    "shfl.sync.idx.b32": lambda a, source, *_: np.take_along_axis(
        a.reshape(-1, 32), source.reshape(-1, 32).astype(np.int64), 1
    ).reshape(-1),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.hi.u32": lambda a, b: (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32),
    "lop3.b32": _logic,
    "prmt.b32": _permute,
    "fma.rn.f16x2": _fma_pairs,
    "abs.f16x2": lambda a: a & np.uint32(0x7FFF7FFF),
    "abs.bf16x2": lambda a: a & np.uint32(0x7FFF7FFF),
    "max.f16x2": _max_pairs,
    "max.bf16x2": _max_pairs,
    "cvt.f32.f16": lambda a: _bits(a.astype(np.uint16).view(np.float16)),
    "cvt.rn.f16x2.f32": lambda high, low: _join(_f32(low).astype(np.float16), _f32(high).astype(np.float16)),
    "add.f32": lambda a, b: _bits(_f32(a) + _f32(b)),
    "sub.f32": lambda a, b: _bits(_f32(a) - _f32(b)),
    "mul.f32": lambda a, b: _bits(_f32(a) * _f32(b)),
    "mul.rn.ftz.f32": lambda a, b: _multiply_flushed(_flush(a), _flush(b)),
}
_NAMES = {"tuckaway_table", "tuckaway_pairs"}
_SPECIAL = {"%lanemask_eq": 8, "%lanemask_lt": 7}


def run(text: str, registers: dict[str, Array]) -> dict[str, Array]:
    """Run ``text`` on ``registers`` (uint32 arrays of one shape) and return all registers."""
    registers = dict(registers)
    like = next(iter(registers.values()))

    def value(operand: str) -> Array:
        if operand in registers:
            return registers[operand]
        if operand == "%laneid":
            return np.arange(like.size, dtype=np.uint32) % 32
        if operand in _NAMES:
            number = 0
        elif operand.startswith("0f"):
            number = int(operand[2:], 16)
        else:
            number = _SPECIAL[operand] if operand in _SPECIAL else int(operand, 0)
        return np.full_like(like, number)

    body = re.sub(r"\}\s*$", "", text.strip())
    for line in filter(None, (re.sub(r"^\{\s*", "", part.strip()) for part in body.split(";"))):
        name, rest = line.split(None, 1)
        if name in (".reg", ".shared", "bar.sync"):
            continue
        if name == "st.shared.v4.b32":
            _store_shared(rest, value)
            continue
        if name == "ld.shared.v2.f32":  # {low, high}, [address]
            pair, address = re.fullmatch(r"\{(.*)\}, \[(.*)\]", rest).groups()  # type: ignore[union-attr]
            for i, part in enumerate(pair.split(", ")):
                registers[part] = _SHARED[value(address) // 4 + i]
            continue
        if name.startswith("mma.sync.aligned.m16n8k16"):
            _m16n8k16(rest, registers, value)
            continue
        operands = [o.strip(" []") for o in rest.split(",")]
        if name == "mov.b32" and "{" in rest:  # {low, high} <- word
            low, high = _halves(value(operands[2]))
            registers[operands[0].strip("{} ")], registers[operands[1].strip("{} ")] = (
                low.astype(np.uint32),
                high.astype(np.uint32),
            )
            continue
        registers[operands[0]] = _INSTRUCTIONS[name](*map(value, operands[1:]))
    return registers


def _to_registers(data: Array, pack: int) -> list[Array]:
    """One flat operand as the registers that hold ``pack`` of its elements."""
    size = data.dtype.itemsize
    data = np.ascontiguousarray(data)
    if size == 4:
        grouped = data.view(np.uint32).reshape(-1, pack)
        return [np.ascontiguousarray(grouped[:, i]) for i in range(pack)]
    words = data.view(np.uint8).reshape(-1, pack * size).view(np.uint32)
    return [np.ascontiguousarray(words[:, i]) for i in range(words.shape[1])]


def _from_registers(registers: list[Array], dtype: Any, shape: tuple[int, ...]) -> Array:
    return np.ascontiguousarray(np.stack(registers, axis=1)).view(dtype).reshape(shape)


def install() -> None:
    """Give Triton's interpreter ``inline_asm_elementwise``."""
    import triton.language as tl
    from triton.runtime import interpreter

    def elementwise(
        asm: Any,
        constraints: Any,
        args: Any,
        dtype: Any,
        is_pure: Any,
        pack: Any,
        _semantic: Any = None,
        **_: Any,
    ) -> Any:
        def plain(v: Any) -> Any:
            return v.value if isinstance(v, tl.constexpr) else v

        asm, pack = plain(asm), plain(pack)
        several = isinstance(plain(dtype), (tuple, list, tl.tuple))
        dtypes = list(plain(dtype)) if several else [plain(dtype)]
        values = [a if isinstance(a, tl.tensor) else _semantic.to_tensor(plain(a)) for a in args]
        arrays = np.broadcast_arrays(*(v.handle.data for v in values))
        shape = arrays[0].shape
        number = 0
        outputs = []
        for d in dtypes:
            count = pack * d.primitive_bitwidth // 32
            outputs.append([f"${number + i}" for i in range(count)])
            number += count
        registers = {}
        for array in arrays:
            for register in _to_registers(array.reshape(-1), pack):
                registers[f"${number}"] = register
                number += 1
        found = run(asm, registers)
        results = []
        for d, names in zip(dtypes, outputs, strict=True):
            data = _from_registers([found[n] for n in names], interpreter._get_np_dtype(d), shape)
            scalar = d
            kind = tl.block_type(scalar, list(shape)) if shape else scalar
            results.append(tl.tensor(interpreter.TensorHandle(data, scalar), kind))
        return tuple(results) if several else results[0]

    tl.inline_asm_elementwise = elementwise
    tl.core.inline_asm_elementwise = elementwise
