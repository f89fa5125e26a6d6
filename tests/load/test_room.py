"""Resident weights lie side by side in one block, and take what the plan says."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import tuckaway
from tuckaway.load.room import make_room
from tuckaway.plan.allocator import ALLOCATION, UNSPLIT, large_bytes, rounding_bytes, slack_bytes
from tuckaway.tensor import TensorSpec


def test_only_what_is_cut_out_of_large_blocks_is_counted():
    edge = TensorSpec((UNSPLIT,), torch.uint8)
    assert large_bytes(edge) == 0
    assert large_bytes(TensorSpec((UNSPLIT + 1,), torch.uint8)) == UNSPLIT + ALLOCATION
    assert rounding_bytes(TensorSpec((UNSPLIT + 1,), torch.uint8)) == ALLOCATION - 1
    assert (slack_bytes(0), slack_bytes(UNSPLIT), slack_bytes(UNSPLIT + 1)) == (0, 512, 512 + UNSPLIT)


def test_nothing_is_asked_of_the_cpu():
    make_room([(torch.device("cpu"), TensorSpec((2**62,), torch.uint8))], 0)  # would fail


@pytest.mark.gpu
def test_a_block_that_does_not_fit_is_done_without():
    before = torch.cuda.memory_reserved()
    make_room([(torch.device("cuda", 0), TensorSpec((2**50,), torch.uint8))], 0)
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_loaded_model_takes_what_is_planned(tmp_path, format):
    """Codes of 2.2 MiB each: alone, eight of them would share blocks of 20 MiB, and the last take what is left."""
    with torch.device("cuda"):
        real = nn.Sequential(*[nn.Linear(2304, 2048, dtype=torch.bfloat16) for _ in range(40)])
    tuckaway.save_model(real, tmp_path)
    del real
    gc.collect()
    with tuckaway.init_empty_weights():
        model = nn.Sequential(*[nn.Linear(2304, 2048, dtype=torch.bfloat16) for _ in range(40)])
    memory = tuckaway.plan(model, format, {"": 0}).on(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    model = tuckaway.load_and_quantize_model(model, format, weights_location=tmp_path, device_map={"": 0})
    used = torch.cuda.memory_allocated() - base
    assert memory.in_use_bytes - 2 * UNSPLIT <= used <= memory.in_use_bytes
    assert torch.cuda.max_memory_allocated() - base <= memory.peak_bytes
    # segments of small tensors are of 2 MiB
    assert torch.cuda.memory_reserved() - reserved <= memory.in_use_bytes + memory.loading_bytes + 2**22
    assert tuckaway.memory_footprint(model) == memory.weights_bytes
