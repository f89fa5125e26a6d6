"""Quantizing, decoding and multiplying by quantized weights: on the GPU by CUDA graph, and what a call costs the host.

    python benchmarks/kernels.py [--out FOLDER] [--budget 150] [--peers FOLDER] [--only WORD ...] [--miniature]
    python benchmarks/plot_kernels.py

GPU: a graph of calls over copies of the weight that together exceed the second-level cache (50 MB on an H100), so that
every call reads its weight from memory; the median of 7 replays, divided by the calls. Each product is compared with
float64 before it is timed, and a wrong one is not; what is quantized must have the bits that the CPU gives. Host: 1,000
eager calls without waiting for the GPU. In the same run: torch's own bf16 (fp16 next to int8) product, torch's int4
kernel, and bitsandbytes where it is installed (or unpacked in the folder of ``--peers``). ``limit_us`` is what the GPU
allows: the bytes that must move, at the rate at which one row's product reads a large bf16 weight in the same run, or
the arithmetic, at the rate of a large bf16 product, whichever takes longer.

The JSON is written after every result, so that what ends the run early loses nothing; our own kernels come first, at
the sizes that were aimed for, then the peers. ``--miniature`` tries every case at small sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernels_peers
import torch
import torch.nn.functional as F
from common import RESULTS, Journal
from timing import Call, device, host_microseconds, microseconds

import tuckaway

NF4_BITS = 4 + 32 / 64
NESTED_BITS = 4 + 8 / 64 + 32 / 64 / 256
CACHE = 120e6  # bytes; the second-level cache of an H100 has 50 MB
WRONG = 4e-3  # relative error; rounding to bf16 alone makes 1.7e-3, weights rounded to bf16 2.4e-3
WRONG_INT8 = 2e-2  # codes of activations have 8 bits


@dataclass(frozen=True)
class Sizes:
    """What is measured: the first shape is that of conversions too."""

    shapes: tuple[tuple[int, int], ...] = ((8192, 8192), (4096, 4096), (11008, 4096), (28672, 8192))
    batches: tuple[int, ...] = (1, 4, 16, 64, 128, 512, 4096)
    int8_batches: tuple[int, ...] = (1, 16, 512, 4096)
    host_batches: tuple[int, ...] = (1, 4, 16)
    wide: int = 1 << 17  # rows of the weight that tells how fast memory is read
    cache: float = CACHE
    calls: int = 1000


MINIATURE = Sizes(((256, 128), (128, 128)), (1, 4, 16, 64), (1, 16), (1, 4), 256, 1.0, 5)


class Run:
    """A journal of results, each next to what the GPU allows."""

    def __init__(self, journal: Journal, sizes: Sizes) -> None:
        self.journal = journal
        self.sizes = sizes
        self.device = device()
        n = sizes.shapes[0][1]
        wide, line = self.random(sizes.wide, n), self.random(1, n)
        # bytes a us; a copy by the driver gives 2,430 GB/s on an H100, reading 2,900
        self.bandwidth = wide.numel() * wide.element_size() / microseconds(lambda i: F.linear(line, wide), 4)
        square = self.random(n, n)
        self.rate = 2 * n**3 / microseconds(lambda i: square @ square, 4)  # operations a us
        limits = {"GB/s": round(self.bandwidth / 1e3), "TFLOP/s": round(self.rate / 1e6)}
        journal.add({"what": "limits", **limits})

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Return normally distributed values."""
        return torch.randn(*shape, device=self.device, dtype=dtype) * scale

    def copies(self, shape: tuple[int, int], bits: float) -> int:
        """Return how many copies of a weight exceed the second-level cache."""
        return max(2, min(24, math.ceil(self.sizes.cache / (shape[0] * shape[1] * bits / 8))))

    def limit(self, m: int, shape: tuple[int, int], bits: float, rate: float = 1.0) -> float:
        """Return the least us of a product of ``m`` rows, for which ``bits`` a weight are moved."""
        rows, cols = shape
        moved = rows * cols * bits / 8 + 2 * m * (rows + cols)
        return round(max(moved / self.bandwidth, 2 * m * rows * cols / (self.rate * rate)), 2)

    def product(
        self,
        what: str,
        call: Call,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        bits: float,
        wrong: float = WRONG,
        rate: float = 1.0,
        timed: Callable[[Call, int], float] = microseconds,
    ) -> None:
        """Check one product against float64, then time it; a wrong one is recorded and not timed.

        Args:
            what: its name.
            call: multiplies ``x`` by copy ``i`` of the weight, of which copy 0 is ``weight``.
            x: ``[m, cols]``.
            weight: ``[rows, cols]``, decoded.
            bits: read for a weight.
            wrong: relative error from which it is.
            rate: of the arithmetic, next to bf16's.
            timed: how.
        """
        m, (rows, cols) = x.shape[0], weight.shape
        about = {
            "what": what,
            "shape": [rows, cols],
            "m": m,
            "limit_us": self.limit(m, (rows, cols), bits, rate),
        }

        def measure() -> dict[str, Any]:
            exact = torch.cat([x[:16].double() @ part.double().t() for part in weight.split(2048)], 1)

            def error(result: torch.Tensor) -> float:
                return float((result[:16].double() - exact).norm() / exact.norm())

            found: dict[str, Any] = {"error": error(call(0)), "error_of_rounding": error(exact.to(x.dtype))}
            if not found["error"] < wrong:
                return found | {"wrong": True}
            return found | {"us": timed(call, 24 if m <= 64 and rows * cols < 1e8 else 8)}

        self.journal.case(about, measure)

    def conversion(
        self,
        what: str,
        call: Call,
        right: Callable[[], bool],
        bits: float,
        timed: Callable[[Call, int], float] = microseconds,
    ) -> None:
        """Check and time one quantization or decoding of the first shape; ``bits`` a weight written or read for it."""
        shape = self.sizes.shapes[0]
        about = {"what": what, "shape": list(shape), "limit_us": self.limit(0, shape, bits + 16)}

        def measure() -> dict[str, Any]:
            call(0)
            if not right():
                return {"wrong": True}
            taken = timed(call, 8)
            return {"us": taken, "GB/s": round(shape[0] * shape[1] * (bits + 16) / 8e3 / taken)}

        self.journal.case(about, measure)

    def host(self, what: str, m: int, call: Callable[[], torch.Tensor]) -> None:
        """Time eager calls on a weight so small that the GPU keeps up, with gradients asked for by nobody and not."""
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                about = {"what": what, "m": m, "grad_mode": grad}
                self.journal.case(about, lambda: {"host_us": host_microseconds(call, self.sizes.calls)})


def host(run: Run) -> None:
    """Host time of eager calls: ours next to ``nn.Linear``."""
    n = min(512, run.sizes.shapes[0][1])
    kinds: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
        ("nf4", torch.bfloat16, {"format": "nf4", "nested": False}),
        ("nf4 nested", torch.bfloat16, {"format": "nf4", "nested": True}),
        ("LLM.int8(), threshold 6", torch.float16, {"format": "int8"}),
        ("int8 weights alone", torch.bfloat16, {"format": "int8", "int8_threshold": None}),
    )
    for m in run.sizes.host_batches:
        for what, dtype, options in kinds:
            x, weight = run.random(m, n, dtype=dtype), run.random(n, n, dtype=dtype)
            linear = torch.nn.Linear(n, n, bias=False, device=run.device, dtype=dtype)
            ours = tuckaway.quantize(weight, tuckaway.QuantizationConfig(compute_dtype=None, **options))
            run.host(f"nn.Linear next to {what}", m, lambda x=x, linear=linear: linear(x))
            run.host(what, m, lambda x=x, ours=ours: F.linear(x, ours))


def conversions(run: Run) -> None:
    """Quantize and decode one weight: the bits must be those that the CPU gives."""
    weight = run.random(*run.sizes.shapes[0], scale=0.02)
    plain = weight.cpu()
    for nested in (False, True):
        name, bits = ("nf4 nested", NESTED_BITS) if nested else ("nf4", NF4_BITS)
        config = tuckaway.QuantizationConfig(format="nf4", nested=nested)
        made, expected = tuckaway.quantize(weight, config), tuckaway.quantize(plain, config)

        def same(made: Any = made, expected: Any = expected) -> bool:
            return all(torch.equal(t.cpu(), expected.components[k]) for k, t in made.components.items())

        def decoded_same(made: Any = made, expected: Any = expected) -> bool:
            return torch.equal(made.dequantize(torch.bfloat16).cpu(), expected.dequantize(torch.bfloat16))

        quantize: Call = lambda i, config=config: tuckaway.quantize(weight, config).codes  # noqa: E731
        run.conversion(f"quantize {name}", quantize, same, bits)
        run.conversion(
            f"dequantize {name}", lambda i, made=made: made.dequantize(torch.bfloat16), decoded_same, bits
        )


def four_bit(shape: tuple[int, int], nested: bool) -> Callable[[Run], None]:
    """Return the case of one shape: products, and next to them (not nested) cuBLAS's in bf16."""

    def part(run: Run) -> None:
        name, bits = ("nf4 nested", NESTED_BITS) if nested else ("nf4", NF4_BITS)
        config = tuckaway.QuantizationConfig(format="nf4", nested=nested)
        plain = [run.random(*shape, scale=0.02) for _ in range(2)]
        copies = run.copies(shape, bits)
        ours = [tuckaway.quantize(run.random(*shape, scale=0.02), config) for _ in range(copies)]
        decoded = ours[0].dequantize(torch.float32)
        for m in run.sizes.batches:
            x = run.random(m, shape[1])
            run.product(name, lambda i, x=x: F.linear(x, ours[i % copies]), x, decoded, bits=bits)
            if not nested:
                run.product("bf16", lambda i, x=x: F.linear(x, plain[i % 2]), x, plain[0], bits=16)

    return part


def weight_only_int8(run: Run) -> None:
    """Int8 weights alone at the first shape."""
    shape = run.sizes.shapes[0]
    config = tuckaway.QuantizationConfig(format="int8", int8_threshold=None, compute_dtype=None)
    ours = [tuckaway.quantize(run.random(*shape, scale=0.02), config) for _ in range(2)]
    decoded = ours[0].dequantize(torch.float32)
    for m in run.sizes.batches[:3]:
        x = run.random(m, shape[1])
        run.product("int8 weights alone", lambda i, x=x: F.linear(x, ours[i % 2]), x, decoded, bits=8)


def with_outliers(run: Run, m: int, cols: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return activations of which a column in 400 holds outliers."""
    x = run.random(m, cols, dtype=dtype)
    x[:, ::400] *= 20
    return x


def int8(run: Run) -> None:
    """LLM.int8() and int8 weights alone at the second shape, and fp16 next to them."""
    rows, cols = shape = run.sizes.shapes[1]
    copies = run.copies(shape, 8)
    weights = [run.random(rows, cols, dtype=torch.float16, scale=0.02) for _ in range(copies)]
    for threshold in (6.0, None):
        config = tuckaway.QuantizationConfig(format="int8", int8_threshold=threshold, compute_dtype=None)
        ours = [tuckaway.quantize(w, config) for w in weights]
        decoded = ours[0].dequantize(torch.float32)
        for m in run.sizes.int8_batches:
            if threshold is None:
                x, name, wrong, rate = run.random(m, cols), "int8 weights alone", WRONG, 1.0
            else:
                x, name, wrong, rate = (
                    with_outliers(run, m, cols),
                    "LLM.int8(), threshold 6",
                    WRONG_INT8,
                    2.0,
                )

            def call(i: int, x: torch.Tensor = x, ours: Any = ours) -> torch.Tensor:
                return F.linear(x, ours[i % copies])

            run.product(name, call, x, decoded, bits=8, wrong=wrong, rate=rate)
    for m in run.sizes.int8_batches:
        x = run.random(m, cols, dtype=torch.float16)
        run.product("fp16", lambda i, x=x: F.linear(x, weights[i % copies]), x, weights[0], bits=16)


def parts(sizes: Sizes) -> dict[str, Callable[[Run], None]]:
    """Return every part by its name, what matters most first."""

    def name(shape: tuple[int, int], nested: bool) -> str:
        return f"{'nested' if nested else 'nf4'} {shape[0]}x{shape[1]}"

    first, *others = sizes.shapes
    found: dict[str, Callable[[Run], None]] = {
        "host": host,
        "conversions": conversions,
        name(first, False): four_bit(first, False),
        "int8": int8,
        name(first, True): four_bit(first, True),
        "weight_only": weight_only_int8,
    }
    found |= {name(shape, nested): four_bit(shape, nested) for nested in (False, True) for shape in others}
    return found | kernels_peers.parts(sizes.shapes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--budget", type=float, default=150, help="nothing new is begun after this many seconds"
    )
    parser.add_argument("--only", nargs="+", help="parts whose names begin with one of these")
    parser.add_argument("--peers", type=Path, help="a folder with bitsandbytes unpacked in it")
    parser.add_argument("--no-peers", action="store_true", help="our own kernels and cuBLAS alone")
    parser.add_argument("--miniature", action="store_true", help="small sizes, to try the script")
    options = parser.parse_args()
    if options.peers is not None:
        sys.path.insert(0, str(options.peers))
    if not (torch.cuda.is_available() or options.miniature):
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    sizes = MINIATURE if options.miniature else Sizes()
    journal = Journal("kernels", options.budget, options.out)
    with torch.no_grad():
        run = Run(journal, sizes)
        for name, part in parts(sizes).items():
            if options.no_peers and name.startswith(kernels_peers.NAMES):
                continue
            if options.only and not name.startswith(tuple(options.only)):
                continue
            try:
                part(run)
            except (RuntimeError, ValueError, ImportError, AttributeError) as failure:
                journal.add({"what": name, "failed": repr(failure)[:300]})
    journal.save()
    print(f"{len(journal.results)} results, {len(journal.left_out)} left out for want of time")


if __name__ == "__main__":
    main()
