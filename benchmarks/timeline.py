"""When each page is read and each block computes, for the picture in the docs: a CPU, pages on disk, two slots.

    OMP_NUM_THREADS=1 python benchmarks/timeline.py [--folder FOLDER] [--out FOLDER]

Six decoder-like blocks of 21 million weights each in nf4, 64 rows of input; the third forward and the fourth are
noted, after two in which the order of the pages is learned. The pages' file is dropped from the page cache before each
block, so that every read is one of the disk. ``docs/draw/timeline.py`` draws the result.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from torch import nn

import tuckaway
from tuckaway.paging.transfer import Transfer

BLOCKS, WIDTH, INNER = 6, 2048, 5120


class Block(nn.Module):
    """A norm and two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and give ``[64, WIDTH]``."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build() -> nn.Sequential:
    return nn.Sequential(*[Block() for _ in range(BLOCKS)])


class Notes:
    """Intervals in seconds: what, which block, which slot, from, to."""

    def __init__(self) -> None:
        self.intervals: list[dict[str, Any]] = []

    def add(self, what: str, block: int, begin: float, end: float, slot: int | None = None) -> None:
        """Note an interval of ``perf_counter``."""
        self.intervals.append({"what": what, "block": block, "slot": slot, "begin": begin, "end": end})

    def watch(self, model: nn.Sequential, fresh: Callable[[], None]) -> None:
        """Note every read, wait and block of a model that is not loaded yet; call ``fresh`` before a read."""
        start, wait, filled = Transfer.start, Transfer.wait, Transfer._filled
        begun: dict[int, float] = {}

        def noted_start(transfer: Transfer, unit: Any, slot: Any) -> None:
            begun[slot.index] = time.perf_counter()
            fresh()
            start(transfer, unit, slot)

        def noted_filled(transfer: Transfer, unit: Any, slot: Any, kept: Any) -> None:
            filled(transfer, unit, slot, kept)
            self.add("read", int(unit.name), begun[slot.index], time.perf_counter(), slot.index)

        def noted_wait(transfer: Transfer, slot: Any) -> None:
            begin = time.perf_counter()
            wait(transfer, slot)
            self.add("wait", -1, begin, time.perf_counter(), slot.index)

        Transfer.start, Transfer.wait = noted_start, noted_wait  # type: ignore[method-assign]
        Transfer._filled = noted_filled  # type: ignore[method-assign]
        for number, block in enumerate(model):
            block.forward = self._timed(block.forward, number)  # inside the pager's own wrapper

    def _timed(self, forward: Any, number: int) -> Any:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = forward(*args)
            self.add("compute", number, begin, time.perf_counter())
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    notes = Notes()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tuckaway.save_model(build(), f"{folder}/checkpoint")
        with tuckaway.init_empty_weights():
            model = build()

        def fresh() -> None:
            for path in Path(folder, "pages").rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        notes.watch(model, fresh)
        model = tuckaway.load_and_quantize_model(
            model,
            tuckaway.QuantizationConfig("nf4", compute_dtype=torch.float32, quantize_head=True),
            f"{folder}/checkpoint",
            device_map={"": "disk"},
            no_split_module_classes=["Block"],
            offload_folder=f"{folder}/pages",
        )
        x = torch.randn(64, WIDTH)
        with torch.no_grad():
            for turn in range(4):
                if turn == 2:
                    notes.intervals.clear()
                    began = time.perf_counter()
                model(x)
        page = model.quantization_report.nbytes // BLOCKS
    for interval in notes.intervals:
        interval["begin"] = round(interval["begin"] - began, 6)
        interval["end"] = round(interval["end"] - began, 6)
    print(save("timeline", {"page_bytes": page, "rows": 64, "intervals": notes.intervals}, options.out))


if __name__ == "__main__":
    main()
