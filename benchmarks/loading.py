"""Loading, side by side: seconds, memory and bytes a second against what the machine can do, warm and cold.

    python benchmarks/loading.py [--scratch FOLDER] [--warm-scratch FOLDER] [--budget 500] [--miniature] [--out FOLDER]

Measures the machine first (disk, page cache, bus), writes a GPT-2-XL-shaped fp32 checkpoint (6.75 GB) and a
Llama-7B-shaped bf16 one (13.5 GB), and loads them: tuckaway to nf4 (nested) and int8, accelerate and transformers with
bitsandbytes to nf4, safetensors alone to the GPU; fastsafetensors and the Run:ai streamer where installed. Every case
has a process of its own and 100 seconds at the most; what it found is written when it ends, the
most wanted first.

``first_seconds``: the first load of a process, kernels not yet loaded. ``watched_seconds``: a second one, the ring
pinned anew, its memory watched. ``seconds``: the median of three more. ``host_bytes``: the peak of private resident
memory above what it was before; ``device_bytes``: the peak on the device above the final weights; ``reserved_bytes``:
what torch had asked the driver for at the most. Warm: the files are in the page cache. Cold: their pages were dropped
from it. Without a GPU only what runs on a CPU is measured; ``--miniature`` takes small checkpoints.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from common import RESULTS, Journal, PeakHost, in_process
from material import GPT2, LLAMA_7B, gpt2_tensors, llama_tensors, write_tiled

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

PIECE = 16 * 2**20
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def read_rate(folder: Path, threads: int, limit: int) -> float:
    """Return bytes a second of reading files in pieces into buffers that are used again, as the stream does."""
    buffers: SimpleQueue[Any] = SimpleQueue()
    for _ in range(threads):
        buffers.put(memoryview(torch.empty(PIECE, dtype=torch.uint8, pin_memory=GPU).numpy()))
    jobs, total = [], 0
    for path in shards_of(folder):
        fd = os.open(path, os.O_RDONLY)
        for offset in range(0, path.stat().st_size, PIECE):
            if total < limit:
                jobs.append((fd, offset))
                total += PIECE

    def read(job: tuple[int, int]) -> int:
        buffer = buffers.get()
        got = os.preadv(job[0], [buffer], job[1])
        buffers.put(buffer)
        return got

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(read, jobs))
    seconds = time.perf_counter() - began
    for fd in {fd for fd, _ in jobs}:
        os.close(fd)
    return done / seconds


def bus_rate() -> float:
    """Return bytes a second of copies from pinned memory to the GPU."""
    host = torch.empty(256 * 2**20, dtype=torch.uint8, pin_memory=True)
    device = host.to("cuda")
    synchronize()
    began = time.perf_counter()
    for _ in range(8):
        device.copy_(host, non_blocking=True)
    synchronize()
    return 8 * host.nbytes / (time.perf_counter() - began)


def machine(folder: Path) -> dict[str, float]:
    """Measure what bounds a load."""
    threads = max(1, min(14, (os.cpu_count() or 2) - 2))
    found = {f"page cache, {n} threads": read_rate(folder, n, 4 * 10**9) for n in {1, threads}}
    forget(folder)
    found["disk"] = read_rate(folder, threads, 2 * 10**9)
    if GPU:
        found["bus"] = bus_rate()
    read_rate(folder, threads, 10**12)  # warm again
    return {key: round(value) for key, value in found.items()}


def build_gpt2(small: bool) -> torch.nn.Module:
    from mingpt_gpt2 import GPT, SIZES

    import tuckaway

    size = (2, 12, 768, 50257, 1024) if small else SIZES["gpt2-xl"]
    with tuckaway.init_empty_weights(include_buffers=True):
        return GPT(*size).eval()


def llama_config(small: bool) -> Any:
    from transformers import LlamaConfig

    sizes = LLAMA_7B
    return LlamaConfig(
        hidden_size=512 if small else sizes["hidden"],
        intermediate_size=1024 if small else sizes["intermediate"],
        num_hidden_layers=4 if small else sizes["layers"],
        num_attention_heads=8 if small else sizes["heads"],
        vocab_size=sizes["vocabulary"],
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def build_llama(small: bool) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    import tuckaway

    with tuckaway.init_empty_weights():
        return LlamaForCausalLM(llama_config(small)).eval()


def one_load(build: Callable[[bool], Any], folder: Path, config: Any, small: bool) -> tuple[Any, float]:
    import tuckaway

    model = build(small)
    gc.collect()
    synchronize()
    began = time.perf_counter()
    model = tuckaway.load_and_quantize_model(model, config, weights_location=folder, progress=False)
    synchronize()
    return model, time.perf_counter() - began


def watched_load(build: Callable[[bool], Any], folder: Path, config: Any, small: bool) -> dict[str, Any]:
    """Load with an eye on memory; the ring is not there yet."""
    import tuckaway

    model = build(small)
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with PeakHost() as host:
        began = time.perf_counter()
        model = tuckaway.load_and_quantize_model(model, config, weights_location=folder, progress=False)
        synchronize()
        seconds = time.perf_counter() - began
    final = tuckaway.memory_footprint(model)
    result = {"watched_seconds": round(seconds, 3), "final_bytes": final}
    result["host_bytes"] = host.peak - host.start - (0 if GPU else final)
    if GPU:
        result["device_bytes"] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        result["on_device_bytes"] = torch.cuda.memory_allocated() - held[0]
        result["reserved_bytes"] = torch.cuda.max_memory_reserved() - held[1]
    return result


def measure(build: Callable[[bool], Any], folder: Path, config: Any, small: bool) -> dict[str, Any]:
    """Load again and again: first, watched, and three times for the clock."""
    first = one_load(build, folder, config, small)[1]
    result = {"first_seconds": round(first, 3)} | watched_load(build, folder, config, small)
    times = [one_load(build, folder, config, small)[1] for _ in range(3)]
    return result | {
        "seconds": round(statistics.median(times), 3),
        "all_seconds": [round(t, 3) for t in times],
    }


def ours_gpt2(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    import tuckaway

    torch.zeros(1, device=DEVICE)
    nf4 = tuckaway.QuantizationConfig()
    yield {"nf4": measure(build_gpt2, folder, nf4, small)}
    if GPU or small:
        yield {"int8": measure(build_gpt2, folder, tuckaway.QuantizationConfig(format="int8"), small)}
    forget(folder)
    yield {"nf4, cold": {"seconds": round(one_load(build_gpt2, folder, nf4, small)[1], 3)}}


def ours_llama(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    import tuckaway

    torch.zeros(1, device=DEVICE)
    yield {"nf4": measure(build_llama, folder, tuckaway.QuantizationConfig(), small)}
    yield {"int8": measure(build_llama, folder, tuckaway.QuantizationConfig(format="int8"), small)}


def ours_reload(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    from unittest import mock

    import tuckaway
    from tuckaway.checkpoint import Checkpoint
    from tuckaway.files import checksum, is_fast

    torch.zeros(1, device=DEVICE)
    build_llama(small)  # importing transformers is no part of a conversion
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "quantized"
        began = time.perf_counter()
        done = tuckaway.quantize_checkpoint(folder, target, tuckaway.QuantizationConfig())
        yield {
            "convert to nf4": {"seconds": round(time.perf_counter() - began, 3), "written_bytes": done.nbytes}
        }
        found = measure(build_llama, target, None, small)
        found |= {"checkpoint_bytes": done.nbytes, "crc32": "zlib-ng" if is_fast() else "zlib"}
        yield {"reload of nf4": found}
        with mock.patch.object(checksum, "_fastest", return_value=zlib.crc32):
            yield {"reload of nf4, zlib's crc32": reload(target, small) | {"checkpoint_bytes": done.nbytes}}
        opened = Checkpoint.open
        with mock.patch.object(
            Checkpoint, "open", lambda *a, **k: opened(*a, **{**k, "verify_checksums": False})
        ):
            yield {"reload of nf4, unverified": reload(target, small) | {"checkpoint_bytes": done.nbytes}}


def reload(folder: Path, small: bool) -> dict[str, Any]:
    times = [one_load(build_llama, folder, None, small)[1] for _ in range(3)]
    return {"seconds": round(statistics.median(times), 3)}


def accelerate_bitsandbytes(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    import bitsandbytes
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
    from mingpt_gpt2 import GPT, SIZES

    bitsandbytes.functional.quantize_4bit(torch.randn(64, 64, device=DEVICE))
    with init_empty_weights():
        model = GPT(*((2, 12, 768, 50257, 1024) if small else SIZES["gpt2-xl"])).eval()
    config = BnbQuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    yield peer(
        lambda: load_and_quantize_model(
            model, weights_location=str(folder), bnb_quantization_config=config, device_map="auto"
        )
    )


def transformers_bitsandbytes(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bitsandbytes.functional.quantize_4bit(torch.randn(64, 64, device=DEVICE))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    yield peer(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": 0 if GPU else "cpu"}
        )
    )


def safetensors_alone(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    from safetensors.torch import load_file

    torch.zeros(1, device=DEVICE)
    yield peer(lambda: [load_file(path, device=DEVICE) for path in shards_of(folder)])


def fastsafetensors(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    torch.zeros(1, device=DEVICE)

    def load() -> Any:
        loader = SafeTensorsFileLoader(SingleGroup(), torch.device(DEVICE, 0), nogds=True)
        loader.add_filenames({0: [str(path) for path in shards_of(folder)]})
        return loader.copy_files_to_device()

    yield peer(load)


def runai_streamer(folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    from runai_model_streamer import SafetensorsStreamer

    torch.zeros(1, device=DEVICE)

    def load() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in shards_of(folder)])
            return {name: tensor.to(DEVICE) for name, tensor in streamer.get_tensors()}

    yield peer(load)


def peer(load: Callable[[], Any]) -> dict[str, Any]:
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with PeakHost() as host:
        began = time.perf_counter()
        kept = load()
        synchronize()
        seconds = time.perf_counter() - began
    result = {"seconds": round(seconds, 3), "host_bytes": host.peak - host.start}
    if GPU:
        result["device_bytes"] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        result["on_device_bytes"] = torch.cuda.memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    del kept
    return result


Case = Callable[[Path, bool], Iterator[dict[str, Any]]]
CASES: dict[str, tuple[str, Case, str | None, bool]] = {
    "tuckaway, llama-7b": ("llama-7b", ours_llama, None, False),
    "tuckaway, gpt2-xl": ("gpt2-xl", ours_gpt2, None, False),
    "transformers + bitsandbytes, llama-7b, nf4": (
        "llama-7b",
        transformers_bitsandbytes,
        "bitsandbytes",
        False,
    ),
    "accelerate + bitsandbytes, gpt2-xl, nf4": ("gpt2-xl", accelerate_bitsandbytes, "bitsandbytes", True),
    "safetensors, gpt2-xl, fp32": ("gpt2-xl", safetensors_alone, None, False),
    "tuckaway, llama-7b, converted": ("llama-7b", ours_reload, None, False),
    "fastsafetensors, gpt2-xl, fp32": ("gpt2-xl", fastsafetensors, "fastsafetensors", True),
    "runai-model-streamer, gpt2-xl, fp32": ("gpt2-xl", runai_streamer, "runai_model_streamer", False),
}
"""Checkpoint, function, the package it needs, and whether it needs a GPU; the most wanted first."""
CASE_SECONDS = 100.0


def prepare(scratch: Path, warm_scratch: Path, small: bool) -> dict[str, Path]:
    """Write both checkpoints; only the first is read cold."""
    layers, _, width = GPT2["gpt2-xl"]
    folders = {"gpt2-xl": scratch / "gpt2-xl", "llama-7b": warm_scratch / "llama-7b"}
    gpt2 = list(gpt2_tensors(2, 768) if small else gpt2_tensors(layers, width))
    sizes = {**LLAMA_7B, "layers": 4, "hidden": 512, "intermediate": 1024, "heads": 8} if small else LLAMA_7B
    write_tiled(folders["gpt2-xl"], gpt2, torch.float32, 10**9)
    write_tiled(folders["llama-7b"], list(llama_tensors(**sizes)), torch.bfloat16, 5 * 10**9)
    config = {
        key: value for key, value in llama_config(small).to_dict().items() if key != "quantization_config"
    }
    (folders["llama-7b"] / "config.json").write_text(json.dumps(config, default=str))
    return folders


def with_rates(result: dict[str, Any], nbytes: int) -> dict[str, Any]:
    """Add bytes a second wherever there are seconds."""
    if "seconds" in result:
        size = result.get("checkpoint_bytes", nbytes)
        return result | {"bytes_per_second": round(size / result["seconds"])}
    return {
        key: with_rates(value, nbytes) if isinstance(value, dict) else value for key, value in result.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--warm-scratch", type=Path, help="for what is only read warm; may be in memory")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; then nothing more is begun")
    parser.add_argument("--miniature", action="store_true", help="small checkpoints, to try the script")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.case is not None:
        for found in CASES[options.case][1](options.folder, options.miniature):
            print("RESULT " + json.dumps(found), flush=True)
        return
    journal = Journal("loading", options.budget, options.out)
    warm_scratch = options.warm_scratch or options.scratch
    with (
        tempfile.TemporaryDirectory(dir=options.scratch) as scratch,
        tempfile.TemporaryDirectory(dir=warm_scratch) as warm,
    ):
        folders = prepare(Path(scratch), Path(warm), options.miniature)
        sizes = {name: sum(p.stat().st_size for p in shards_of(folder)) for name, folder in folders.items()}
        journal.add({"what": "checkpoints", "bytes": sizes})
        journal.case({"what": "machine"}, lambda: machine(folders["gpt2-xl"]))
        for name in CASES:
            measure_case(journal, name, folders, sizes, miniature=options.miniature)
    print(journal.save())


def measure_case(
    journal: Journal, name: str, folders: dict[str, Path], sizes: dict[str, int], *, miniature: bool
) -> None:
    """Run one case in a process of its own."""
    checkpoint, _, package, needs_gpu = CASES[name]
    if (needs_gpu and not GPU) or (package is not None and importlib.util.find_spec(package) is None):
        return
    arguments = ["--case", name, "--folder", str(folders[checkpoint]), *["--miniature"] * miniature]
    journal.case(
        {"what": name},
        lambda: with_rates(
            in_process("loading.py", arguments, min(CASE_SECONDS, journal.left())), sizes[checkpoint]
        ),
        20.0,
    )


if __name__ == "__main__":
    main()
