from __future__ import annotations

import os

import pytest
import torch

from tuckaway.errors import StoreError
from tuckaway.plan.measure import measure_speeds


def test_every_speed_there_is_and_no_file_left(tmp_path):
    speeds = measure_speeds(tmp_path / "new", file_bytes=20 * 2**20 + 7)
    assert speeds.host > 0
    assert speeds.page_cache > 0
    assert (speeds.disk is not None) == hasattr(os, "posix_fadvise")
    assert (speeds.bus is not None) == (speeds.memory is not None) == torch.accelerator.is_available()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        measure_speeds(tmp_path / "file")
