from __future__ import annotations

import torch
from torch import nn

from paging_models import Block
from tuckaway.paging.tree import as_device, home_of, is_below, is_called, prefixes


def test_devices_compare_equal():
    assert as_device("cpu") == as_device(torch.device("cpu", 0)) == torch.device("cpu")
    assert as_device("cuda:1") == torch.device("cuda", 1)
    assert as_device("disk", torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert as_device("meta") == torch.device("meta")


def test_who_is_called():
    assert is_called(nn.Linear(1, 1))
    assert is_called(nn.Sequential())
    assert is_called(Block())
    assert not is_called(nn.ModuleList())
    assert not is_called(nn.ModuleDict())
    assert not is_called(nn.ParameterList())


def test_paths():
    assert list(prefixes("a.b.c")) == ["a.b.c", "a.b", "a", ""]
    assert list(prefixes("")) == [""]
    assert is_below("a.b", "a")
    assert is_below("a", "")
    assert not is_below("ab", "a")
    assert not is_below("a", "a")


def test_homes():
    values = (0, "cpu", "disk", "cuda:1", torch.device("cpu"), torch.device("cuda", 1))
    assert [home_of(value) for value in values] == ["0", "cpu", "disk", "cuda", "cpu", "cuda"]
