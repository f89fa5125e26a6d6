"""When each copy and each block would run on an accelerator, in a time that is only counted.

Streams, events and reading threads are replaced by clocks, everything else is what runs on a GPU: the pager, the
transfer, its pieces and their order. A copy takes a given time on the bus, a block a given time of computing and of
Python, a cell a given time of a reading thread. What is asserted is a whole forward's time against the least that
these allow: the bus, the device, Python or the disk, whichever is busy longest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paging_models import WIDTH, Block, make, page
from tuckaway.paging import capture as capture_module
from tuckaway.paging import checksums as checksums_module
from tuckaway.paging import pager as pager_module
from tuckaway.paging import paging_of
from tuckaway.paging import store as store_module
from tuckaway.paging import transfer as transfer_module
from tuckaway.paging.bounce import Bounces
from tuckaway.paging.reading import CellReader
from tuckaway.paging.slots import Slot
from tuckaway.paging.transfer import Transfer

COPY, BLOCKS, FORWARDS = 2.0, 24, 5


class Clock:
    """The time of whatever thread runs: the program's, or a reading thread's while it does a piece."""

    now = 0.0


class Event:
    """A point of a stream."""

    def __init__(self, *_: object, at: float = 0.0) -> None:
        self.at = at

    def record(self, stream: Stream) -> None:
        self.at = stream.busy_until

    def query(self) -> bool:
        return self.at <= Clock.now

    def synchronize(self) -> None:
        Clock.now = max(Clock.now, self.at)


class Stream:
    """Work in order; entering and leaving it is a copy."""

    stream_id, copy = 0, COPY

    def __init__(self, *_: object, **__: object) -> None:
        self.busy_until = self.worked = 0.0
        self.log: list[str] = []

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, Clock.now) + seconds
        self.worked += seconds

    def wait_event(self, event: Event) -> None:
        self.log.append("wait")
        self.busy_until = max(self.busy_until, event.at)

    def record_event(self) -> Event:
        return Event(at=self.busy_until)

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> None:
        self.log.append("copy")
        self.work(self.copy)

    def __exit__(self, *_: object) -> None:
        pass


class Timed(Block):
    """A block with a time of Python, and one of computing on the device."""

    main: Stream
    python, computing = 0.1, 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Clock.now += self.python
        self.main.work(self.computing)
        return x


class Stack(torch.nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Timed(width) for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Let transfers believe that they go to an accelerator; return its computing stream."""
    Clock.now, main = 0.0, Stream()
    accelerator = SimpleNamespace(current_stream=lambda *_: main, synchronize=lambda *_: None)

    class Torch:
        Stream, Event = Stream, Event

        def __getattr__(self, name: str) -> Any:
            return accelerator if name == "accelerator" else getattr(torch, name)

    monkeypatch.setattr(transfer_module, "torch", Torch())
    monkeypatch.setattr(Timed, "main", main, raising=False)
    return main


def on_device(model: Any) -> Stream:
    """Return the stream of a paged model's copies."""
    transfer = paging_of(model).pager.transfer
    transfer.on_device, transfer._stream = True, Stream()
    stream: Stream = transfer._stream
    return stream


def of_one_forward(
    model: Any, main: Stream, side: Stream, *, waits: bool = False, width: int = WIDTH
) -> tuple[float, float, float]:
    """Run some forwards; of one of them, once the order is known: how long it takes, copies and computes.

    With ``waits``, Python waits for each forward's result, as it must when it chooses the next token.
    """
    x, marks = torch.zeros(1, width), []
    with torch.no_grad():
        for _ in range(2 + FORWARDS):
            model(x)
            if waits:
                Clock.now = max(Clock.now, main.busy_until)
            marks.append((max(main.busy_until, Clock.now), side.worked, main.worked))
    seconds, copying, computing = ((b - a) / FORWARDS for a, b in zip(marks[1], marks[-1], strict=True))
    return seconds, copying, computing


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize(
    ("python", "computing"),
    [(0.1, 0.2), (0.1, 1.9), (0.1, 4.4), (3.0, 1.0), (2.5, 2.4)],
    ids=["a token", "as long as the copy", "a prompt", "Python is slowest", "all alike"],
)
def test_nothing_waits_but_for_the_slowest(
    counted: Stream, monkeypatch: pytest.MonkeyPatch, python: float, computing: float, slots: int
) -> None:
    """The first page is brought while the forward before it ends: forwards follow each other without a gap."""
    monkeypatch.setattr(Timed, "python", python)
    monkeypatch.setattr(Timed, "computing", computing)
    model = page(make(Stack), {"": "cpu"}, slots=slots)
    found, copying, computed = of_one_forward(model, counted, on_device(model))
    assert copying <= BLOCKS * COPY
    assert computed == pytest.approx(BLOCKS * computing)
    assert found <= 1.01 * max(BLOCKS * python, computed, copying)


@pytest.mark.parametrize(("slots", "ahead"), [(2, 1), (3, 2), (4, 3), (7, 3)])
def test_while_resident_blocks_compute_the_bus_works_for_the_others(
    counted: Stream, monkeypatch: pytest.MonkeyPatch, slots: int, ahead: int
) -> None:
    """As many pages are there ahead as there are slots for, where it is Python that computing waits for.

    The paged half takes Python three copies' time less than the bus: three pages must be there when it begins.
    """
    monkeypatch.setattr(Timed, "python", 1.5)
    half = tuple(f"blocks.{i}." for i in range(BLOCKS // 2))
    model = page(make(Stack), {"": "cpu"}, slots=slots, leave=lambda name: name.startswith(half))
    found, copying, _ = of_one_forward(model, counted, on_device(model), waits=True)
    assert copying <= BLOCKS // 2 * COPY
    assert found <= 1.5 * BLOCKS + (3 - ahead) * COPY + 0.5


CELL, READ, THREADS = 16 * 4096, 3.0, 14
"""Most bytes of a cell here, and how long a thread reads at one."""
WIDE = 112  # a page of 213 kB: four of the largest cells, or 14 smaller ones


class Pool:
    """Reading threads whose time is counted: a call is made at once, in the time of the thread that is free first."""

    def __init__(self, count: int) -> None:
        self.free_at = [0.0] * count
        self.ends: list[float] = []

    def submit(self, *calls: Callable[[], None]) -> None:
        submitted, self.ends = Clock.now, []
        for call in calls:
            number = min(range(len(self.free_at)), key=self.free_at.__getitem__)
            Clock.now = max(self.free_at[number], submitted)
            call()
            self.free_at[number] = Clock.now
            self.ends.append(Clock.now)
        Clock.now = submitted

    def close(self) -> None:
        pass


class Pieces(Bounces):
    """Pieces of memory with an event each, as an accelerator has them."""

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        super().__init__(count, nbytes, device)
        for _ in range(count):
            bounce = self.take()
            bounce.copied = Event()
            self.give_back(bounce)


@pytest.fixture
def read(counted: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the time of reading cells, by 14 threads, and of copying them."""
    reading, filled, wait = CellReader.read, Transfer._filled, Transfer.wait
    filled_at: dict[int, float] = {}
    pool = Pool(THREADS)

    def read_cell(reader: CellReader, index: int, number: int, *args: Any, **options: Any) -> None:
        Clock.now += READ * reader.cells(index)[number][1] / CELL
        reading(reader, index, number, *args, **options)

    def note(self: Transfer, unit: Any, slot: Any, kept: Any) -> None:
        filled_at[id(slot)] = max(Clock.now, *pool.ends)
        filled(self, unit, slot, kept)

    def wait_for_threads(self: Transfer, slot: Any) -> None:
        Clock.now = max(Clock.now, filled_at.get(id(slot), 0.0))
        wait(self, slot)

    monkeypatch.setattr(store_module, "CELL", CELL)
    monkeypatch.setattr(checksums_module, "_LEAST", 4096)
    monkeypatch.setattr(store_module, "Threads", lambda _: pool)
    monkeypatch.setattr(transfer_module, "_RUN_BYTES", CELL)
    monkeypatch.setattr(transfer_module, "Bounces", Pieces)
    monkeypatch.setattr(CellReader, "read", read_cell)
    monkeypatch.setattr(Transfer, "_filled", note)
    monkeypatch.setattr(Transfer, "wait", wait_for_threads)


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize(
    ("copy", "computing"), [(0.05, 0.15), (0.25, 0.1), (0.05, 2.5)], ids=["disk", "bus", "computing"]
)
def test_pages_on_disk_come_as_fast_as_threads_read_them(
    counted: Stream,
    read: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    copy: float,
    computing: float,
    slots: int,
) -> None:
    """All threads have something to read at any time: those that are done with a page go on with the next one's."""
    monkeypatch.setattr(Stream, "copy", copy)
    monkeypatch.setattr(Timed, "python", 0.02)
    monkeypatch.setattr(Timed, "computing", computing)
    model = page(make(Stack, width=WIDE), {"": "disk"}, tmp_path, slots=slots)
    nbytes = sum(page.unit.layout.nbytes for page in paging_of(model).pager.pages)
    found, copying, computed = of_one_forward(model, counted, on_device(model), width=WIDE)
    reading = nbytes / CELL * READ / THREADS
    assert found <= 1.05 * max(reading, copying, computed)


def test_copies_of_a_page_do_not_wait_for_the_turn_that_the_next_ones_wait_for(
    counted: Stream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A slot that is still read from holds up its own page, not what is read at the time for the page before."""
    monkeypatch.setattr(store_module, "reading_thread_count", lambda: 1)
    monkeypatch.setattr(transfer_module, "Bounces", Pieces)
    paging, gate, reading = (
        paging_of(page(make(), {"": "disk"}, tmp_path)),
        threading.Event(),
        CellReader.read,
    )
    monkeypatch.setattr(CellReader, "read", lambda *args, **o: (gate.wait(10), reading(*args, **o))[1])
    transfer, units = paging.pager.transfer, [page.unit for page in paging.pager.pages[2:4]]
    transfer.on_device, transfer._stream = True, (side := Stream())
    slots = [Slot(number, paging.plan.slot_nbytes, torch.device("cpu")) for number in range(2)]
    for unit, slot in zip(units, slots, strict=True):
        transfer.used(slot)
        transfer.start(unit, slot)
    gate.set()
    for slot in slots:
        transfer.wait(slot)
    assert side.log == ["wait", "copy"] * 2


@pytest.fixture
def graph(counted: Stream, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Stream]:
    """Return what lets a paged model's forwards be captured, and gives the stream of the graph's copies."""

    class Cuda:
        type = "cuda"

    class Torch:
        cuda = SimpleNamespace(is_current_stream_capturing=lambda: True)
        accelerator = transfer_module.torch.accelerator

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    for module in (pager_module, capture_module):
        monkeypatch.setattr(module, "torch", Torch())
        monkeypatch.setattr(
            module, "Slot", lambda number, nbytes, _: Slot(number, nbytes, torch.device("cpu"))
        )

    def capture(model: Any) -> Stream:
        paging = paging_of(model)
        monkeypatch.setattr(paging.homes, "pinned", paging.homes.in_memory)
        paging.pager.device, paging.pager._graph_stream = Cuda(), (side := Stream())
        return side

    return capture


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("computing", [0.2, 1.9, 4.4])
def test_in_a_graph_nothing_waits_but_for_the_slowest(
    counted: Stream,
    graph: Callable[[Any], Stream],
    monkeypatch: pytest.MonkeyPatch,
    computing: float,
    slots: int,
) -> None:
    """A replay begins with the copy of its first page and ends with its last block: what lies between is full."""
    monkeypatch.setattr(Timed, "python", 0.0)
    monkeypatch.setattr(Timed, "computing", computing)
    model = page(make(Stack), {"": "cpu"}, slots=slots)
    x, times = torch.zeros(1, WIDTH), []
    with torch.no_grad():
        model(x)  # shows the order of the pages
        side = graph(model)
        for _ in range(3):
            began = max(counted.busy_until, side.busy_until)
            model(x)
            times.append(max(counted.busy_until, side.busy_until) - began)
    assert times == pytest.approx([BLOCKS * max(COPY, computing) + min(COPY, computing)] * 3)
