"""The registered ops: schemas, fakes and dispatch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tuckaway_kernels  # noqa: F401

OPS = torch.ops.tuckaway


def arguments() -> dict[str, tuple[object, ...]]:
    x = torch.randn(33, 77)
    codes, absmax = OPS.quantize_4bit(x, "nf4", 64)
    nested = OPS.quantize_nested(absmax)
    rows, scales = OPS.quantize_int8(x)
    return {
        "quantize_4bit": (x, "fp4", 64),
        "quantize_4bit_out": (x, "nf4", 64, codes, absmax),
        "dequantize_4bit": (codes, absmax, "nf4", 64, [33, 77], torch.bfloat16),
        "dequantize_4bit_out": (codes, absmax, "nf4", 64, x.clone()),
        "quantize_nested": (absmax,),
        "quantize_nested_out": (absmax, *(torch.empty_like(part) for part in nested)),
        "dequantize_nested": nested,
        "quantize_int8": (x,),
        "quantize_int8_out": (x, rows, scales),
        "dequantize_int8": (rows, scales, torch.float16),
        "dequantize_int8_out": (rows, scales, x.clone()),
    }


@pytest.mark.parametrize("name", list(arguments()))
def test_schema_and_fake_tell_the_truth(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name), arguments()[name])


def test_importing_the_kernels_imports_no_triton() -> None:
    program = "import sys, tuckaway_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
