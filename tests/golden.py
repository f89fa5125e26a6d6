"""What bitsandbytes' CUDA kernels gave on an H100, for inputs that every machine can make again.

``kernels/golden_bitsandbytes.json`` holds hashes (the first 16 hexadecimal digits of SHA-256 over the bytes) of
codes, scales and decoded weights, and whole bytes for a few edge blocks. The inputs are made of integers and
powers of two, so that they are the same wherever numpy is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@cache
def golden() -> dict[str, Any]:
    return dict(json.loads((Path(__file__).parent / "kernels" / "golden_bitsandbytes.json").read_text()))


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def values(seed: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Return seeded weights with a bell-shaped spread and blocks of very different sizes, some of them all zero."""
    generator = np.random.default_rng(seed)
    n = int(np.prod(shape))
    x = generator.integers(-(2**20), 2**20, (3, n)).sum(0).astype(np.float32)
    x = np.ldexp(x, generator.integers(-28, -22, (n + 63) // 64).repeat(64)[:n]).astype(np.float32)
    if seed % 3 == 0 and n > 300:
        x[64:192] = 0
    return torch.from_numpy(x.reshape(shape)).to(DTYPES[dtype])


@dataclass(frozen=True)
class Case:
    """One 4-bit case."""

    format: str
    dtype: str
    blocksize: int
    shape: list[int]
    seed: int
    codes: str
    absmax: str
    float32: str
    float16: str
    bfloat16: str
    nested_offset: float
    nested_codes: str
    nested_absmax: str

    def weights(self) -> torch.Tensor:
        return values(self.seed, self.shape, self.dtype)

    def decoded(self) -> dict[torch.dtype, str]:
        return {dtype: getattr(self, name) for name, dtype in DTYPES.items()}


@cache
def cases() -> tuple[Case, ...]:
    return tuple(Case(*row) for row in golden()["cases"])


@dataclass(frozen=True)
class RowCase:
    """One int8 case."""

    dtype: str
    shape: list[int]
    seed: int
    codes: str
    absmax: str

    def weights(self) -> torch.Tensor:
        return values(self.seed, self.shape, self.dtype)


@cache
def row_cases() -> tuple[RowCase, ...]:
    return tuple(RowCase(*row) for row in golden()["int8"])


def edge_blocks(dtype: str) -> torch.Tensor:
    """Return the blocks of 64 weights with zeros, thresholds, subnormal numbers, overflow, infinity and NaN."""
    raw = bytearray.fromhex(golden()["edges_input"])
    return torch.frombuffer(raw, dtype=torch.float32).view(-1, 64).to(DTYPES[dtype])
