"""The peers of ``kernels.py``, at the same sizes and timed in the same way: bitsandbytes and torch's int4 kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timing import eager_microseconds

if TYPE_CHECKING:
    from kernels import Run

NAMES = ("bitsandbytes", "torch int4")
"""How the names of these parts begin."""

MOST_INT4_ROWS = 128
"""Rows of x that torch's int4 kernel is given: 4,096 take it 18 ms."""

Shape = tuple[int, int]


def parts(shapes: tuple[Shape, ...]) -> dict[str, Callable[[Run], None]]:
    """Return the parts by name; each fails by itself where bitsandbytes is not installed."""
    found: dict[str, Callable[[Run], None]] = {
        "bitsandbytes host": host,
        "bitsandbytes conversions": conversions,
        "bitsandbytes int8": int8,
    }
    for shape in shapes:
        found[f"bitsandbytes nf4 {shape[0]}x{shape[1]}"] = four_bit(shape, False)
        found[f"torch int4 {shape[0]}x{shape[1]}"] = int4(shape)
    return found | {f"bitsandbytes nested {s[0]}x{s[1]}": four_bit(s, True) for s in shapes}


def bitsandbytes() -> Any:
    """Return the module."""
    return importlib.import_module("bitsandbytes")


def _linear_8bit(weight: torch.Tensor) -> Any:
    """Return bitsandbytes' layer for a weight fp16 ``[rows, cols]``."""
    bnb = bitsandbytes()
    rows, cols = weight.shape
    module = bnb.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    module.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return module.to(weight.device)


def host(run: Run) -> None:
    """Host time of eager calls."""
    bnb = bitsandbytes()
    n = min(512, run.sizes.shapes[0][1])
    for m in run.sizes.host_batches:
        for nested in (False, True):
            x, weight = run.random(m, n), run.random(n, n)
            codes, state = bnb.functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=nested
            )
            name = "nf4 nested" if nested else "nf4"
            run.host(f"bitsandbytes {name}", m, lambda x=x, c=codes, s=state: bnb.matmul_4bit(x, c.t(), s))
        x, weight = run.random(m, n, dtype=torch.float16), run.random(n, n, dtype=torch.float16)
        module = _linear_8bit(weight)
        run.host("bitsandbytes LLM.int8(), threshold 6", m, lambda x=x, module=module: module(x))


def conversions(run: Run) -> None:
    """Quantize and decode one weight."""
    bnb = bitsandbytes()
    weight = run.random(*run.sizes.shapes[0], scale=0.02)
    out = torch.empty_like(weight) if run.device.type == "cuda" else None  # it has no such op on the CPU
    for nested in (False, True):
        name, bits = ("nf4 nested", 4.127) if nested else ("nf4", 4.5)
        options: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": nested}
        codes, state = bnb.functional.quantize_4bit(weight, **options)
        run.conversion(
            f"bitsandbytes quantize {name}, eager",
            lambda i, options=options: bnb.functional.quantize_4bit(weight, **options)[0],
            lambda: True,
            bits,
            eager_microseconds,
        )
        run.conversion(
            f"bitsandbytes dequantize {name}",
            lambda i, c=codes, s=state: bnb.functional.dequantize_4bit(c, s, out=out),
            lambda: True,
            bits,
        )


def four_bit(shape: Shape, nested: bool) -> Callable[[Run], None]:
    """Return the products of one shape."""

    def part(run: Run) -> None:
        bnb = bitsandbytes()
        bits = 4.127 if nested else 4.5
        options: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": nested}
        copies = run.copies(shape, bits)
        theirs = [
            bnb.functional.quantize_4bit(run.random(*shape, scale=0.02), **options) for _ in range(copies)
        ]
        decoded = bnb.functional.dequantize_4bit(*theirs[0]).float()
        for m in run.sizes.batches:
            x = run.random(m, shape[1])

            def call(i: int, x: torch.Tensor = x) -> torch.Tensor:
                codes, state = theirs[i % copies]
                return bnb.matmul_4bit(x, codes.t(), state)  # type: ignore[no-any-return]

            run.product(f"bitsandbytes nf4{' nested' * nested}", call, x, decoded, bits=bits)

    return part


def int8(run: Run) -> None:
    """LLM.int8(), eager: it asks the GPU which columns are outliers."""
    rows, cols = run.sizes.shapes[1]
    weights = [
        run.random(rows, cols, dtype=torch.float16, scale=0.02) for _ in range(4)
    ]  # 67 MB: past the cache
    modules = [_linear_8bit(w) for w in weights]
    for m in run.sizes.int8_batches:
        x = run.random(m, cols, dtype=torch.float16)
        x[:, ::400] *= 20
        run.product(
            "bitsandbytes LLM.int8(), threshold 6, eager",
            lambda i, x=x: modules[i % 4](x),
            x,
            weights[0],
            bits=8,
            wrong=5e-2,  # of codes of the weights too
            rate=2.0,
            timed=eager_microseconds,
        )


def int4(shape: Shape) -> Callable[[Run], None]:
    """Return torch's own kernel for int4 weights in groups of 64 (a format without a codebook)."""

    def part(run: Run) -> None:
        rows, cols = shape
        aten, copies = torch.ops.aten, run.copies(shape, 4.5)
        codes = torch.randint(0, 16, (rows, cols), device=run.device, dtype=torch.uint8)
        if run.device.type == "cuda":
            packed = [aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)]
            multiply = aten._weight_int4pack_mm
        else:
            packed = [aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)]
            multiply = aten._weight_int4pack_mm_for_cpu
        packed += [packed[0].clone() for _ in range(copies - 1)]
        scales = torch.rand(cols // 64, rows, 2, device=run.device, dtype=torch.bfloat16)
        scale, zero = (scales[..., i].t().repeat_interleave(64, 1) for i in (0, 1))
        decoded = ((codes.bfloat16() - 8) * scale + zero).float()
        for m in run.sizes.batches:
            if m > MOST_INT4_ROWS:
                continue
            x = run.random(m, cols)
            run.product(
                "torch int4", lambda i, x=x: multiply(x, packed[i % copies], 64, scales), x, decoded, bits=4.5
            )

    return part
