"""fp32 arithmetic as CUDA's ``--use_fast_math`` does it, for Triton kernels: subnormal numbers are zeros.

With PTX these are single instructions. Without (Triton's interpreter, ROCm, XPU) the same results are computed: the
reciprocal from the IEEE one and the table in `tuckaway_kernels.reciprocal`. Both are tested against that module.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flush(x):
    """Return ``x`` with subnormal numbers replaced by zeros of their sign."""
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)


@triton.jit
def multiply(a, b, PTX: tl.constexpr):
    """Return ``a * b``, both operands and the product flushed."""
    if PTX:
        product = tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = flush(flush(a) * flush(b))
    return product


@triton.jit
def reciprocal(x, table, PTX: tl.constexpr):
    """Return ``rcp.approx.ftz.f32(x)`` for ``x`` >= 0; ``table`` is int8 [2**23], unused with PTX."""
    if PTX:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        zero = tl.abs(x) < 1.1754943508222875e-38
        exact = tl.div_rn(1.0, tl.where(zero, 1.0, x))
        error = tl.load(table + (x.to(tl.int32, bitcast=True) & 0x7FFFFF)).to(tl.int32)
        nudged = (exact.to(tl.int32, bitcast=True) + error).to(tl.float32, bitcast=True)
        result = tl.where(zero, float("inf"), flush(tl.where(exact == 0.0, exact, nudged)))
    return result


@triton.jit
def magnitude(x, PTX: tl.constexpr):
    """Return ``|x|`` for a maximum that ignores NaN: the GPU's does, the interpreter's does not."""
    return tl.abs(x) if PTX else tl.where(x == x, tl.abs(x), 0.0)
