"""Decoding with a Llama-7B-shaped model whose layers lie in RAM or on disk; others beside it.

    python benchmarks/paging.py FOLDER [--budget 280] [--only nf4 disk half gpt2 bf16 peers] [--peers FOLDER]
    python benchmarks/paging.py FOLDER --miniature   # a trial anywhere

Batch 1, drawn weights, embeddings, final norm and head resident; greedy steps with a static cache, which choose their
token on the device. Every way of decoding first gives the logits of the fourth token after a prompt, which must be the
resident model's bit for bit; only then is it timed. *captured* is the step in a :class:`tuckaway.paging.CapturedStep`;
*eager* the same step without graphs; *generate* is transformers' own loop. ``of_bus`` and ``of_disk`` compare the bytes
that a token needs with what plain copies, or plain reads by as many threads, reach in the same process. Cold: read with
``O_DIRECT`` after the page cache let go of the file.

Every figure is written when it is known, the most wanted first. Peers run in processes of their own
(``paging_peers.py``), 60 seconds each at the most.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Journal, in_process
from decode import Step, after_steps, generate_rate, rate, repeatable_attention
from paging_peers import NEEDS, PEERS, device_map, made, place
from timing import device as the_device
from timing import synchronize

import tuckaway
from tuckaway.paging import CapturedStep, paging_of
from tuckaway.paging.arena import host_memory
from tuckaway.paging.threads import reading_thread_count

PARTS = ("nf4", "disk", "half", "gpt2", "bf16", "peers")
PEER_SECONDS = 60.0


class Bench:
    """One model, and the figures of every place its layers are put."""

    def __init__(self, journal: Journal, options: argparse.Namespace, format: str, folder: Path) -> None:
        self.journal, self.options, self.format, self.folder = journal, options, format, folder
        self.model = made(options, None if format == "bf16" else format)
        step = Step(self.model, the_device())
        self.expected = after_steps(step, step, None)
        self.computing: dict[str, float] = {}
        self.limits: dict[str, float] = {}

    def case(self, layers: str, what: str, measure: Callable[[], dict[str, Any]], needs: float = 5.0) -> None:
        """Record one figure."""
        self.journal.case({"format": self.format, "layers": layers, "what": what}, measure, needs)

    @contextmanager
    def placed(self, layers: str, where: str, *, resident: int = 0, slots: int = 2) -> Iterator[None]:
        """Put the layers, but for the first ``resident``, where they are to wait; bring them back at the end."""
        if not torch.cuda.is_available():
            where = "disk"  # what is in RAM is not paged there
        places = device_map(self.model, where) | {f"model.layers.{i}": place() for i in range(resident)}
        target = self.folder / f"{self.format}, {layers}"

        def dispatch() -> dict[str, Any]:
            began = time.perf_counter()
            tuckaway.dispatch_model(
                self.model,
                places,
                main_device=place(),
                offload_dir=target,
                no_split_module_classes=["LlamaDecoderLayer"],
                slots=slots,
            )
            return {"seconds": round(time.perf_counter() - began, 2)} | host_bytes(self.model)

        self.case(layers, "dispatch", dispatch, 10.0)
        self.limits = {}
        if paging_of(self.model) is None:
            raise RuntimeError("the layers were not placed")
        try:
            yield
        finally:
            if paging_of(self.model) is not None:
                tuckaway.materialize(self.model)
            gc.collect()

    def limit(self, layers: str, name: str, measure: Callable[[Any], float]) -> None:
        """Record what plain copies or reads reach, for the cases after it."""

        def measured() -> dict[str, Any]:
            self.limits[name] = measure(self.model)
            return {f"{name}_gb_s": self.limits[name]}

        self.case(layers, f"limit: {name}", measured, 2.0)

    def decode(self, layers: str, way: str, steps: int, needs: float = 8.0) -> None:
        """Check the logits and time one way of decoding."""

        def measured() -> dict[str, Any]:
            step = Step(self.model, the_device())
            captured = way == "captured" and torch.cuda.is_available()
            call: Any = CapturedStep(self.model, step, warmup=2) if captured else step
            if not torch.equal(after_steps(step, call, None), self.expected):
                return {"wrong": True}
            found = rate(step, call, seconds=0.1, steps=steps)
            return {"tokens_s": found} | self.reached(found)

        self.case(layers, f"step, {way}", measured, needs)

    def generate(self, layers: str) -> None:
        """Time transformers' own loop."""
        self.case(layers, "generate", lambda: generate_rate(self.model, the_device(), tokens=16, runs=2))

    def reached(self, tokens_s: float) -> dict[str, Any]:
        """Return what was reached of the bus and of the disk."""
        paging, found = paging_of(self.model), dict[str, Any]()
        for home, name in (("cpu", "bus"), ("disk", "disk")):
            pages = [] if paging is None else [p for p in paging.pages if p.unit.home == home]
            speed = sum(page.unit.layout.nbytes for page in pages) * tokens_s / 1e9
            if speed:
                found[f"{home}_gb_s"] = round(speed, 2)
                if self.limits.get(name):
                    found[f"of_{name}"] = round(speed / self.limits[name], 3)
        return found

    def prompts(self, layers: str) -> None:
        """Time a prompt in every way that this device has."""
        for way in ("eager", "captured") if torch.cuda.is_available() else ("eager",):
            self.prompt(layers, way)

    def prompt(self, layers: str, way: str) -> None:
        """Time a prompt: what of the shorter of copying and computing the longer one hides.

        Captured, the host is out of the way: in an eager prompt transformers' Python takes as long as the device.
        """

        def measured() -> dict[str, Any]:
            ids = torch.arange(self.options.prompt, device=the_device())[None] % 997
            paging = paging_of(self.model)
            nbytes = 0 if paging is None else sum(page.unit.layout.nbytes for page in paging.pages)

            def run() -> Any:
                with torch.no_grad():
                    return self.model(ids, use_cache=False, logits_to_keep=1)

            call: Any = CapturedStep(self.model, run, warmup=1) if way == "captured" else run
            call()
            seconds = timed(call, 3)
            row: dict[str, Any] = {"ms": round(1e3 * seconds, 2)}
            if paging is None:
                self.computing[way] = seconds
            elif self.limits.get("bus") and way in self.computing:
                copying, computing = nbytes / 1e9 / self.limits["bus"], self.computing[way]
                hidden = (copying + computing - seconds) / min(copying, computing)
                row |= {"copying_ms": round(1e3 * copying, 2), "overlapped": round(hidden, 3)}
            return row | (profile(call) if torch.cuda.is_available() else {})

        self.case(layers, f"prompt of {self.options.prompt}, {way}", measured)


def timed(call: Callable[[], Any], count: int) -> float:
    """Return seconds a call."""
    synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - began) / count


def host_bytes(model: Any) -> dict[str, Any]:
    """Return whether a model's pages in RAM are pinned, and their memory over their exact bytes."""
    arena = paging_of(model).homes.arena
    if arena is None:
        return {}
    exact = sum(item.nbytes for layout in arena.layouts for item in layout.items)
    return {"pinned": arena.pinned, "host_over_exact": round(arena.nbytes / exact, 5)}


def bus(model: Any) -> float:
    """Return GB/s of plain copies of a model's CPU pages."""
    arena = paging_of(model).homes.arena
    pages = [] if arena is None else [arena.page(index) for index in range(min(len(arena.layouts), 16))]
    if not pages:
        return 0.0
    targets = [torch.empty_like(max(pages, key=len), device=the_device()) for _ in range(2)]

    def copy() -> None:
        for number, page in enumerate(pages):
            targets[number % 2][: len(page)].copy_(page, non_blocking=True)

    copy()
    return round(sum(map(len, pages)) / timed(copy, 2) / 1e9, 2)


def disk(model: Any, most: int = 64) -> float:
    """Return GB/s of plain reads of a model's first disk pages, by as many threads as page."""
    reader, count = (store := paging_of(model).homes.store).reader, min(most, len(store_layouts(model)))
    around = [reader.goes_around(index) for index in range(count)]
    buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
    for _ in range(reading_thread_count()):
        buffers.put(host_memory(reader.cell))

    def read(work: tuple[int, int]) -> int:
        buffer = buffers.get()
        reader.read(*work, buffer, around=around[work[0]])
        buffers.put(buffer)
        return int(reader.cells(work[0])[work[1]][1])

    work = [(index, cell) for index in range(count) for cell in range(len(store.reader.cells(index)))]
    with ThreadPoolExecutor(reading_thread_count()) as pool:
        list(pool.map(lambda _: time.sleep(0.01), range(reading_thread_count())))  # threads start
        began = time.perf_counter()
        nbytes = sum(pool.map(read, work))
        return round(nbytes / (time.perf_counter() - began) / 1e9, 2)


def store_layouts(model: Any) -> Any:
    return paging_of(model).homes.store.layouts


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Return, from the device's own record, how much of the copies ran while something computed, and the reverse."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize()
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


def nf4(bench: Bench) -> None:
    """Everything in RAM."""
    with bench.placed("ram", "cpu"):
        bench.limit("ram", "bus", bus)
        bench.decode("ram", "captured", 32)
        bench.prompts("ram")
        bench.decode("ram", "eager", 16)
        bench.generate("ram")


def on_disk(bench: Bench) -> None:
    """Everything on disk: in the page cache, with two slots and with four, and not in it."""
    for slots in (2, 4):
        layers = f"disk, warm, {slots} slots"
        with bench.placed(layers, "disk", slots=slots):
            bench.limit(layers, "first read", disk)  # checksums included
            bench.limit(layers, "disk", disk)
            bench.decode(layers, "captured", 24)
            bench.decode(layers, "eager", 8)
            if slots == 2:
                cold(bench)


def cold(bench: Bench) -> None:
    """Time the disk itself."""
    store = paging_of(bench.model).homes.store
    store.reader.direct = True
    descriptor = os.open(store.path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    bench.limit("disk, cold", "disk", lambda model: disk(model, 12))
    bench.decode("disk, cold", "captured", 1, 30.0)


def half(bench: Bench) -> None:
    """Half of the layers resident, the others in RAM."""
    for slots in (2, 4):
        layers = f"half in ram, {slots} slots"
        with bench.placed(layers, "cpu", resident=bench.options.layers // 2, slots=slots):
            bench.limit(layers, "bus", bus)
            bench.decode(layers, "captured", 32)
            bench.decode(layers, "eager", 8)


def bf16(bench: Bench) -> None:
    """The same without quantization."""
    with bench.placed("ram", "cpu"):
        bench.limit("ram", "bus", bus)
        bench.decode("ram", "captured", 8, 10.0)
        bench.decode("ram", "eager", 4)


def gpt2_xl(journal: Journal, folder: Path) -> None:
    """A token of GPT-2 XL in int8 under the map of accelerate's guide."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from gpt2_xl import GUIDE_MAP
    from mingpt_gpt2 import GPT, SIZES

    gpu = torch.cuda.is_available()
    places = GUIDE_MAP if gpu else {k: v if v == "disk" else "cpu" for k, v in GUIDE_MAP.items()}
    token = torch.ones(1, 1, dtype=torch.long, device=the_device())
    torch.manual_seed(0)
    with torch.device(the_device()):
        model = GPT(*SIZES["gpt2-xl" if gpu else "tiny"]).eval()
    config = tuckaway.QuantizationConfig(format="int8", compute_dtype="fp16")
    model = tuckaway.load_and_quantize_model(model, config, device_map={"": place()})
    want = model(token).clone()
    tuckaway.dispatch_model(
        tuckaway.materialize(model),
        places,
        place(),
        offload_dir=folder / "gpt2",
        no_split_module_classes=["Block"],
    )
    for way in ("eager", "captured"):

        def measured(way: str = way) -> dict[str, Any]:
            step: Any = (
                CapturedStep(model, lambda: model(token))
                if gpu and way == "captured"
                else lambda: model(token)
            )
            if not all(torch.equal(step(), want) for _ in range(3)):
                return {"wrong": True}
            return {"token_ms": round(1e3 * timed(step, 8), 2)}

        journal.case(
            {"format": "int8", "layers": "gpt2-xl, the guide's map", "what": f"step, {way}"}, measured
        )


def peers(journal: Journal, options: argparse.Namespace) -> None:
    """Time others, each bounded."""
    arguments = ["--layers", str(options.layers), *(["--miniature"] if options.miniature else [])]
    arguments += ["--peers", options.peers] if options.peers else []
    for name in PEERS:
        if importlib.util.find_spec(NEEDS.get(name, "accelerate")) is None:
            continue
        journal.case(
            {"format": name, "layers": "ram", "what": "step, eager"},
            lambda name=name: in_process(  # type: ignore[misc]
                "paging_peers.py", [name, *arguments], min(PEER_SECONDS, journal.left())
            ),
            15.0,
        )


def quantized(journal: Journal, options: argparse.Namespace, folder: Path) -> None:
    bench = Bench(journal, options, "nf4", folder)
    bench.decode("resident", "captured", 32)
    bench.prompts("resident")
    for part, measure in (("nf4", nf4), ("disk", on_disk), ("half", half)):
        if part in options.only:
            journal.attempt(part, lambda measure=measure: measure(bench), 10.0)  # type: ignore[misc]
    bench.decode("resident", "eager", 16)
    bench.generate("resident")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder on the disk that is measured")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds; then nothing more is begun")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--miniature", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--peers", help="folder that packages of peers lie unpacked in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    journal = Journal("paging", options.budget, options.out)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch, torch.no_grad(), repeatable_attention():
        if {"nf4", "disk", "half"}.intersection(options.only):
            quantized(journal, options, Path(scratch))
            gc.collect()
        if "gpt2" in options.only:
            journal.attempt("gpt2", lambda: gpt2_xl(journal, Path(scratch)), 12.0)
        if "bf16" in options.only:
            journal.attempt("bf16", lambda: bf16(Bench(journal, options, "bf16", Path(scratch))), 20.0)
            gc.collect()
        if "peers" in options.only:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            peers(journal, options)
    print(journal.save())


if __name__ == "__main__":
    main()
