"""Memory of this process, against memory that was just taken."""

from __future__ import annotations

import mmap
from importlib.metadata import version

import torch

from tuckaway.cli.machine import conditions
from tuckaway.cli.memory import memory, peak_device_bytes, peak_process_bytes


def test_what_is_taken_is_seen() -> None:
    before = memory()
    # 512 MiB: pages of libraries that others come to share count no more; and mapped, as an allocator may still hold
    # as much from before
    taken = torch.frombuffer(mmap.mmap(-1, 2**29), dtype=torch.uint8).fill_(1)
    after = memory()
    assert after.process_bytes - before.process_bytes > 0.9 * taken.nbytes
    assert peak_process_bytes() >= after.process_bytes - before.process_bytes
    assert (peak_device_bytes() == 0) == (not torch.accelerator.is_available() or after.device_bytes == 0)


def test_conditions_say_what_a_figure_depends_on() -> None:
    found = conditions()
    assert found["versions"]["torch"] == version("torch")
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
