"""Ctrl-C at every moment of a paged model's life at which Python delivers it: nothing is lost, and all goes on after.

``tests/faults/test_interrupts.py`` has real signals at random moments; here each moment in tuckaway's own code has its
turn. By default some of them have, spread evenly.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paging_models
from heavy import count
from interrupting import Moments, interrupted_anew, interrupted_at, wait_until
from paging_models import make, page, tokens
from tuckaway import materialize
from tuckaway.paging.state import Paging, paging_of

MAPS = {"cpu": {"": "cpu"}, "disk": {"": "cpu", "blocks": "disk"}}


def every(seen: int, light: int = 40, heavy: int | None = None) -> int:
    """A step that leaves some ``light`` moments by default; odd, as what recurs in every block is mostly even."""
    return max(seen // count(light, heavy or seen), 1) | 1


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tuckaway")]


def moments_of(work: Callable[[], object]) -> int:
    """How many there are in a piece of work."""
    with Moments() as moments:
        work()
    return moments.seen


def pages_of(model: Any) -> Paging:
    paging = paging_of(model)
    assert paging is not None
    return paging


@pytest.fixture(autouse=True)
def autograd() -> Iterator[None]:
    gc.collect()  # models of earlier tests, with their files and threads
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(params=["cpu", "disk", "kept"])
def paged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Makes the same paged model again and again, of pages at home in one place."""
    made: list[Any] = []
    folder = None if request.param == "cpu" else tmp_path / "store"
    where = MAPS["cpu" if request.param == "cpu" else "disk"]
    options = {"disk_cache_bytes": 2**20} if request.param == "kept" else {}

    def again() -> Any:
        model = page(make(blocks=3), where, folder, fingerprint="the same", **options)
        made.append(pages_of(model))
        return model

    yield again
    for paging in made:
        paging.close()


@pytest.mark.heavy
@pytest.mark.timeout(600)
@torch.no_grad()
def test_a_forward(paged: Callable[[], Any]) -> None:
    expected, model = make(blocks=3)(tokens()), paged()
    paging = pages_of(model)
    for _ in range(3):
        assert torch.equal(model(tokens()), expected)
    slots, fds, threads = list(paging.pager.slots.all), descriptors(), len(reading_threads())
    tried = 0
    for moment in interrupted_at(lambda: model(tokens()), every=every(moments_of(lambda: model(tokens())))):
        assert not torch.is_grad_enabled(), moment.where
        assert torch.equal(model(tokens()), expected), moment.where
        assert not any(one.turns or one.users for one in paging.pages), moment.where
        assert all(b.tensors[b.attribute] is b.away for one in paging.pages for b in one.bindings), (
            moment.where
        )
        assert paging.pager.slots.all == slots, moment.where
        assert (descriptors(), len(reading_threads())) == (fds, threads), moment.where
        tried += 1
    assert tried > 30


@pytest.mark.heavy
@pytest.mark.timeout(600)
@torch.no_grad()
def test_a_first_forward(paged: Callable[[], Any]) -> None:
    """Slots are allocated, threads are started."""
    expected = make(blocks=3)(tokens())
    model = paged()
    step = every(moments_of(lambda: model(tokens())), 40, 150)
    pages_of(model).close()
    tried = 0
    for model, moment in interrupted_anew(paged, lambda model: model(tokens()), step):
        tried += 1
        assert torch.equal(model(tokens()), expected), moment.where
        paging = pages_of(model)
        assert len(paging.pager.slots.all) <= paging.pager.slots.count, moment.where
        assert not any(one.turns or one.users for one in paging.pages), moment.where
        paging.close()
        wait_until(lambda: not reading_threads())
    assert tried * step > 30


@pytest.mark.heavy
def test_a_forward_whose_weights_are_copied_for_autograd(paged: Callable[[], Any]) -> None:
    model = paged()
    paging = pages_of(model)
    wanted = torch.randn(2, 6, paging_models.WIDTH, requires_grad=True)

    def work() -> torch.Tensor:
        return model.blocks[1](wanted)

    expected, slots = work().detach(), list(paging.pager.slots.all)
    for moment in interrupted_at(work, every=every(moments_of(work))):
        assert torch.is_grad_enabled(), moment.where
        assert torch.equal(work(), expected), moment.where
        assert not any(one.turns or one.users for one in paging.pages), moment.where
        assert len(paging.pager.slots.all) <= max(len(slots), 2), moment.where


@pytest.mark.heavy
@pytest.mark.timeout(600)
@torch.no_grad()
def test_bringing_back_after_an_interrupted_forward(paged: Callable[[], Any]) -> None:
    """Without another forward in between."""
    expected = make(blocks=3)(tokens())
    model = paged()
    step = every(moments_of(lambda: model(tokens())), 13, 150)
    for model, moment in interrupted_anew(paged, lambda model: model(tokens()), step):
        materialize(model)
        assert_ordinary(model, expected, moment.where)


@pytest.mark.heavy
@pytest.mark.timeout(600)
@torch.no_grad()
def test_bringing_back(paged: Callable[[], Any]) -> None:
    """Interrupted, it leaves a model that computes the same, and can be brought back still."""
    expected = make(blocks=3)(tokens())
    fds = descriptors()

    def used() -> Any:
        model = paged()
        model(tokens())
        return model

    model = used()
    step = every(moments_of(lambda: materialize(model)), 13, 40)
    for tried, (model, moment) in enumerate(interrupted_anew(used, materialize, step)):
        if tried % 2 and model.blocks[0].up.weight.device.type != "meta":
            assert torch.equal(model(tokens()), expected), moment.where
        materialize(model)
        assert_ordinary(model, expected, moment.where)
        gc.collect()
        assert descriptors() <= fds, moment.where
        assert not reading_threads(), moment.where


def assert_ordinary(model: Any, expected: torch.Tensor, where: str) -> None:
    assert paging_of(model) is None, where
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), where
    assert not any("_hf_hook" in m.__dict__ for m in model.modules()), where
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), where
    assert torch.equal(model.to("cpu")(tokens()), expected), where
