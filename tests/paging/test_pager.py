from __future__ import annotations

import logging
import os
import sys
import threading
import warnings

import pytest
import torch

from paging_models import WIDTH, Block, make, page, tokens
from tuckaway.errors import ChecksumError, PagingError
from tuckaway.paging import paging_of
from tuckaway.paging.reading import CellReader
from tuckaway.paging.transfer import Transfer


@pytest.fixture
def copies(monkeypatch):
    """Names of the pages that were brought in, in order."""
    started: list[str] = []
    start = Transfer.start
    monkeypatch.setattr(
        Transfer, "start", lambda self, unit, slot: (started.append(unit.name), start(self, unit, slot))[1]
    )
    return started


CYCLE = ["embedding", *(f"blocks.{i}" for i in range(5)), "norm"]


def forward(model):
    with torch.no_grad():
        return model(tokens())


def test_the_next_page_is_brought_ahead_from_the_first_forward_on(copies):
    model = page(make(), {"": "cpu"})
    forward(model)
    # the head asks for the embedding again: the first guess is the model's order, in which it comes first
    assert copies == ["Net", *CYCLE, "embedding", "blocks.0"]


def test_once_the_order_is_known_every_page_is_copied_once_a_forward(copies):
    model = page(make(), {"": "cpu"}, slots=2)
    forward(model)
    forward(model)
    copies.clear()
    for _ in range(3):
        forward(model)
    # embedding: once for the head, once more ahead of the next forward only if it was given up in between
    assert sorted(set(copies)) == sorted(CYCLE)
    assert all(copies.count(name) <= 3 for name in CYCLE if name.startswith("blocks") or name == "norm")
    assert copies.count("embedding") <= 6


def test_repeated_blocks_are_foreseen(copies):
    model = page(make(), {"": "cpu"})
    model.order = [0, 1, 0, 2, 0, 3]
    for _ in range(3):
        forward(model)
    copies.clear()
    misses = count_misses(model)
    for _ in range(3):
        forward(model)
    assert misses == []


def count_misses(model):
    pager = paging_of(model).pager
    misses: list[str] = []
    bring_in = pager.bring_in

    def counting(page, **options):
        if page.slot is None:
            misses.append(page.unit.name)
        return bring_in(page, **options)

    pager.bring_in = counting
    return misses


def test_a_wrong_guess_does_not_end_guessing():
    model = page(make(), {"": "cpu"})
    for order in ([0, 1, 2, 3, 4], [4], [1, 3], [0, 1, 2, 3, 4]):
        model.order = order
        forward(model)
        forward(model)
        misses = count_misses(model)
        forward(model)
        assert misses == [], order


def test_more_slots_keep_more_pages(copies):
    counts = []
    for slots in (2, 4, 6, 7):
        model = page(make(), {"": "cpu"}, slots=slots)
        forward(model)
        forward(model)
        copies.clear()
        for _ in range(3):
            forward(model)
        counts.append(len(copies))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_slots_are_of_one_size_and_no_more_than_asked(copies):
    model = page(make(), {"": "cpu"}, slots=2)
    assert paging_of(model).pager.nbytes == 0
    forward(model)
    pager, plan = paging_of(model).pager, paging_of(model).plan
    assert [slot.buffer.numel() for slot in pager.slots.all] == [plan.slot_nbytes] * 2
    assert pager.nbytes == plan.device_nbytes(2)


def test_more_pages_in_use_than_slots(caplog):
    model = page(make(), {"": "cpu"}, slots=2)
    pager = paging_of(model).pager
    with caplog.at_level(logging.DEBUG, logger="tuckaway"):
        turns = [pager.bring_in(p) for p in pager.pages]
    assert len(pager.slots.all) == 7
    assert "more than 2 pages in use" in caplog.text
    resident = make()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resident.get_parameter(name)), name
    for turn in turns:
        pager.release(turn)
    assert torch.equal(forward(model), forward(make()))


def test_the_same_tensors_come_back_with_the_same_slot():
    model = page(make(blocks=3), {"": "cpu"})
    keep: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, *_: keep.append(m.up.weight))
    for _ in range(20):
        forward(model)
    assert len({id(weight) for weight in keep}) <= 2 * 3


def test_a_page_with_storage_of_its_own_survives_its_turn():
    model = page(make(), {"": "cpu"})
    pager = paging_of(model).pager
    block = pager.pages[2]
    turn = pager.bring_in(block, own=True)
    weight = model.blocks[0].up.weight
    pager.release(turn)
    for other in pager.pages:
        pager.release(pager.bring_in(other))
    assert torch.equal(weight, make().blocks[0].up.weight)
    assert model.blocks[0].up.weight.is_meta


def test_own_storage_is_not_taken_away_by_another_turn():
    model = page(make(), {"": "cpu"})
    pager = paging_of(model).pager
    block = pager.pages[2]
    own = pager.bring_in(block, own=True)
    weight = model.blocks[0].up.weight
    other = pager.bring_in(block)
    assert model.blocks[0].up.weight is weight
    pager.release(other)
    assert model.blocks[0].up.weight is weight
    pager.release(own)
    assert model.blocks[0].up.weight.is_meta
    assert block.users == block.turns == set()


def test_disk_pages_are_read_by_another_thread(tmp_path, monkeypatch):
    readers = set()
    read = CellReader.read
    monkeypatch.setattr(
        CellReader,
        "read",
        lambda *args, **o: (readers.add(threading.current_thread().name), read(*args, **o))[1],
    )
    forward(page(make(), {"": "disk"}, tmp_path))
    assert readers
    assert all(name.startswith("tuckaway-page_") for name in readers)


def test_a_failed_read_ahead_surfaces_only_if_the_page_is_used(tmp_path, monkeypatch):
    model = page(make(), {"": "disk"}, tmp_path)
    want = forward(make())
    reader = paging_of(model).homes.store.reader
    read, bad = reader.read, paging_of(model).homes.number(paging_of(model).plan.page_of("blocks.1.up.bias"))

    def broken(index, number, out, **options):
        if index == bad:
            raise ChecksumError("broken")
        read(index, number, out, **options)

    monkeypatch.setattr(reader, "read", broken)
    with torch.no_grad():
        model.blocks[0](torch.zeros(1, WIDTH))  # guesses blocks.1
        model.blocks[2](torch.zeros(1, WIDTH))
        for _ in range(2):
            with pytest.raises(ChecksumError, match="broken"):
                model(tokens())
    monkeypatch.undo()
    assert torch.equal(forward(model), want)


def test_a_closed_pager_says_so():
    model = page(make(), {"": "cpu"})
    forward(model)
    paging_of(model).close()
    paging_of(model).close()
    with pytest.raises(PagingError, match="let go of"):
        forward(model)


def test_pages_of_nothing(tmp_path):
    model = torch.nn.ModuleList([Block(), torch.nn.Identity()])
    model.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 3)))
    page(model, {"": "disk"}, tmp_path)
    with torch.no_grad():
        model[1](model[0](torch.zeros(1, WIDTH)))


class Experts(torch.nn.Module):
    """A router that chooses 2 of 16 anew for every token, between two blocks that are always used."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Block(), Block()
        self.experts = torch.nn.ModuleList(Block() for _ in range(16))

    def forward(self, x, chosen):
        x = self.first(x)
        return self.last(sum(self.experts[i](x) for i in chosen))


def test_only_the_experts_that_a_token_uses_are_copied(copies):
    """A guess that was wrong is not repeated, so that hardly any other is brought in vain."""
    resident, model = make(Experts), page(make(Experts), {"": "cpu"})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        for token in range(120):
            chosen = torch.randperm(16, generator=generator)[:2].tolist()
            assert torch.equal(model(x, chosen), resident(x, chosen))
            if token == 19:
                copies.clear()
    needed = 100 * 4
    assert len(copies) < 1.3 * needed
    assert sum(name.startswith("experts") for name in copies) < 1.4 * 200


def test_a_wait_that_is_interrupted_does_no_harm(tmp_path, monkeypatch):
    model, want = page(make(), {"": "disk"}, tmp_path), forward(make())
    wait, count = Transfer.wait, [0]

    def interrupted(self, slot):
        count[0] += 1
        if count[0] % 5 == 0:
            raise KeyboardInterrupt
        wait(self, slot)

    monkeypatch.setattr(Transfer, "wait", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            forward(model)
    monkeypatch.undo()
    for _ in range(2):
        assert torch.equal(forward(model), want)
    assert all(page.users == page.turns == set() for page in paging_of(model).pages)


def test_disk_pages_that_stay_in_memory_are_read_once(tmp_path, monkeypatch):
    read: list[tuple[int, int]] = []
    whole = CellReader.read
    monkeypatch.setattr(
        CellReader, "read", lambda self, i, n, out, **o: (read.append((i, n)), whole(self, i, n, out, **o))[1]
    )
    model, want = page(make(), {"": "disk"}, tmp_path, disk_cache_bytes=3 * 2**14), forward(make())
    for _ in range(4):
        assert torch.equal(forward(model), want)
    paging = paging_of(model)
    kept = [p.unit for p in paging.pages if paging.homes.kept(p.unit) is not None]
    assert 1 <= len(kept) < len(paging.pages)
    for unit in kept:
        assert read.count((paging.homes.number(unit), 0)) == 1
        assert paging.homes.in_memory(unit) is not None


def test_a_fork_of_the_process_says_so_and_leaves_the_folder_alone(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path, fingerprint="m")
    forward(model)
    before = {path.name for path in tmp_path.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            forward(model)
        except PagingError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            paging_of(model).homes.close()  # as it would at the end of a process that exits by itself
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {path.name for path in tmp_path.iterdir()} == before
    assert torch.equal(forward(model), forward(make()))


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_ten_thousand_turns_in_eight_threads_give_the_same_bits(tmp_path, home):
    resident, model = make(), page(make(), {"": home}, tmp_path, slots=3)
    inputs = [tokens(seed) for seed in range(8)]
    with torch.no_grad():
        wants = [resident(x) for x in inputs]
    turns, failures = [0] * 8, []
    interval = sys.getswitchinterval()

    def work(number):
        try:
            with torch.no_grad():
                while turns[number] < 10_000 // 8 and not failures:
                    assert torch.equal(model(inputs[number]), wants[number])
                    turns[number] += 8  # pages a forward
        except BaseException as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert sum(turns) >= 10_000
    assert all(page.users == page.turns == set() for page in paging_of(model).pages)
