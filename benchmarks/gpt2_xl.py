"""GPT-2 XL in minGPT's layout: load time, GPU and host memory, logits by placement; accelerate + bitsandbytes too.

    python benchmarks/gpt2_xl.py CHECKPOINT_FOLDER [--peers] [--cold] [--budget 600] [--out FOLDER] [--miniature]

The checkpoint is written by ``benchmarks/material.py``. The JSON is written after every case; with ``--miniature`` the
script is tried on a tiny model, which it saves in the folder first, on a CPU too.

Every case runs in a process of its own: none finds memory or caches of another. ``bytes_gpu`` is what tensors
take (``memory_allocated``), ``peak_gpu`` its maximum while loading. ``first_seconds`` is the load that memory was
watched in, kernels not yet compiled for its shapes; ``seconds`` a second one in the same process. Warm: the files were
read once before. Cold: their pages were dropped from the page cache first.
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
from common import RESULTS, Journal, PeakHost
from timing import device, synchronize

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
            torch.randn(256, 1600, device=device(), dtype=dtype), tuckaway.QuantizationConfig(**config)
        )
        weight.dequantize()
    synchronize()
    del weight
    empty_cache()


def empty_cache() -> None:
    """Give back what torch keeps of the GPU's memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_memory() -> dict[str, int]:
    """Return what tensors take on the GPU, and the most that they took."""
    if not torch.cuda.is_available():
        return {}
    return {"bytes_gpu": torch.cuda.memory_allocated(), "peak_gpu": torch.cuda.max_memory_allocated()}


def placed(place: Any) -> Any:
    """Return a device map or device for this machine: without a GPU, the CPU takes its place."""
    if torch.cuda.is_available():
        return place
    if isinstance(place, dict):
        return {name: placed(where) for name, where in place.items()}
    return "cpu" if place == 0 else place


def ours(folder: Path, case: dict[str, Any], size: str) -> dict[str, Any]:
    from mingpt_gpt2 import GPT, SIZES

    import tuckaway

    case = dict(case)
    place = {key: placed(case.pop(key)) for key in ("device_map", "main_device") if key in case}
    warm_up_gpu(case)

    def load(scratch: str) -> tuple[torch.nn.Module, float]:
        with tuckaway.init_empty_weights():
            model = GPT(*SIZES[size])
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
        synchronize()
        return model, time.perf_counter() - began

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with PeakHost() as host:
            model, first_seconds = load(scratch)
        result = {
            "first_seconds": round(first_seconds, 3),
            **gpu_memory(),
            "footprint": tuckaway.memory_footprint(model, by_device=True),
            "private_peak_host": host.peak - host.start,
        }
        result |= run(model)
        tuckaway.materialize(model)
    del model
    empty_cache()
    with tempfile.TemporaryDirectory(
        dir=folder.parent
    ) as scratch:  # Triton's kernels compiled, nobody watching
        model, seconds = load(scratch)
        tuckaway.materialize(model)
    return {"seconds": round(seconds, 3)} | result


def accelerate_bitsandbytes(folder: Path, format: str, size: str) -> dict[str, Any]:
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
        model = GPT(*SIZES[size])
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
        **gpu_memory(),
        "private_peak_host": host.peak - host.start,
    } | run(model)


@torch.no_grad()
def run(model: torch.nn.Module) -> dict[str, Any]:
    """Return a digest of the logits of fixed tokens, and the time of one more token."""
    where = device()
    tokens = torch.arange(1, 65, device=where)[None] * 700 % model.transformer.wte.weight.shape[0]
    logits = model(tokens)
    synchronize()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        model(tokens[:, :1])
        synchronize()
        times.append(time.perf_counter() - began)
    values = logits[0, -1].float()
    digest = (
        logits.contiguous()
        .view(torch.uint8)
        .long()
        .mul(torch.arange(1, 1 + logits.nbytes, device=where).view(*logits.shape[:-1], -1) % 8191)
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


def measure(folder: Path, case: str, size: str, left: float) -> dict[str, Any]:
    """Run one case in a process of its own, for at most ``left`` seconds."""
    command = [sys.executable, __file__, str(folder), "--case", case, "--size", size]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    return json.loads(line[7:]) if line else {"failed": done.stderr[-1500:].splitlines()}


def run_case(folder: Path, case: str, size: str) -> None:
    """Measure one case in this process and print it."""
    peer = PEERS.get(case)
    result = accelerate_bitsandbytes(folder, peer, size) if peer else ours(folder, CASES[case], size)
    print("RESULT " + json.dumps(result))


def save_tiny(folder: Path) -> None:
    """Save a tiny model of this kind."""
    from mingpt_gpt2 import GPT, SIZES

    import tuckaway

    tuckaway.save_model(GPT(*SIZES["tiny"]), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; then nothing more is begun")
    parser.add_argument("--miniature", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="gpt2-xl", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.case is not None:
        run_case(options.folder, options.case, options.size)
        return
    if options.miniature:
        options.size = "tiny"
        save_tiny(options.folder)
    journal = Journal("gpt2_xl", options.budget, options.out)
    read_once(options.folder)
    for case in [*CASES, *(PEERS if options.peers else ())]:
        if options.only and not any(word in case for word in options.only):
            continue
        for state in ("warm", "cold") if options.cold else ("warm",):
            if state == "cold":
                drop_from_page_cache(options.folder)

            def measured(case: str = case) -> dict[str, Any]:
                return measure(options.folder, case, options.size, journal.left())

            journal.case({"case": case, "state": state}, measured, needs=10.0)
            if state == "cold":
                read_once(options.folder)
    print(journal.save())


if __name__ == "__main__":
    main()
