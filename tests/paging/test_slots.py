from __future__ import annotations

import pytest
import torch

from tuckaway.paging.slots import Slots, device_memory


def test_memory_made_in_inference_mode_is_written_to_outside_it():
    with torch.inference_mode():
        memory = device_memory(8, torch.device("cpu"))
    memory.fill_(3)
    assert memory.tolist() == [3] * 8


def test_slots_are_added_one_by_one():
    slots = Slots(2, 512, torch.device("cpu"))
    assert slots.allocated_nbytes == 0
    first, second = slots.add(), slots.add(100)
    assert (first.index, second.index) == (0, 1)
    assert slots.allocated_nbytes == 612
    slots.clear()
    assert slots.allocated_nbytes == 0


def test_there_is_at_least_one():
    with pytest.raises(ValueError, match="at least one slot"):
        Slots(0, 512, torch.device("cpu"))
