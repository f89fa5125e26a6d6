"""What is found slow, of machines that are described and not at hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tuckaway.cli.checks import Facts, findings, gather
from tuckaway.plan import Speeds

GPU = {"name": "GPU", "free_bytes": 70 * 10**9, "total_bytes": 80 * 10**9}
GOOD = Facts(
    gpu_present=True,
    torch_build="cuda 13.0",
    accelerators=(GPU,),
    triton=True,
    cores=16,
    threads=16,
    ram_bytes=128 * 10**9,
    ram_free_bytes=120 * 10**9,
    disk_free_bytes=10**12,
    speeds=Speeds("GPU", bus=55e9, disk=3e9, page_cache=40e9, host=90e9, memory=3e12),
)


def test_a_good_machine() -> None:
    assert findings(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"torch_build": "cpu", "accelerators": ()}, "torch is built for the CPU, and there is a GPU"),
        ({"accelerators": ()}, "cannot use the GPU"),
        ({"interpreted": True}, "TRITON_INTERPRET is set"),
        ({"triton": False}, "Triton is not installed"),
        ({"fast_checksums": False}, "zlib-ng is not installed"),
        ({"locked_bytes": 8 * 2**20}, "locked memory is limited to 8.39 MB"),
        ({"accelerators": ({**GPU, "free_bytes": 10**9},)}, "GPU 0 has 1.00 GB free of 80.00 GB"),
        ({"container_bytes": 16 * 10**9}, "the container may use 16.00 GB of 128.00 GB"),
        ({"ram_free_bytes": 10**9}, "1.00 GB of RAM are free"),
        ({"threads": 2}, "torch uses 2 of 16 cores"),
        ({"speeds": None}, "never measured"),
        ({"speeds": Speeds("GPU", bus=55e9, disk=2e8)}, "the disk reads 0.20 GB/s"),
        ({"speeds": Speeds("GPU", bus=6e9, disk=2e9)}, "the bus to the GPU carries 6.0 GB/s"),
    ],
)
def test_what_is_slow_is_found_alone(changes: dict[str, object], what: str) -> None:
    (found,) = findings(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert what in found.what
    assert found.cost
    assert found.do


def test_without_a_gpu_triton_and_locked_memory_do_not_matter() -> None:
    plain = replace(GOOD, gpu_present=False, accelerators=(), torch_build="cpu", triton=False, locked_bytes=1)
    assert findings(plain) == []


def test_this_machine() -> None:
    facts = gather(None)
    assert facts.cores >= 1
    assert 0 < facts.ram_free_bytes <= facts.ram_bytes
    assert len(facts.accelerators) == (
        torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    )
