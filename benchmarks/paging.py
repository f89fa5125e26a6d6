"""Decoding with a Llama-7B-shaped model whose layers lie in RAM or on disk; accelerate and bitsandbytes beside it.

    python benchmarks/paging.py FOLDER [--seconds 280] [--only bf16 nf4 disk gpt2] [--peers accelerate bitsandbytes]
    python benchmarks/paging.py FOLDER --layers 2 --hidden 128 --intermediate 256   # a trial anywhere

Batch 1, random weights made on the device, embeddings, final norm and head resident. Every case first decodes a few
tokens whose logits must be the resident model's bit for bit; only then is it timed. ``captured`` is a hand-written
step with a static cache in a :class:`tuckaway.paging.CapturedStep`; ``eager`` the same step without graphs;
``generate`` is transformers' own. ``of_bus`` and ``of_disk`` compare the bytes that a token needs with what plain
copies, or plain reads by the same threads, reach in the same process. Cold: read with ``O_DIRECT`` after the page
cache let go of the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save

import tuckaway
from tuckaway.paging import CapturedStep, paging_of
from tuckaway.paging.arena import host_memory
from tuckaway.paging.fill import Fill

LENGTH = 256
CHECKED = 4
"""Tokens whose logits are compared before anything is timed."""
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PLACE = 0 if CUDA else "cpu"


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def build(layers: int, hidden: int, intermediate: int) -> torch.nn.Module:
    """Make the model in bf16 with random weights, all on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


class Decode:
    """One token after the other: everything it reads and writes stays where it is."""

    def __init__(self, model: Any) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        self.token = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
        self.position = torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.places = torch.arange(LENGTH, device=DEVICE)

    def reset(self) -> None:
        """Begin anew."""
        self.cache.reset()
        self.token.fill_(1)
        self.position.zero_()

    def __call__(self) -> torch.Tensor:
        """Return the logits of one token, and put the next one in its place."""
        inner = self.model.model
        x = inner.embed_tokens(self.token)
        rotary = inner.rotary_emb(x, position_ids=self.position[None])
        mask = (self.places <= self.position)[None, None, None]
        for layer in inner.layers:
            x = layer(
                x,
                attention_mask=mask,
                position_ids=self.position[None],
                past_key_values=self.cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        logits: torch.Tensor = self.model.lm_head(inner.norm(x))
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits


def first_logits(decode: Decode, step: Callable[[], torch.Tensor], count: int = CHECKED) -> torch.Tensor:
    decode.reset()
    return torch.stack([step().clone() for _ in range(count)])


def timed(step: Callable[[], Any], count: int) -> float:
    """Return seconds a call."""
    sync()
    began = time.perf_counter()
    for _ in range(count):
        step()
    sync()
    return (time.perf_counter() - began) / count


class Bench:
    """Runs cases until the time is over and collects their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.results: dict[str, Any] = {}
        self.wanted: dict[str, torch.Tensor] = {}

    def lacks(self, name: str, needs: float) -> bool:
        """Tell, and note, that fewer than ``needs`` seconds are left for a case."""
        if time.monotonic() + needs <= self.end:
            return False
        self.results[name] = {"error": f"{needs} s were not left"}
        print(name, self.results[name], flush=True)
        return True

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Collect what a case finds; an error is a result too."""
        result: dict[str, Any] = {}
        began = time.monotonic()
        try:
            yield result
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        result["case_seconds"] = round(time.monotonic() - began, 1)
        self.results[name] = result
        print(name, json.dumps(result), flush=True)
        gc.collect()

    def decode(
        self,
        result: dict[str, Any],
        kind: str,
        model: Any,
        *,
        tokens: int,
        captured: bool,
        checked: int = CHECKED,
    ) -> None:
        """Check and time one way of decoding."""
        with torch.no_grad():
            decode = Decode(model)
            step: Any = CapturedStep(model, decode, warmup=min(2, checked)) if captured and CUDA else decode
            logits = first_logits(decode, step, checked)
            format = kind.split()[0]
            if format not in self.wanted:
                self.wanted[format] = logits
            if not torch.equal(logits, self.wanted[format][:checked]):
                raise AssertionError(f"{kind}: the logits are not the resident model's")
            seconds = timed(step, tokens)
        result["captured" if captured else "eager"] = round(1 / seconds, 3)
        self.rates(result, model, seconds, "captured" if captured else "eager")

    def rates(self, result: dict[str, Any], model: Any, seconds: float, way: str) -> None:
        """Add what was reached of the bus and of the disk."""
        paging = paging_of(model)
        if paging is None:
            return
        for home, limit in (("cpu", "bus"), ("disk", "disk")):
            nbytes = sum(page.unit.layout.nbytes for page in paging.pages if page.unit.home == home)
            if nbytes:
                rate = nbytes / seconds
                result[f"{way}_{home}_gb_s"] = round(rate / 1e9, 2)
                if f"{limit}_gb_s" in result:
                    result[f"{way}_of_{limit}"] = round(rate / 1e9 / result[f"{limit}_gb_s"], 3)


def bus(model: Any) -> float:
    """Return GB/s of plain copies of a model's CPU pages."""
    paging = paging_of(model)
    if not CUDA or paging is None:
        return 0.0
    arena = paging.homes.arena
    pages = [arena.page(index) for index in range(min(len(arena.layouts), 16))]
    targets = [torch.empty_like(max(pages, key=len), device=DEVICE) for _ in range(2)]

    def copy() -> None:
        for number, page in enumerate(pages):
            targets[number % 2][: len(page)].copy_(page, non_blocking=True)

    copy()
    return round(sum(map(len, pages)) / timed(copy, 2) / 1e9, 2)


def disk(model: Any, count: int) -> float:
    """Return GB/s of plain reads of a model's first disk pages by the threads that page."""
    homes = paging_of(model).homes
    reader, threads = homes.store.reader, homes.store.threads()
    local, around = threading.local(), [reader.goes_around(index) for index in range(count)]

    def read(index: int, number: int) -> None:
        if not hasattr(local, "memory"):
            local.memory = host_memory(reader.cell)
        reader.read(index, number, local.memory, around=around[index])

    work = [(i, n) for i in range(min(count, len(homes.store.layouts))) for n in range(len(reader.cells(i)))]
    fill = Fill()
    fill.expect(len(work))
    began = time.perf_counter()
    threads.submit(*(partial(fill.piece, partial(read, *item)) for item in work))
    fill.result()
    nbytes = sum(reader.cells(i)[n][1] for i, n in work)
    return round(nbytes / (time.perf_counter() - began) / 1e9, 2)


def generate(result: dict[str, Any], model: Any, tokens: int) -> None:
    ids = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=3, **options)
    seconds = timed(lambda: model.generate(ids, max_new_tokens=tokens, **options), 1) / tokens
    result["generate"] = round(1 / seconds, 3)


def prefill(result: dict[str, Any], model: Any, compute: float, length: int) -> None:
    """Time a prompt; the part of the shorter of copying and computing that the longer one hides."""
    ids = torch.arange(length, device=DEVICE)[None] % 32000
    nbytes = sum(page.unit.layout.nbytes for page in paging_of(model).pages)

    def run() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1)

    run()
    seconds = timed(run, 3)
    copying = nbytes / 1e9 / result["bus_gb_s"] if result.get("bus_gb_s") else 0.0
    result |= {
        "prefill_ms": round(1e3 * seconds, 2),
        "prefill_computing_ms": round(1e3 * compute, 2),
        "prefill_copying_ms": round(1e3 * copying, 2),
    }
    if copying:
        hidden = (copying + compute - seconds) / min(copying, compute)
        result["prefill_overlapped"] = round(hidden, 3)
        result |= profile(run)


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Return, from the device's own record, how much of the copies ran while something computed, and the reverse."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        sync()
    copies, kernels = [], []
    for event in recorded.events():
        span = (event.time_range.start, event.time_range.end)
        (copies if "HtoD" in event.name else kernels).append(span)
    copies, kernels = merged(copies), merged(kernels)
    both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in copies for b in kernels)
    copying, computing = (sum(end - start for start, end in spans) for spans in (copies, kernels))
    return {
        "profile_copying_ms": round(copying / 1e3, 2),
        "profile_computing_ms": round(computing / 1e3, 2),
        "profile_overlapped": round(both / max(min(copying, computing), 1e-9), 3),
    }


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def placed(model: Any, where: str, folder: Path, resident: int = 0, slots: int = 2) -> Any:
    """Put a model's layers, but for the first ``resident``, into RAM or on disk."""
    count = len(model.model.layers)
    device_map = {
        "model.embed_tokens": PLACE,
        "model.norm": PLACE,
        "lm_head": PLACE,
        "model.rotary_emb": PLACE,
    }
    device_map |= {f"model.layers.{i}": PLACE if i < resident else where for i in range(count)}
    return tuckaway.dispatch_model(
        model,
        device_map,
        main_device=PLACE,
        offload_dir=folder,
        no_split_module_classes=["LlamaDecoderLayer"],
        slots=slots,
    )


def quantized(model: Any) -> Any:
    config = tuckaway.QuantizationConfig(format="nf4", compute_dtype="bf16")
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = tuckaway.quantize(module.weight.detach(), config)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            del weight
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return model


def unquantized(bench: Bench, model: Any, folder: Path) -> None:
    with bench.case("bf16 resident") as result:
        bench.decode(result, "bf16 resident", model, tokens=8, captured=False)
        bench.decode(result, "bf16 resident", model, tokens=16, captured=True)
    with bench.case("bf16 cpu") as result:
        began = time.perf_counter()
        placed(model, "cpu", folder)
        result["dispatch_seconds"] = round(time.perf_counter() - began, 2)
        host_bytes(result, model)
        result["bus_gb_s"] = bus(model)
        bench.decode(result, "bf16 cpu", model, tokens=8, captured=True)
        bench.decode(result, "bf16 cpu", model, tokens=4, captured=False)
    tuckaway.materialize(model)
    if "accelerate" in bench.options.peers and not bench.lacks("accelerate, bf16 cpu", 20):
        with bench.case("accelerate, bf16 cpu") as result:
            accelerate_hooks(bench, result, model)


def host_bytes(result: dict[str, Any], model: Any) -> None:
    paging = paging_of(model)
    arena = paging.homes.arena
    if arena is not None:
        exact = sum(item.nbytes for layout in arena.layouts for item in layout.items)
        result |= {"pinned": arena.pinned, "host_over_exact": round(arena.nbytes / exact, 5)}


def accelerate_hooks(bench: Bench, result: dict[str, Any], model: Any) -> None:
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    device_map = {
        "model.embed_tokens": PLACE,
        "model.norm": PLACE,
        "lm_head": PLACE,
        "model.rotary_emb": PLACE,
    }
    device_map |= {f"model.layers.{i}": "cpu" for i in range(len(model.model.layers))}
    began = time.perf_counter()
    model.model.layers.to("cpu")  # it pages from where the weights are
    dispatch_model(model, device_map, main_device=PLACE)
    result["dispatch_seconds"] = round(time.perf_counter() - began, 2)
    try:
        decode = Decode(model)
        with torch.no_grad():
            decode()
            result["eager"] = round(1 / timed(decode, 2), 3)
    finally:
        remove_hook_from_submodules(model)
        for name in ("to", "cuda"):
            model.__dict__.pop(name, None)
        model.to(DEVICE)


def bitsandbytes_offload(bench: Bench, model: Any, folder: Path) -> None:
    """Time transformers' own: what it offloads stays in bf16."""
    with bench.case("transformers + bitsandbytes, nf4, layers on the cpu") as result:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        tuckaway.save_model(model, folder / "bf16")
        model.config.save_pretrained(folder / "bf16")
        device_map = {"model.embed_tokens": 0, "model.norm": 0, "lm_head": 0, "model.rotary_emb": 0}
        device_map |= {f"model.layers.{i}": "cpu" for i in range(len(model.model.layers))}
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_enable_fp32_cpu_offload=True,
        )
        peer = AutoModelForCausalLM.from_pretrained(
            folder / "bf16", quantization_config=config, device_map=device_map, dtype=torch.bfloat16
        )
        decode = Decode(peer)
        with torch.no_grad():
            decode()
            result["eager"] = round(1 / timed(decode, 2), 3)


def nf4_resident(bench: Bench, model: Any, length: int) -> float:
    """Return the seconds that computing a prompt takes."""
    ids = torch.arange(length, device=DEVICE)[None] % 32000

    def prompt() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1)

    compute = 0.0
    with bench.case("nf4 resident") as result:
        bench.decode(result, "nf4 resident", model, tokens=16, captured=False)
        bench.decode(result, "nf4 resident", model, tokens=32, captured=True)
        generate(result, model, 12)
        prompt()
        compute = timed(prompt, 3)
        result["prefill_ms"] = round(1e3 * compute, 2)
    return compute


def nf4(bench: Bench, model: Any, folder: Path, compute: float, length: int) -> None:
    with bench.case("nf4 cpu") as result:
        began = time.perf_counter()
        placed(model, "cpu", folder)
        result["dispatch_seconds"] = round(time.perf_counter() - began, 2)
        host_bytes(result, model)
        result["bus_gb_s"] = bus(model)
        bench.decode(result, "nf4 cpu", model, tokens=32, captured=True)
        bench.decode(result, "nf4 cpu", model, tokens=16, captured=False)
        generate(result, model, 16)
        prefill(result, model, compute, length)
    tuckaway.materialize(model)
    with bench.case("nf4 half on the cpu") as result:
        placed(model, "cpu", folder, resident=len(model.model.layers) // 2)
        result["bus_gb_s"] = bus(model)
        bench.decode(result, "nf4 half", model, tokens=32, captured=True)
        bench.decode(result, "nf4 half", model, tokens=8, captured=False)
    tuckaway.materialize(model)


def nf4_disk(bench: Bench, model: Any, folder: Path, slots: int) -> None:
    with bench.case(f"nf4 disk, {slots} slots") as result:
        began = time.perf_counter()
        placed(model, "disk", folder / f"pages{slots}", slots=slots)
        result["dispatch_seconds"] = round(time.perf_counter() - began, 2)
        store = paging_of(model).homes.store
        count = len(store.layouts)
        result["first_read_gb_s"] = disk(model, count)  # checksums included
        result["disk_gb_s"] = disk(model, count)
        bench.decode(result, "nf4 disk", model, tokens=24, captured=True)
        bench.decode(result, "nf4 disk", model, tokens=8, captured=False)
    if slots > 2:
        tuckaway.materialize(model)
        return
    with bench.case("nf4 disk, cold") as result:
        store.reader.direct = True
        descriptor = os.open(store.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        result["disk_gb_s"] = disk(model, min(count, 12))
        bench.decode(result, "nf4 disk", model, tokens=3, captured=True, checked=1)
    tuckaway.materialize(model)


def gpt2_xl(bench: Bench, folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from gpt2_xl import GUIDE_MAP
    from mingpt_gpt2 import GPT, SIZES

    with bench.case("gpt2-xl int8, the guide's map") as result, torch.no_grad():
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = GPT(*SIZES["gpt2-xl" if CUDA else "tiny"]).eval()
        config = tuckaway.QuantizationConfig(format="int8", compute_dtype="fp16")
        model = tuckaway.load_and_quantize_model(model, config, device_map={"": PLACE})
        token = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
        want = model(token).clone()
        device_map = GUIDE_MAP if CUDA else {k: v if v == "disk" else "cpu" for k, v in GUIDE_MAP.items()}
        tuckaway.dispatch_model(
            tuckaway.materialize(model),
            device_map,
            PLACE,
            folder / "gpt2",
            no_split_module_classes=["Block"],
        )
        for way in ("eager", "captured"):
            step: Any = (
                (lambda: model(token))
                if way == "eager" or not CUDA
                else CapturedStep(model, lambda: model(token))
            )
            for _ in range(3):
                if not torch.equal(step(), want):
                    raise AssertionError("the logits are not the resident model's")
            result[f"{way}_token_ms"] = round(1e3 * timed(step, 8), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the disk that is measured")
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--only", nargs="*", default=["bf16", "nf4", "disk", "gpt2"])
    parser.add_argument("--peers", nargs="*", default=[], choices=["accelerate", "bitsandbytes"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        results = run(options, Path(scratch))
    print(save("paging", results, options.out))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = Bench(options)
    model = build(options.layers, options.hidden, options.intermediate)
    if "bf16" in options.only:
        unquantized(bench, model, folder)
    if "bitsandbytes" in options.peers and not bench.lacks("transformers + bitsandbytes", 45):
        bitsandbytes_offload(bench, model, folder)
    quantized(model)
    compute = nf4_resident(bench, model, options.prompt)
    if "nf4" in options.only:
        nf4(bench, model, folder, compute, options.prompt)
    if "disk" in options.only:
        nf4_disk(bench, model, folder, 2)
        if not bench.lacks("nf4 disk, 4 slots", 12):
            nf4_disk(bench, model, folder, 4)
    del model
    gc.collect()
    if "gpt2" in options.only and not bench.lacks("gpt2-xl int8, the guide's map", 12):
        gpt2_xl(bench, folder)
    return bench.results


if __name__ == "__main__":
    main()
