"""What checksums cost: every load a machine without a GPU does, with and without them, warm.

    python benchmarks/checksums.py [--scratch FOLDER] [--repeats N] [--small] [--only CASE ...] [--out FOLDER]

Writes checkpoints of about 1 GB with checksums, bf16 and nf4, and times each load that an installed tuckaway offers:
quantizing; bytes that go as they are, bf16 and nf4, to their places or into pages in RAM; the fill of a store of
pages on disk; the first touch of these pages, alone and as a user meets it, in a token. The files are in the page
cache (by default they lie in RAM, ``/dev/shm``, where no disk disturbs), and every load takes memory that was not used
before, as the first load of a process does. With and without alternate; every load is counted in processor time of the
whole process and on the clock, on one core and on all of them. ``cost`` is the median of the pairs' quotients, less
one: what else runs on the machine moves both of a pair.

Then the sums themselves, by every library for it that is installed: bytes a second, hot in the cache and from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from common import RESULTS, save
from torch import nn

import tuckaway
from tuckaway.checkpoint import Checkpoint, CheckpointWriter, reader
from tuckaway.files import checksum
from tuckaway.paging import checksums as page_sums
from tuckaway.paging import paging_of
from tuckaway.paging.reading import CellReader

WIDTH, HIDDEN = 2048, 5632
BLOCKS = {"bf16": 10, "nf4": 40}  # 1.03 and 1.06 GB
LIBRARIES = {
    "zlib": ("zlib", "crc32"),
    "zlib-ng": ("zlib_ng.zlib_ng", "crc32"),
    "isal": ("isal.isal_zlib", "crc32"),
    "crc32c": ("crc32c", "crc32c"),
    "xxh3_64": ("xxhash", "xxh3_64_intdigest"),
    "xxh3_128": ("xxhash", "xxh3_128_intdigest"),
}


class Block(nn.Module):
    """The matrices of a decoder's block, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.attention = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; the attention is left out."""
        y = self.norm(x)
        for linear in self.attention:
            y = linear(y)
        return x + self.down(self.gate(y) * self.up(y))


class Model(nn.Module):
    """So many blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run one block after another."""
        for block in self.blocks:
            x = block(x)
        return x


def empty(blocks: int) -> nn.Module:
    with tuckaway.init_empty_weights():
        return Model(blocks).to(torch.bfloat16).eval()


def write(folder: Path, blocks: int) -> Path:
    """Write a bf16 checkpoint, the values of every block the same."""
    torch.manual_seed(0)
    values = Block().to(torch.bfloat16).state_dict()
    names = [(f"blocks.{n}.{name}", value) for n in range(blocks) for name, value in values.items()]
    with CheckpointWriter(folder, max_shard_size=5 * 10**8) as writer:
        writer.plan([(name, value.dtype, tuple(value.shape)) for name, value in names])
        for name, value in names:
            writer.write(name, value)
        writer.commit()
    return folder


def write_nf4(folder: Path, blocks: int) -> Path:
    """Write an nf4 checkpoint of so many blocks, from one that is quantized."""
    source = write(folder.with_name("block"), 1)
    one = tuckaway.load_and_quantize_model(
        empty(1), "nf4", weights_location=source, device_map={"": "cpu"}, progress=False
    )
    model = Model(0)
    for _ in range(blocks):
        clone = empty(1).blocks[0]
        for name, value in one.blocks[0].state_dict().items():
            owner, _, leaf = name.rpartition(".")
            setattr(
                clone.get_submodule(owner), leaf, nn.Parameter(value.detach().clone(), requires_grad=False)
            )
        model.blocks.append(clone)
    tuckaway.save_model(model, folder, max_shard_size=5 * 10**8)
    shutil.rmtree(source)
    return folder


def no_sum(*_: Any) -> int:
    return 0


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Neither compute nor compare checksums of weights; everything else stays, what is read included.

    ``verify_checksums=False`` also reads the codebooks that a recorded checksum makes known, which takes longer.
    """
    without = SimpleNamespace(**{**vars(reader.files), "crc32": no_sum, "crc32_combine": no_sum})
    with (
        mock.patch.object(reader, "files", without),
        mock.patch.object(reader, "_compare", no_sum),
        mock.patch.object(page_sums, "files", without),
        mock.patch.object(CellReader, "_check", no_sum),
    ):
        yield


def load(folder: Path, blocks: int, *args: Any, place: str = "cpu", **options: Any) -> nn.Module:
    return tuckaway.load_and_quantize_model(
        empty(blocks), *args, weights_location=folder, device_map={"": place}, progress=False, **options
    )


class Case:
    """One load: :meth:`run` is timed, what it needs is made and dropped outside."""

    def __init__(self, run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> None:
        self.run, self.prepare = run, prepare

    def once(self, around: AbstractContextManager[None]) -> tuple[float, float]:
        """Return seconds on the clock and of the processors."""
        gc.collect()
        given = self.prepare()
        with around:
            wall, cpu = time.perf_counter(), time.process_time()
            kept = self.run(given)
            spent = time.perf_counter() - wall, time.process_time() - cpu
            del kept, given
        return spent


def cases(scratch: Path, small: bool) -> Iterator[tuple[str, int, Case]]:
    """Yield the name, bytes that are read, and the load."""
    counts = {key: 2 if small else count for key, count in BLOCKS.items()}
    bf16, nf4 = write(scratch / "bf16", counts["bf16"]), write_nf4(scratch / "nf4", counts["nf4"])
    made, store = scratch / "made", scratch / "store"
    sizes = {folder: Checkpoint.open(folder).nbytes for folder in (bf16, nf4)}

    def clear() -> None:
        shutil.rmtree(made, ignore_errors=True)

    def fill(folder: Path) -> nn.Module:
        return load(nf4, counts["nf4"], place="disk", offload_folder=folder)

    def touch(model: nn.Module) -> None:
        homes = paging_of(model).homes
        page = torch.empty(max(layout.extent for layout in homes.store.layouts), dtype=torch.uint8)
        page.fill_(0)
        for index in range(len(homes.store.layouts)):
            homes.store.read(index, page)

    x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    yield "quantize bf16 to nf4", sizes[bf16], Case(lambda _: load(bf16, counts["bf16"], "nf4"))
    yield "bf16 as it is", sizes[bf16], Case(lambda _: load_plain(bf16, counts["bf16"]))
    yield "nf4 as it is", sizes[nf4], Case(lambda _: load(nf4, counts["nf4"]))
    yield "fill a store", sizes[nf4], Case(lambda _: fill(made), clear)
    clear()
    yield "first touch of pages", sizes[nf4], Case(touch, lambda: fill(store))
    yield "first token from pages", sizes[nf4], Case(lambda model: model(x), lambda: fill(store))


def fresh_memory() -> None:
    """Have glibc give freed memory back at once: it keeps up to 32 MiB a tensor, once one was freed."""
    mmap_threshold = -3  # its number in malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**17)


def load_plain(folder: Path, blocks: int) -> nn.Module:
    return tuckaway.load_checkpoint_and_dispatch(empty(blocks), folder, device_map={"": "cpu"})


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """Run with and without checksums in turn."""
    case.once(contextlib.nullcontext())
    spent: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for number in range(repeats):
        for which in ("with", "without") if number % 2 else ("without", "with"):
            around = unchecked() if which == "without" else contextlib.nullcontext()
            spent[which].append(case.once(around))
    result: dict[str, Any] = {}
    for axis, name in enumerate(("wall", "cpu")):
        pairs = [(a[axis], b[axis]) for a, b in zip(spent["with"], spent["without"], strict=True)]
        for which, values in zip(("with", "without"), zip(*pairs, strict=True), strict=True):
            result[f"{name}_{which}"] = {
                "median": round(statistics.median(values), 4),
                "min": round(min(values), 4),
            }
        result[f"{name}_cost"] = round(statistics.median(a / b for a, b in pairs) - 1, 4)
        result[f"{name}_cost_of_min"] = round(min(a for a, _ in pairs) / min(b for _, b in pairs) - 1, 4)
    return result


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """Let this process have so many cores, and torch so many threads."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(allowed)[:count])
    torch.set_num_threads(count)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def cpu_name() -> str:
    """Return the processor's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def rates() -> dict[str, Any]:
    """Return bytes a second of a thread, by library: hot in the second-level cache, and from memory."""
    memory = memoryview(torch.randint(0, 256, (256 * 2**20,), dtype=torch.uint8).numpy())
    found = {}
    for library, (module, name) in LIBRARIES.items():
        try:
            function = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        found[library] = {
            label: round(best_rate(function, memory[:nbytes]) / 1e9, 1)
            for label, nbytes in (("256 KiB, hot", 2**18), ("256 MiB", 2**28))
        }
    return found


def best_rate(function: Callable[[Any], int], data: memoryview) -> float:
    rounds, best = max(1, 2**26 // len(data)), 0.0
    for _ in range(7):
        began = time.thread_time()
        for _ in range(rounds):
            function(data)
        best = max(best, rounds * len(data) / (time.thread_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--repeats", type=int, default=7)
    every = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument("--cores", type=int, nargs="*", default=every, help=f"how many ({every})")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="*", metavar="CASE")
    parser.add_argument("--zlib", action="store_true", help="as where no faster library is installed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    library = "zlib-ng" if checksum.is_fast() and not options.zlib else "zlib"
    results: dict[str, Any] = {"library": library, "cpu": cpu_name(), "rates": rates(), "loads": {}}
    fresh_memory()
    with ExitStack() as stack:
        if options.zlib:
            stack.enter_context(mock.patch.object(checksum, "_fastest", return_value=zlib.crc32))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.scratch)))
        for name, nbytes, case in cases(scratch, options.small):
            if options.only and name not in options.only:
                continue
            entry: dict[str, Any] = {"bytes": nbytes}
            for count in options.cores:
                with cores(count):
                    entry[f"{count} core{'s' * (count > 1)}"] = found = compare(case, options.repeats)
                print(f"{name}, {count} cores: {found}", flush=True)
            results["loads"][name] = entry
            path = save("checksums_zlib" if options.zlib else "checksums", results, options.out)
    print(path)


if __name__ == "__main__":
    main()
