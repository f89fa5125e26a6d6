"""GPT-2 XL in minGPT's layout: load time, GPU and host memory, logits by placement; accelerate + bitsandbytes too.

    python benchmarks/gpt2_xl.py CHECKPOINT_FOLDER [--peers] [--cold] [--out FOLDER]

The checkpoint is written by ``benchmarks/material.py``. Every case runs in a process of its own, so that no case finds
memory or caches of another. ``bytes_gpu`` is what tensors take (``memory_allocated``), ``peak_gpu`` its maximum while
loading. ``first_seconds`` is the load that memory was watched in, kernels not yet compiled for its shapes;
``seconds`` a second one in the same process. Warm: the files were read once before. Cold: their pages were dropped from
the page cache first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, PeakHost, save

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

GUIDE_MAP = {
    "transformer.wte": 0,
    "transformer.wpe": 0,
    "transformer.drop": 0,
    "transformer.h": "cpu",
    "transformer.ln_f": "disk",
    "lm_head": "disk",
}
"""The device map of accelerate's guide on quantization."""

CASES: dict[str, dict[str, Any]] = {
    "nf4 nested": {"format": "nf4"},
    "nf4 nested, embeddings and head too": {"format": "nf4", "quantize_embeddings": True, "skip_modules": []},
    "int8": {"format": "int8", "compute_dtype": "fp16"},
    "int8, embeddings and head too": {
        "format": "int8",
        "compute_dtype": "fp16",
        "quantize_embeddings": True,
        "skip_modules": [],
    },
    "nf4 nested, the guide's map": {"format": "nf4", "device_map": GUIDE_MAP},
    "int8, the guide's map": {"format": "int8", "compute_dtype": "fp16", "device_map": GUIDE_MAP},
    "nf4 nested, all on disk": {"format": "nf4", "device_map": {"": "disk"}, "main_device": 0},
    "nf4 nested, all on CPU": {"format": "nf4", "device_map": {"": "cpu"}, "main_device": 0},
}
PEERS = {"accelerate + bitsandbytes, nf4 nested": "nf4", "accelerate + bitsandbytes, int8": "int8"}


def warm_up_gpu(config: dict[str, Any]) -> None:
    """Bring up the GPU and Triton's kernels, which are not what is measured."""
    import tuckaway

    for dtype in (torch.bfloat16, torch.float16):
        weight = tuckaway.quantize(
            torch.randn(256, 1600, device="cuda", dtype=dtype), tuckaway.QuantizationConfig(**config)
        )
        weight.dequantize()
    torch.cuda.synchronize()
    del weight
    torch.cuda.empty_cache()


def ours(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    from mingpt_gpt2 import GPT, SIZES

    import tuckaway

    case = dict(case)
    place = {key: case.pop(key) for key in ("device_map", "main_device") if key in case}
    warm_up_gpu(case)

    def load(scratch: str) -> tuple[torch.nn.Module, float]:
        with tuckaway.init_empty_weights():
            model = GPT(*SIZES["gpt2-xl"])
        began = time.perf_counter()
        model = tuckaway.load_and_quantize_model(
            model.eval(),
            tuckaway.QuantizationConfig(**case),
            weights_location=folder,
            no_split_module_classes=["Block"],
            offload_folder=scratch,
            progress=False,
            **place,
        )
        torch.cuda.synchronize()
        return model, time.perf_counter() - began

    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with PeakHost() as host:
            model, first_seconds = load(scratch)
        result = {
            "first_seconds": round(first_seconds, 3),
            "bytes_gpu": torch.cuda.memory_allocated(),
            "peak_gpu": torch.cuda.max_memory_allocated(),
            "footprint": tuckaway.memory_footprint(model, by_device=True),
            "private_peak_host": host.peak - host.start,
        }
        result |= run(model)
        tuckaway.materialize(model)
    del model
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(
        dir=folder.parent
    ) as scratch:  # Triton's kernels compiled, nobody watching
        model, seconds = load(scratch)
        tuckaway.materialize(model)
    return {"seconds": round(seconds, 3)} | result


def accelerate_bitsandbytes(folder: Path, format: str) -> dict[str, Any]:
    sys.path.insert(0, ".peers")
    import bitsandbytes
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
    from mingpt_gpt2 import GPT, SIZES

    torch.zeros(1, device="cuda")
    bitsandbytes.functional.quantize_4bit(torch.randn(64, 64, device="cuda"))
    options = (
        {"load_in_8bit": True, "llm_int8_threshold": 6}
        if format == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    with init_empty_weights():
        model = GPT(*SIZES["gpt2-xl"])
    model.eval()
    torch.cuda.reset_peak_memory_stats()
    with PeakHost() as host:
        began = time.perf_counter()
        model = load_and_quantize_model(
            model,
            weights_location=str(folder),
            bnb_quantization_config=BnbQuantizationConfig(**options),
            device_map="auto",
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "bytes_gpu": torch.cuda.memory_allocated(),
        "peak_gpu": torch.cuda.max_memory_allocated(),
        "private_peak_host": host.peak - host.start,
    } | run(model)


@torch.no_grad()
def run(model: torch.nn.Module) -> dict[str, Any]:
    """Return a digest of the logits of fixed tokens, and the time of one more token."""
    tokens = torch.arange(1, 65, device="cuda")[None] * 700
    logits = model(tokens)
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        model(tokens[:, :1])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    values = logits[0, -1].float()
    digest = (
        logits.contiguous()
        .view(torch.uint8)
        .long()
        .mul(torch.arange(1, 1 + logits.nbytes, device="cuda").view(*logits.shape[:-1], -1) % 8191)
        .sum()
    )
    return {
        "logits_digest": int(digest),
        "logits_std": float(values.std()),
        "logits_head": [round(float(v), 4) for v in values[:4]],
        "token_ms": round(1e3 * sorted(times)[2], 2),
    }


def read_once(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--case")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.case is not None:
        peer = PEERS.get(options.case)
        result = (
            accelerate_bitsandbytes(options.folder, peer)
            if peer
            else ours(options.folder, CASES[options.case])
        )
        print("RESULT " + json.dumps(result))
        return
    results: dict[str, Any] = {}
    read_once(options.folder)
    for case in [*CASES, *(PEERS if options.peers else ())]:
        if options.only and not any(word in case for word in options.only):
            continue
        for state in ("warm", "cold") if options.cold else ("warm",):
            if state == "cold":
                drop_from_page_cache(options.folder)
            command = [sys.executable, __file__, str(options.folder), "--case", case]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            result = json.loads(line[7:]) if line else {"error": done.stderr[-1500:].splitlines()}
            results[f"{case} ({state})"] = result
            print(case, state, result, flush=True)
            if state == "cold":
                read_once(options.folder)
    print(save("gpt2_xl", results, options.out))


if __name__ == "__main__":
    main()
