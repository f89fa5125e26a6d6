"""Compile the kernels that run on Hopper alone, on any machine; what came of it as JSON.

A program of its own, because Triton's compiler reports on standard error, when a process ends, what it has not freed.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from tuckaway_kernels.linear_4bit.wgmma import TILE, order_turns_kernel, wgmma_kernel

HOPPER = GPUTarget("cuda", 90, 32)
PRODUCTS = [(4, 64, 4, 4, False), (4, 128, 3, 2, True), (8, 256, 4, 1, False)]
"""Warps, rows of x, places of the ring, parts, fp4."""


def product(warps: int, tile_m: int, stages: int, split: int, fp4: bool) -> dict[str, Any]:
    pointers = {"powers": "*fp32", "codes": "*i32", "scales": "*fp32", "bias": "*bf16"}
    pointers["out"] = "*bf16" if split == 1 else "*fp32"
    signature = {"x": f"tensordesc<fp16{[tile_m, 64]},{TILE!r}>", **pointers}
    signature |= dict.fromkeys(("m", "rows", "cols", "share"), "i32")
    fixed = {"WARPS": warps, "M": tile_m, "STAGES": stages, "BLOCKSIZE": 64, "SPLIT": split}
    fixed |= {"BIAS": True, "FP4": fp4, "OVERLAP": True}
    names = wgmma_kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if name != "x"}
    source = GluonASTSource(
        wgmma_kernel, signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed, attrs=aligned
    )
    compiled = compile_kernel(source, target=HOPPER, options={"num_warps": warps, "launch_pdl": True})
    assembly = compiled.asm["ptx"]
    return {
        "warps": warps,
        "tile_m": tile_m,
        "products": assembly.count(f"wgmma.mma_async.sync.aligned.m64n{tile_m}k16.f32.f16.f16"),
        "wide_loads": assembly.count("ld.global.v4.b32"),
        "shared": compiled.metadata.shared,
    }


def order(once: bool) -> bool:
    """Return whether the launch behind it may begin early."""
    signature = {"x": "*bf16", "ordered": "*fp16", "powers": "*fp32", "m": "i32", "cols": "i32"}
    fixed = {"COLUMNS": 8192, "ONCE": once, "OVERLAP": True}
    source = ASTSource(order_turns_kernel, signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    compiled = compile_kernel(source, target=HOPPER, options={"num_warps": 8})
    assembly: str = compiled.asm["ptx"]
    return assembly.index("griddepcontrol.wait") < assembly.index("griddepcontrol.launch_dependents")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({"products": [product(*p) for p in PRODUCTS], "orders": [order(True), order(False)]}))
