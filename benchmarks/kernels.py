"""Quantizing, decoding and multiplying by quantized weights: on the GPU by CUDA graph, and what a call costs the host.

    python benchmarks/kernels.py [--out FOLDER] [--seconds 150] [--peers FOLDER]
    python benchmarks/plot_kernels.py

GPU: a graph of calls over copies of the weight that together exceed the second-level cache (50 MB on an H100), so that
every call reads its weight from memory; the median of 7 replays, divided by the calls. Each product is compared with
float64 before it is timed, and a wrong one is not. Host: 1,000 eager calls without waiting for the GPU. In the same
run: torch's own bf16 (fp16 next to int8) product, torch's int4 kernel, and bitsandbytes where it is installed (or
unpacked in the folder of ``--peers``). ``limit_us`` is what the GPU allows: the bytes that must move, at the rate at
which one row's product reads a large bf16 weight in the same run, or the arithmetic, at the rate of a large bf16
product, whichever takes longer.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, save

import tuckaway

SHAPES = [(8192, 8192), (4096, 4096), (11008, 4096), (28672, 8192)]
BATCHES = [1, 4, 16, 64, 128, 512, 4096]
CONVERTED = (8192, 8192)
NF4_BITS = 4 + 32 / 64
NESTED_BITS = 4 + 8 / 64 + 32 / 64 / 256
INT8_SHAPE = (4096, 4096)
WEIGHT_ONLY_SHAPE = (8192, 8192)
INT8_BATCHES = [1, 16, 512, 4096]
CACHE = 120e6  # bytes; the second-level cache of an H100 has 50 MB
WRONG = 4e-3  # relative error; rounding to bf16 alone makes 1.7e-3, weights rounded to bf16 2.4e-3
WRONG_INT8 = 2e-2  # codes of activations have 8 bits

Call = Callable[[int], torch.Tensor]


def microseconds(call: Call, calls: int) -> float:
    """Return the median GPU time of a call; ``call(i)`` multiplies by copy ``i`` of the weight."""
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return round(sorted(times[2:])[3], 2)


def eager_microseconds(call: Call, calls: int) -> float:
    """Return the time of a call that no graph can record, because it waits for the GPU or copies from the host."""
    for i in range(3):
        call(i)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(calls):
        call(i)
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) * 1e3 / calls, 1)


def host_microseconds(call: Callable[[], torch.Tensor], calls: int = 1000) -> float:
    """Return the time of a call until it returns, the GPU not waited for."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return round(taken / calls * 1e6, 1)


def error(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the relative distance of the product of at most 16 rows from the one in float64."""
    rows = x[:16].double()
    exact = torch.cat([rows @ part.double().t() for part in weight.split(2048)], 1)
    return float((result[:16].double() - exact).norm() / exact.norm())


def peer() -> Any:
    """Return bitsandbytes, or None."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        return None


class Run:
    """Collects results until the time is up, each next to what the GPU allows."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.results: list[dict[str, Any]] = []
        self.late = 0
        wide = torch.randn(1 << 17, 8192, device="cuda", dtype=torch.bfloat16)
        line = torch.randn(1, 8192, device="cuda", dtype=torch.bfloat16)
        # bytes a us; a copy by the driver gives 2,430 GB/s on an H100, reading 2,900
        self.bandwidth = wide.numel() * wide.element_size() / microseconds(lambda i: F.linear(line, wide), 4)
        n = 8192
        square = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
        self.rate = 2 * n**3 / microseconds(lambda i: square @ square, 4)  # operations a us
        self.add({"what": "limits", "GB/s": round(self.bandwidth / 1e3), "TFLOP/s": round(self.rate / 1e6)})

    def limit(self, m: int, weight: torch.Tensor, bits: float, rate: float = 1.0) -> float:
        """Return the least us of a product of ``m`` rows by ``weight``, of which ``bits`` a weight are moved."""
        rows, cols = weight.shape
        moved = rows * cols * bits / 8 + 2 * m * (rows + cols)
        return round(max(moved / self.bandwidth, 2 * m * rows * cols / (self.rate * rate)), 2)

    def measure(
        self,
        call: Call,
        x: torch.Tensor,
        weight: torch.Tensor,
        wrong: float,
        *,
        bits: float,
        rate: float = 1.0,
        **about: Any,
    ) -> None:
        """Check one product, then time it; a wrong or failing one is recorded and not timed.

        ``bits``: read for a weight. ``rate``: of the arithmetic, next to bf16's.
        """
        if time.monotonic() > self.end:
            self.late += 1
            return
        m = x.shape[0]
        row: dict[str, Any] = {**about, "m": m, "limit_us": self.limit(m, weight, bits, rate)}
        try:
            row["error"] = error(call(0), x, weight)
            row["error_of_rounding"] = error(
                torch.cat([x[:16].double() @ w.double().t() for w in weight.split(2048)], 1).to(x.dtype),
                x,
                weight,
            )
            if row["error"] < wrong:
                row["us"] = microseconds(call, 24 if x.shape[0] <= 64 and weight.numel() < 1e8 else 8)
            else:
                row["wrong"] = True
        except (RuntimeError, ValueError, AttributeError) as failure:
            row["failed"] = repr(failure)[:200]
        self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Record and print one result."""
        self.results.append(row)
        print({k: f"{v:.2e}" if k.startswith("error") else v for k, v in row.items()}, flush=True)

    def measure_conversion(
        self,
        call: Call,
        right: Callable[[], bool],
        weight: torch.Tensor,
        bits: float,
        timed: Callable[[Call, int], float] = microseconds,
        **about: Any,
    ) -> None:
        """Check and time one quantization or decoding of ``weight``; ``bits`` a weight are written or read for it."""
        if time.monotonic() > self.end:
            self.late += 1
            return
        row: dict[str, Any] = {**about, "limit_us": self.limit(0, weight, bits + 16)}
        try:
            call(0)
            if right():
                row["us"] = timed(call, 8)
                row["GB/s"] = round(weight.numel() * (bits + 16) / 8e3 / row["us"])
            else:
                row["wrong"] = True
        except (RuntimeError, ValueError, AttributeError) as failure:
            row["failed"] = repr(failure)[:200]
        self.add(row)


def four_bit(run: Run) -> None:
    bnb = peer()
    for rows, cols in SHAPES:
        about = {"shape": [rows, cols]}
        copies = max(2, min(24, math.ceil(CACHE / (rows * cols * 0.53))))

        def fresh(rows: int = rows, cols: int = cols) -> torch.Tensor:
            return torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * 0.02

        plain = [fresh() for _ in range(2)]
        for m in BATCHES:
            x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
            run.measure(
                lambda i, x=x, plain=plain: F.linear(x, plain[i % 2]),
                x,
                plain[0],
                WRONG,
                bits=16,
                what="bf16",
                **about,
            )
        del plain
        for nested in (False, True):
            config = tuckaway.QuantizationConfig(format="nf4", nested=nested)
            ours = [tuckaway.quantize(fresh(), config) for _ in range(copies)]
            decoded = ours[0].dequantize(torch.float32)
            name = "nf4 nested" if nested else "nf4"
            bits = NESTED_BITS if nested else NF4_BITS
            for m in BATCHES:
                x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
                run.measure(
                    lambda i, x=x, ours=ours: F.linear(x, ours[i % len(ours)]),
                    x,
                    decoded,
                    WRONG,
                    bits=bits,
                    what=name,
                    **about,
                )
            del ours, decoded
            if bnb is None:
                continue
            theirs = [
                bnb.functional.quantize_4bit(
                    fresh(), blocksize=64, quant_type="nf4", compress_statistics=nested
                )
                for _ in range(copies)
            ]
            decoded = bnb.functional.dequantize_4bit(*theirs[0]).float()
            for m in BATCHES:
                x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)

                def call(i: int, x: torch.Tensor = x, theirs: Any = theirs) -> torch.Tensor:
                    codes, state = theirs[i % len(theirs)]
                    return bnb.matmul_4bit(x, codes.t(), state)

                run.measure(call, x, decoded, WRONG, bits=bits, what=f"bitsandbytes {name}", **about)
            del theirs, decoded


def int4(run: Run) -> None:
    """Torch's own kernel for int4 weights in groups of 64 (a format without a codebook)."""
    for rows, cols in SHAPES:
        copies = max(2, min(24, math.ceil(CACHE / (rows * cols * 0.53))))
        codes = [torch.randint(0, 16, (rows, cols), device="cuda", dtype=torch.uint8) for _ in range(2)]
        packed = [
            torch.ops.aten._convert_weight_to_int4pack(c[:, ::2] << 4 | c[:, 1::2], 8)
            for c in (codes[i % 2] for i in range(copies))
        ]
        scales = torch.rand(cols // 64, rows, 2, device="cuda", dtype=torch.bfloat16)
        scale, zero = (scales[..., i].t().repeat_interleave(64, 1) for i in (0, 1))
        decoded = ((codes[0].bfloat16() - 8) * scale + zero).float()
        for m in BATCHES:
            x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)

            def call(i: int, x: torch.Tensor = x, packed: Any = packed, scales: Any = scales) -> torch.Tensor:
                return torch.ops.aten._weight_int4pack_mm(x, packed[i % len(packed)], 64, scales)

            run.measure(call, x, decoded, WRONG, bits=4.5, what="torch int4", shape=[rows, cols])


def conversions(run: Run) -> None:
    """Quantize and decode one weight; ours must give bitsandbytes' bytes where that is installed."""
    bnb = peer()
    weight = torch.randn(*CONVERTED, device="cuda", dtype=torch.bfloat16) * 0.02
    about = {"shape": list(CONVERTED)}
    for nested in (False, True):
        name, bits = ("nf4 nested", NESTED_BITS) if nested else ("nf4", NF4_BITS)
        config = tuckaway.QuantizationConfig(format="nf4", nested=nested)
        made = tuckaway.quantize(weight, config)
        expected = made.dequantize(torch.bfloat16)
        right: Callable[[], bool] = lambda: True  # noqa: E731
        if bnb is not None:
            codes, state = bnb.functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=nested
            )
            expected = bnb.functional.dequantize_4bit(codes, state)

            def right(made: Any = made, codes: Any = codes) -> bool:
                return bool(torch.equal(made.codes.view(-1), codes.view(-1)))

            run.measure_conversion(
                lambda i, nested=nested: bnb.functional.quantize_4bit(
                    weight, blocksize=64, quant_type="nf4", compress_statistics=nested
                )[0],
                lambda: True,
                weight,
                bits,
                eager_microseconds,
                what=f"bitsandbytes quantize {name}, eager",
                **about,
            )
            out = torch.empty_like(weight)
            run.measure_conversion(
                lambda i, c=codes, s=state, out=out: bnb.functional.dequantize_4bit(c, s, out=out),
                lambda: True,
                weight,
                bits,
                what=f"bitsandbytes dequantize {name}",
                **about,
            )

        def decoded_right(made: Any = made, expected: torch.Tensor = expected) -> bool:
            found = made.dequantize(torch.bfloat16)
            # the mean that nested scales are taken from is added up in another order there, so weights may differ in
            # the last of bf16's 8 bits
            return bool((found - expected).abs().max() <= 2**-8 * expected.abs().max())

        run.measure_conversion(
            lambda i, config=config: tuckaway.quantize(weight, config).codes,
            right,
            weight,
            bits,
            what=f"quantize {name}",
            **about,
        )
        run.measure_conversion(
            lambda i, made=made: made.dequantize(torch.bfloat16),
            decoded_right,
            weight,
            bits,
            what=f"dequantize {name}",
            **about,
        )


def weight_only_int8(run: Run) -> None:
    rows, cols = WEIGHT_ONLY_SHAPE
    config = tuckaway.QuantizationConfig(format="int8", int8_threshold=None, compute_dtype=None)
    ours = [
        tuckaway.quantize(torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * 0.02, config)
        for _ in range(2)
    ]
    decoded = ours[0].dequantize(torch.float32)
    for m in (1, 16):
        x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
        run.measure(
            lambda i, x=x: F.linear(x, ours[i % 2]),
            x,
            decoded,
            WRONG,
            bits=8,
            what="int8 weights alone",
            shape=[rows, cols],
        )


def int8(run: Run) -> None:
    bnb = peer()
    rows, cols = INT8_SHAPE
    about = {"shape": [rows, cols]}
    copies = math.ceil(CACHE / (rows * cols))

    def activations(m: int, dtype: torch.dtype, outliers: bool) -> torch.Tensor:
        x = torch.randn(m, cols, device="cuda", dtype=dtype)
        if outliers:
            x[:, ::400] *= 20
        return x

    weights = [torch.randn(rows, cols, device="cuda", dtype=torch.float16) * 0.02 for _ in range(copies)]
    for m in INT8_BATCHES:
        x = activations(m, torch.float16, False)
        run.measure(
            lambda i, x=x: F.linear(x, weights[i % copies]),
            x,
            weights[0],
            WRONG,
            bits=16,
            what="fp16",
            **about,
        )
    for threshold in (None, 6.0):
        config = tuckaway.QuantizationConfig(format="int8", int8_threshold=threshold, compute_dtype=None)
        ours = [tuckaway.quantize(w, config) for w in weights]
        decoded = ours[0].dequantize(torch.float32)
        name = "int8 weights alone" if threshold is None else "LLM.int8(), threshold 6"
        limit = WRONG if threshold is None else WRONG_INT8
        for m in INT8_BATCHES:
            x = activations(m, torch.bfloat16 if threshold is None else torch.float16, threshold is not None)
            run.measure(
                lambda i, x=x, ours=ours: F.linear(x, ours[i % copies]),
                x,
                decoded,
                limit,
                bits=8,
                rate=1.0 if threshold is None else 2.0,
                what=name,
                **about,
            )
    if bnb is None:
        return
    modules = []
    for w in weights:
        module = bnb.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False, threshold=6.0)
        module.weight = bnb.nn.Int8Params(w.cpu(), requires_grad=False, has_fp16_weights=False)
        modules.append(module.cuda())
        if len(modules) == 4:  # 67 MB: past the cache
            break
    for m in INT8_BATCHES:
        x = activations(m, torch.float16, True)
        # it asks the GPU which columns are outliers
        with torch.no_grad():
            row: dict[str, Any] = {**about, "what": "bitsandbytes LLM.int8(), threshold 6, eager", "m": m}
            row["error"] = error(modules[0](x), x, weights[0])
            row["us"] = eager_microseconds(lambda i, x=x: modules[i % len(modules)](x), 20)
            run.add(row)


def host(run: Run) -> None:
    """Time eager calls on a weight so small that the GPU keeps up."""
    bnb = peer()
    rows = cols = 512
    for dtype, what in ((torch.bfloat16, "nf4"), (torch.bfloat16, "nf4 nested"), (torch.float16, "int8")):
        x = torch.randn(1, cols, device="cuda", dtype=dtype)
        weight = torch.randn(rows, cols, device="cuda", dtype=dtype)
        linear = torch.nn.Linear(cols, rows, bias=False, device="cuda", dtype=dtype)
        calls: dict[str, Callable[[], torch.Tensor]] = {"nn.Linear": lambda linear=linear, x=x: linear(x)}
        config = tuckaway.QuantizationConfig(
            format=what.split()[0], nested=what.endswith("nested"), compute_dtype=None
        )
        ours = tuckaway.quantize(weight, config)
        calls[what] = lambda x=x, ours=ours: F.linear(x, ours)
        if bnb is not None and what != "int8":
            codes, state = bnb.functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=what.endswith("nested")
            )
            calls[f"bitsandbytes {what}"] = lambda x=x, c=codes, s=state: bnb.matmul_4bit(x, c.t(), s)
        elif bnb is not None:
            module = bnb.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False, threshold=6.0)
            module.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
            calls["bitsandbytes int8"] = module.cuda()
            calls["bitsandbytes int8"] = lambda x=x, module=module: module(x)
        for name, call in calls.items():
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    run.add({"host_us": host_microseconds(call), "what": name, "m": 1, "grad_mode": grad})


PARTS = {part.__name__: part for part in (host, conversions, int8, weight_only_int8, four_bit, int4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=150, help="nothing new is begun after this many")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peers", type=Path, help="a folder with bitsandbytes unpacked in it")
    options = parser.parse_args()
    if options.peers is not None:
        sys.path.insert(0, str(options.peers))
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    run = Run(options.seconds)
    for name in options.only:
        with torch.no_grad():
            PARTS[name](run)
        save("kernels", {"results": run.results, "not_measured_for_want_of_time": run.late}, options.out)
    print(f"{len(run.results)} results, {run.late} left out for want of time")


if __name__ == "__main__":
    main()
