"""The ring: how many buffers for which devices, and when they are used again."""

from __future__ import annotations

import torch

from tuckaway.checkpoint import Ring
from tuckaway.checkpoint.ring import Slot

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_towards_the_cpu_two_buffers_and_a_thread():
    assert Ring.towards(CPU) == Ring.towards() == Ring.towards(CPU, torch.device("meta")) == Ring()
    assert [slot.nbytes for slot in Ring().slots(100)] == [100, 100]


def test_towards_accelerators_each_named_once():
    ring = Ring.towards(GPU, CPU, torch.device("cuda", 1), GPU)
    assert ring.devices == (GPU, torch.device("cuda", 1))
    assert ring.count == 16
    assert 1 <= ring.threads <= 14


def test_memory_is_made_once_and_only_for_what_fits():
    slot = Slot(64)
    first = slot.memory(10)
    assert first.numel() == 64
    assert slot.memory(64).data_ptr() == first.data_ptr()
    assert slot.memory(65).data_ptr() != first.data_ptr()
    slot.handed_over()
    assert slot.memory(1).data_ptr() == first.data_ptr()


class Event:
    def __init__(self, waited: list[str], name: str) -> None:
        self.waited, self.name = waited, name

    def synchronize(self) -> None:
        self.waited.append(self.name)


def test_a_slot_waits_for_the_copies_to_all_devices():
    slot, waited = Slot(64), []
    slot._copied = [Event(waited, "0"), Event(waited, "1")]
    slot.memory(1)
    assert waited == ["0", "1"]
    slot.memory(1)
    assert waited == ["0", "1"]
