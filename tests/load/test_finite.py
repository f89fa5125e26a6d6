"""What is counted of values that no scale can be made of, piece by piece and on every device."""

from __future__ import annotations

import math

import pytest
import torch

from tuckaway.load.finite import NonFinite, counted

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_every_piece_counts(device, dtype, bad):
    found = NonFinite()
    for number in (0, 1, 5, 64):
        piece = torch.randn(64, dtype=torch.float32).to(dtype)
        piece[:number] = bad
        found.add(piece.to(device))
    assert counted({"w": found}) == {"w": 70}


@pytest.mark.parametrize("device", DEVICES)
def test_values_count_from_the_limit_on(device):
    found = NonFinite(limit=8.0)
    found.add(torch.tensor([7.999, 8.0, -8.0, 9.0, -7.999, math.nan], device=device))
    assert counted({"w": found}) == {"w": 4}


@pytest.mark.parametrize("device", DEVICES)
def test_integers_and_empty_pieces_are_no_matter(device):
    found = NonFinite()
    found.add(torch.tensor([2**31 - 1], dtype=torch.int32, device=device))
    found.add(torch.empty(0, device=device))
    assert counted({"w": found}) == {"w": 0}


@pytest.mark.gpu
def test_weights_of_several_devices_are_counted_together():
    weights = {name: NonFinite() for name in ("here", "there", "fine")}
    weights["here"].add(torch.tensor([math.nan, 1.0], device="cuda"))
    weights["there"].add(torch.tensor([math.inf, math.nan, 1.0]))
    weights["fine"].add(torch.ones(4, device="cuda"))
    assert counted(weights) == {"here": 1, "there": 2, "fine": 0}
