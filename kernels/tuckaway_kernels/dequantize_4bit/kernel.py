"""Decode nf4 and fp4: one read of codes and scales, one write of the weights.

The 16 values of the codebook fit in half a line of the first-level cache, so that looking one up for 32 weights
at once is one conflict-free load: 10 instructions a weight in all. The product is rounded in fp32, then once to the
output's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tuckaway_kernels.arithmetic import multiply


@triton.jit
def dequantize_4bit_kernel(
    codes,
    absmax,
    out,
    codebook,
    n,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Decode codes uint8 [(n + 1) // 2], absmax fp32 [ceil(n / BLOCKSIZE)] -> out [n] fp32, fp16 or bf16.

    EVEN: n is a multiple of BLOCKS * BLOCKSIZE. codebook: fp32 [16].
    """
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    HALF: tl.constexpr = BLOCKSIZE // 2
    first = tl.program_id(0).to(tl.int64) * TILE
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    left = tl.minimum(n - first, TILE).to(tl.int32)
    if EVEN:
        packed = tl.load(codes + first // 2 + byte).to(tl.int32)
        scale = tl.load(absmax + first // BLOCKSIZE + block)
    else:
        packed = tl.load(codes + first // 2 + byte, mask=byte * 2 < left, other=0).to(tl.int32)
        scale = tl.load(absmax + first // BLOCKSIZE + block, mask=block * BLOCKSIZE < left, other=0.0)
    high = multiply(tl.load(codebook + (packed >> 4)), scale[:, None], PTX)
    low = multiply(tl.load(codebook + (packed & 15)), scale[:, None], PTX)
    weights = tl.reshape(tl.join(high, low), [BLOCKS, BLOCKSIZE]).to(out.dtype.element_ty)
    if EVEN:
        tl.store(out + first + place, weights)
    else:
        tl.store(out + first + place, weights, mask=place < left)
