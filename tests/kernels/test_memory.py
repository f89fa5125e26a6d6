"""No op takes more than 64 MiB on a CPU beside its inputs and its result, whatever their size: measured, not counted.

In a process of its own, because memory that a process got once and gave back to its allocator hides what comes after.
What is watched is the system's own mark of the most that was resident; freed blocks of 64 KiB or more go back at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

LIMIT = 64 << 20
ROWS, COLS, M = 2048, 8192, 2048
"""Weights of 64 MiB, activations of 64 and results of 16 (fp32): whatever is copied whole is seen."""

Call = Callable[[], object]


def quantizations(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    ops, w = torch.ops.tuckaway, torch.randn(2 * ROWS, COLS).to(dtype)
    for format in ("nf4", "fp4"):
        codes, absmax = ops.quantize_4bit(w, format, 64)
        yield f"quantize {format}", lambda f=format: ops.quantize_4bit(w, f, 64)
        yield (
            f"dequantize {format}",
            lambda c=codes, a=absmax, f=format: ops.dequantize_4bit(c, a, f, 64, [2 * ROWS, COLS], dtype),
        )
    rows, scales = ops.quantize_int8(w)
    yield "quantize int8", lambda: ops.quantize_int8(w)
    yield "dequantize int8", lambda: ops.dequantize_int8(rows, scales, dtype)
    nested = ops.quantize_nested(large := torch.rand(1 << 24))
    yield "quantize nested", lambda: ops.quantize_nested(large)
    yield "dequantize nested", lambda: ops.dequantize_nested(*nested)


def products(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    ops, w = torch.ops.tuckaway, torch.randn(ROWS, COLS)
    codes, absmax = ops.quantize_4bit(w, "nf4", 64)
    nested = ops.quantize_nested(absmax)
    rows, scales = ops.quantize_int8(w)
    del w
    x, y = torch.randn(M, COLS).to(dtype), torch.randn(M, ROWS).to(dtype)
    bias = torch.randn(ROWS).to(dtype)
    shape = "nf4", 64, ROWS, COLS
    yield "linear nf4", lambda: ops.linear_4bit(x, codes, absmax, None, None, bias, *shape, True, dtype)
    yield "x @ S nf4", lambda: ops.linear_4bit(y, codes, *nested, None, *shape, False, dtype)
    yield "linear int8", lambda: ops.linear_int8(x, rows, scales, bias, None, True, dtype)
    yield "x @ S int8", lambda: ops.linear_int8(y, rows, scales, None, None, False, dtype)
    few, many = x.clone(), x.clone()
    few[:, ::400] *= 20
    many[0] *= 20
    yield "LLM.int8(), few outliers", lambda: ops.linear_int8(few, rows, scales, bias, 6.0, True, dtype)
    yield "LLM.int8(), every column", lambda: ops.linear_int8(many, rows, scales, bias, 6.0, True, dtype)

    def gradient() -> torch.Tensor:
        with torch.enable_grad():
            leaf = x.requires_grad_()
            result = ops.linear_4bit(leaf, codes, *nested, None, *shape, True, dtype)
            # of the result itself, 1 / 8 of x's size, and what autograd keeps of it
            return torch.autograd.grad(result, leaf, result.detach())[0]

    yield "gradient nf4", gradient


def stacks(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    ops, w, experts = torch.ops.tuckaway, torch.randn(ROWS, COLS), 4
    codes, absmax = ops.quantize_4bit(w, "nf4", 64)
    nested = ops.quantize_nested(absmax)
    rows, scales = ops.quantize_int8(w)
    each = ROWS // experts
    stack = rows.view(experts, each, COLS)
    del w
    x, y = torch.randn(M, COLS).to(dtype), torch.randn(M, each).to(dtype)
    ends = torch.tensor([M // 4, M // 4, M - 1, M], dtype=torch.int32)
    index = torch.randint(ROWS, (M,))
    shape = "nf4", 64, each, COLS
    yield "grouped nf4", lambda: ops.grouped_linear_4bit(x, codes, *nested, ends, *shape, True, dtype)
    yield "grouped x @ S nf4", lambda: ops.grouped_linear_4bit(y, codes, *nested, ends, *shape, False, dtype)
    yield "grouped int8", lambda: ops.grouped_linear_int8(x, stack, scales, ends, True, dtype)
    yield "grouped x @ S int8", lambda: ops.grouped_linear_int8(y, stack, scales, ends, False, dtype)
    yield "embedding nf4", lambda: ops.embedding_4bit(index, codes, *nested, "nf4", 64, ROWS, COLS, dtype)
    yield "embedding int8", lambda: ops.embedding_int8(index, rows, scales, dtype)


def batched(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """``torch.bmm`` by a quantized stack, which is several products."""
    import tuckaway

    weight = tuckaway.quantize(torch.randn(4, COLS, ROWS // 4), tuckaway.QuantizationConfig(format="nf4"))
    x = torch.randn(4, M // 4, COLS).to(dtype)
    weight = weight.to(dtype)
    yield "bmm nf4", lambda: torch.bmm(x, weight)


GROUPS = {group.__name__: group for group in (quantizations, products, stacks, batched)}


def bytes_of(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def taken(call: Call) -> int:
    """Return the most that a call had resident beside what was there before and its result."""
    before = bytes_of("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    result = call()
    most = bytes_of("VmHWM:")
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return most - before - sum(p.nbytes for p in parts if isinstance(p, torch.Tensor))


def measure(group: str, dtype: torch.dtype) -> dict[str, int]:
    import tuckaway_kernels  # noqa: F401

    torch.set_num_threads(1)
    found = {}
    with torch.no_grad():
        for name, call in GROUPS[group](dtype):
            first = taken(call)
            # the first call loads tables and libraries, 8 MiB and more
            found[name] = taken(call) if first > LIMIT else first
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets the mark of memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("group", list(GROUPS))
def test_an_op_takes_64_mib_at_most(group: str, dtype: str) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, group, dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {name: size for name, size in found.items() if size > LIMIT} == {}
    assert len(found) > 0


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], getattr(torch, sys.argv[2]))))
