"""The logic of pages in graphs, where there is no GPU: what is launched takes effect at once, in the order of launch.

So a copy that came too early, into a slot still in use, or not at all, changes results here too. That streams wait for
each other, and that CUDA captures all of it, is shown on a GPU (tests/gpu/test_paging.py).
"""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from paging_models import make, page, tokens
from tuckaway.errors import PagingError
from tuckaway.paging import CapturedStep, paging_of
from tuckaway.paging import capture as capture_module
from tuckaway.paging import pager as pager_module
from tuckaway.paging import step as step_module
from tuckaway.paging.binding import Turn
from tuckaway.paging.capture import Scope


class Stream:
    """Does at once what it is given, so that there is nothing to wait for; counts forks and joins."""

    waits = 0

    def wait_event(self, event):
        self.waits += 1

    def wait_stream(self, other):
        self.waits += 1

    def record_event(self):
        return object()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Graph:
    """Notes which slots must hold which pages when it is replayed."""

    made: ClassVar[list[Graph]] = []

    def __init__(self):
        self.needs = []
        self.replays = 0

    def capture_begin(self, **_):
        Graph.made.append(self)
        World.capturing = True

    def capture_end(self):
        World.capturing = False

    def replay(self):
        self.replays += 1
        for buffer, source in self.needs:
            assert torch.equal(buffer[: source.numel()], source)


class World:
    capturing = False


@pytest.fixture
def cuda(monkeypatch):
    """Let paging on the CPU believe that it is on a GPU whose stream is captured while ``World.capturing``."""
    World.capturing = False
    Graph.made = []
    stream = Stream()
    fake = SimpleNamespace(
        is_current_stream_capturing=lambda: World.capturing,
        is_available=lambda: True,
        CUDAGraph=Graph,
        Stream=lambda *_, **__: Stream(),
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        device=lambda *_: contextlib.nullcontext(),
        stream=lambda *_: contextlib.nullcontext(),
        graph_pool_handle=lambda: (0, 0),
        synchronize=lambda: None,
        empty_cache=lambda: None,
    )
    accelerator = SimpleNamespace(current_stream=lambda *_: stream)

    class Torch:
        cuda = fake

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(pager_module, "torch", Torch())
    monkeypatch.setattr(step_module, "torch", Torch())
    capture_torch = Torch()
    capture_torch.accelerator = accelerator
    monkeypatch.setattr(capture_module, "torch", capture_torch)
    return stream


class OnGpu:
    """The CPU, under the name of a GPU to those who ask for a type."""

    type = "cuda"


def on_gpu(model, monkeypatch):
    pager = paging_of(model).pager
    pager.device = OnGpu()
    pager._graph_stream = Stream()
    for module in (pager_module, capture_module, step_module):
        if hasattr(module, "device_memory"):
            monkeypatch.setattr(module, "device_memory", lambda n, _: torch.empty(n, dtype=torch.uint8))
    slot = pager_module.Slot
    for module in (pager_module, capture_module, step_module):
        monkeypatch.setattr(module, "Slot", lambda i, n, _: slot(i, n, torch.device("cpu")))
    homes = paging_of(model).homes
    monkeypatch.setattr(homes, "pinned", homes.in_memory)
    return pager


@contextlib.contextmanager
def captured():
    World.capturing = True
    try:
        yield
    finally:
        World.capturing = False


@pytest.fixture
def copies(monkeypatch):
    """Names of the pages whose copies are in the graph, in order."""
    names: list[str] = []
    fill = Scope._fill
    monkeypatch.setattr(
        Scope, "_fill", lambda self, p, slot: (names.append(p.unit.name), fill(self, p, slot))[1]
    )
    return names


ORDERS = [None, [4, 3, 2, 1, 0], [0, 0, 3, 0], [2], [1, 2, 1, 3, 1]]


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("order", ORDERS)
def test_a_graph_has_every_page_when_it_is_used(cuda, monkeypatch, copies, slots, order):
    model, resident = page(make(), {"": "cpu"}, slots=slots), make()
    model.order = resident.order = order
    with torch.no_grad():
        for _ in range(2):
            model(tokens())
        on_gpu(model, monkeypatch)
        with captured():
            for seed in range(2):
                assert torch.equal(model(tokens(seed)), resident(tokens(seed)))
    assert paging_of(model).pager._local.scope is None
    assert all(not page.turns and not page.captured for page in paging_of(model).pages)


def test_every_page_is_copied_once_ahead_of_its_turn_and_none_for_the_next_replay(cuda, monkeypatch, copies):
    model = page(make(), {"": "cpu", "embedding": "cpu"}, slots=2)
    with torch.no_grad():
        for _ in range(2):
            model(tokens())
        on_gpu(model, monkeypatch)
        with captured():
            model(tokens())
    cycle = ["embedding", *(f"blocks.{i}" for i in range(5)), "norm", "embedding"]
    assert copies == ["Net", *cycle]


def test_a_model_that_was_never_run_is_captured(cuda, monkeypatch, copies):
    model, resident = page(make(), {"": "cpu"}), make()
    model.order = resident.order = [3, 1, 4]
    on_gpu(model, monkeypatch)
    with captured(), torch.no_grad():
        assert torch.equal(model(tokens()), resident(tokens()))


def test_blocks_are_captured_without_the_model_around_them(cuda, monkeypatch):
    model, resident = page(make(), {"": "cpu"}), make()
    on_gpu(model, monkeypatch)
    x = torch.randn(2, 32)
    with captured(), torch.no_grad():
        for block, want in zip(model.blocks, resident.blocks, strict=True):
            assert torch.equal(block(x), want(x))
            assert paging_of(model).pager._local.scope is None  # joined


def test_one_page_is_not_in_a_graph_and_in_an_eager_forward(cuda, monkeypatch):
    model = page(make(), {"": "cpu"})
    pager = on_gpu(model, monkeypatch)
    block = pager.pages[2]
    with captured():
        turn = pager.bring_in(block)
    with pytest.raises(PagingError, match="captured in a graph and by another"):
        pager.bring_in(block)
    pager.release(turn)
    block.turns = {Turn(block)}
    with captured(), pytest.raises(PagingError, match="captured in a graph and by another"):
        pager.bring_in(block)


def test_pages_on_disk_are_not_in_a_graph(cuda, monkeypatch, tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    on_gpu(model, monkeypatch)
    with captured(), torch.no_grad(), pytest.raises(PagingError, match="CapturedStep"):
        model(tokens())


MAPS = {
    "disk": {"": "disk"},
    "mixed": {"": "cpu", "blocks.1": "disk", "blocks.2": "disk", "blocks.4": "disk"},
    "cpu": {"": "cpu"},
}


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("device_map", MAPS)
def test_a_captured_step_has_every_page_in_its_slot(cuda, monkeypatch, tmp_path, device_map, order, slots):
    model = page(make(), MAPS[device_map], tmp_path, slots=slots)
    model.order = order
    with torch.no_grad():
        pager = on_gpu(model, monkeypatch)
        note_needs(model, monkeypatch)
        step = CapturedStep(model, lambda: model(tokens()), warmup=2)
        started = count_starts(pager, monkeypatch)
        for replay in range(1, 4):
            step()
            assert all(graph.replays == replay for graph in Graph.made)
    asked = [piece.page for piece in step._pieces if piece.page is not None]
    assert len(asked) == sum(len(graph.needs) > 0 for graph in Graph.made) or device_map == "mixed"
    assert len(started) <= 3 * len(asked) + slots
    if slots == 9 and asked:
        assert len(started) == len(set(map(id, asked)))  # all of them stay


def note_needs(model, monkeypatch):
    """Let each graph check, when it is replayed, the pages that are bound while it is captured."""
    pager, store = paging_of(model).pager, paging_of(model).homes.store
    bring_in = pager.bring_in

    def watched(page, **options):
        turn = bring_in(page, **options)
        if World.capturing and page.unit.home == "disk":
            source = torch.empty(page.unit.layout.nbytes, dtype=torch.uint8)
            store.read(paging_of(model).homes.number(page.unit), source)
            for graph in [Graph.made[-1]]:
                graph.needs.append((turn.slot.buffer, source))
        return turn

    monkeypatch.setattr(pager, "bring_in", watched)


def count_starts(pager, monkeypatch):
    started: list[str] = []
    start = pager.transfer.start
    monkeypatch.setattr(
        pager.transfer, "start", lambda unit, slot: (started.append(unit.name), start(unit, slot))[1]
    )
    return started


def test_a_step_needs_cuda():
    with pytest.raises(PagingError, match="CUDA"):
        CapturedStep(page(make(), {"": "cpu"}), lambda: None)


class Clocked(Stream):
    """A stream that knows what happened before: of every stream, how much it has waited for."""

    def __init__(self, name):
        self.name = name
        self.clock = {name: 0}

    def wait_event(self, event):
        for name, count in event.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def record_event(self):
        return dict(self.clock)

    def launch(self):
        self.clock[self.name] += 1
        return self.name, self.clock[self.name], dict(self.clock)


def precedes(first, second):
    name, count, _ = first
    return second[2].get(name, 0) >= count


class Launches(Scope):
    """A scope that notes every copy and every turn, and when."""

    log: ClassVar[list[tuple[str, int, int, tuple[str, int, dict[str, int]]]]] = []
    main: ClassVar[Clocked]

    def _fill(self, page, slot):
        record = self.stream.record_event
        self.stream.record_event = lambda: (
            self.log.append(("copy", id(slot), page.unit.index, self.stream.launch())),
            record(),
        )[1]
        super()._fill(page, slot)
        self.stream.record_event = record

    def bring_in(self, page):
        slot = super().bring_in(page)
        self.log.append(("turn", id(slot), page.unit.index, self.main.launch()))
        return slot

    def leave(self, slot):
        self.log.append(("end", id(slot), -1, self.main.launch()))
        super().leave(slot)

    def close(self):
        super().close()
        assert self.main.clock[self.stream.name] == self.stream.clock[self.stream.name]  # joined

    def _add(self, nbytes):
        slot = super()._add(nbytes)
        self.__dict__.setdefault("kept", []).append(slot)  # or its id would be another's
        return slot


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_streams_wait_for_each_other_whatever_the_order(cuda, monkeypatch, slots, seed):
    """Every copy happens before its page's turn, and after the end of every other turn in that slot."""
    chance = random.Random(seed)
    model = page(make(blocks=6), {"": "cpu"}, slots=slots)
    real = paging_of(model).pager.device
    for _ in range(5):
        model.order = [chance.randrange(6) for _ in range(chance.randrange(1, 9))]
        with torch.no_grad():
            World.capturing = False
            paging_of(model).pager.device = real
            for _ in range(chance.randrange(3)):
                model(tokens())
            pager = on_gpu(model, monkeypatch)
            Launches.log, Launches.main = [], Clocked("main")
            pager._graph_stream = Clocked("side")
            monkeypatch.setattr(pager_module, "Scope", Launches)
            current = SimpleNamespace(current_stream=lambda *_: Launches.main)
            monkeypatch.setattr(capture_module.torch, "accelerator", current)
            with captured():
                model(tokens())
        check_order(Launches.log)


def check_order(log):
    for number, (kind, slot, index, begin) in enumerate(log):
        if kind != "turn":
            continue
        end = end_of_turn(log, number)
        copies = [(entry[2], entry[3]) for entry in log if entry[0] == "copy" and entry[1] == slot]
        assert [i for i, when in copies if precedes(when, begin)][-1] == index
        assert all(precedes(when, begin) or precedes(end, when) for _, when in copies)


def end_of_turn(log, number):
    depth = 0
    for kind, slot, _, when in log[number:]:
        if slot == log[number][1] and kind != "copy":
            depth += 1 if kind == "turn" else -1
            if depth == 0:
                return when
    raise AssertionError("a turn without an end")
