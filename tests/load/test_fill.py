"""The stream of a real file into destinations: order, pieces, and what happens when one of them fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tuckaway import QuantizationConfig, quantize
from tuckaway.checkpoint import Checkpoint
from tuckaway.formats import Components
from tuckaway.load.fill import fill, fill_from_tensors
from tuckaway.load.match import Feed, match_checkpoint
from tuckaway.load.place import OnDevice
from tuckaway.tensor import TensorSpec, layout_for

SHAPES = {"a": (33, 65), "b.weight": (128, 64), "c": (5,), "d": (), "e": (0, 64), "f.weight": (64, 96)}
CONFIG = QuantizationConfig()


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def specs(*, transposed: bool = False) -> dict[str, TensorSpec]:
    found = {name: TensorSpec(shape, torch.float32) for name, shape in SHAPES.items()}
    for name in ("a", "b.weight", "f.weight"):
        shape = SHAPES[name]
        turned = transposed and name == "f.weight"
        layout = layout_for(CONFIG, shape[::-1] if turned else shape, torch.float32, transposed=turned)
        found[name] = TensorSpec(shape, torch.float32, layout)
    return found


def feeds(folder: Path, state: dict[str, torch.Tensor], **options: Any) -> tuple[Feed, ...]:
    save_file(state, folder / "model.safetensors")
    return match_checkpoint(Checkpoint.open(folder), specs(**options), [], CONFIG, real=()).feeds


class Recorder(OnDevice):
    """Counts what happens to it."""

    def __init__(self, calls: list[str], name: str) -> None:
        super().__init__(torch.device("cpu"))
        self.calls = calls
        self.name = name

    def open(self, spec: TensorSpec) -> Components:
        self.calls.append(f"open {self.name}")
        return super().open(spec)

    def close(self, components: Components) -> None:
        self.calls.append(f"close {self.name}")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**20])
def test_every_destination_is_opened_filled_and_closed_once(
    piece_bytes: int, transposed: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    calls: list[str] = []
    places: dict[str, Recorder] = {}

    def destination_of(feed: Feed) -> Recorder:
        assert feed.names[0] not in places
        places[feed.names[0]] = Recorder(calls, feed.names[0])
        return places[feed.names[0]]

    fill(feeds(tmp_path, state, transposed=transposed), destination_of, piece_bytes=piece_bytes)
    assert sorted(calls) == sorted(f"{what} {name}" for name in SHAPES for what in ("open", "close"))
    for name, spec in specs(transposed=transposed).items():
        built = spec.build(places[name].components)
        if spec.layout is None:
            assert torch.equal(built, state[name])
        else:
            expected = quantize(state[name], CONFIG, transposed=spec.layout.transposed)
            assert all(torch.equal(built.components[k], v) for k, v in expected.components.items())
    # one at a time: nothing is open while the next one is, so memory is bounded by the largest
    for opened, closed in zip(calls[::2], calls[1::2], strict=True):
        assert opened.removeprefix("open ") == closed.removeprefix("close ")


def test_a_destination_that_fails_leaves_no_thread_and_no_file(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    class Full(OnDevice):
        def close(self, components: Components) -> None:
            raise MemoryError("full")

    ready = feeds(tmp_path, state)
    before = threading.active_count(), psutil.Process().num_fds()
    with pytest.raises(MemoryError, match="full") as caught:
        fill(ready, lambda feed: Full(torch.device("cpu")), piece_bytes=1000)
    # the traceback is alive, and what it refers to is closed nevertheless
    assert caught.value.__traceback__ is not None
    assert (threading.active_count(), psutil.Process().num_fds()) == before


def test_tensors_in_memory(state: dict[str, torch.Tensor]) -> None:
    wanted = specs(transposed=True)
    made: dict[str, OnDevice] = {}

    def destination_of(feed: Feed) -> OnDevice:
        made[feed.names[0]] = OnDevice(torch.device("cpu"))
        return made[feed.names[0]]

    state["b.weight"] = state["b.weight"].t().contiguous().t()  # rows lie apart
    fill_from_tensors(tuple(Feed((n,), wanted[n], {}, {}) for n in SHAPES), state, destination_of)
    for name, spec in wanted.items():
        built = spec.build(made[name].components)
        if spec.layout is None:
            assert torch.equal(built, state[name])
        else:
            expected = quantize(state[name], CONFIG, transposed=spec.layout.transposed)
            assert torch.equal(built.codes, expected.codes)


def test_nothing_to_read() -> None:
    fill((), lambda feed: pytest.fail("asked for a destination"), piece_bytes=1)
