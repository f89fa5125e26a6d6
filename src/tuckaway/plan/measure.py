"""Measure how fast this machine moves bytes, in a few seconds: :func:`measure_speeds`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from tuckaway.files import AtomicFile, make_folder, read_at
from tuckaway.plan.machine import Speeds, cache_folder, device_name

__all__ = ["measure_speeds"]

_FILE_BYTES = 256 * 2**20
_PIECE = 8 * 2**20
"""What one thread reads, and one copy carries: the bus gives 53.6 of its 54.8 GB/s at this size."""
_SECONDS = 0.3
"""How long a thing is repeated, at least."""


def measure_speeds(folder: str | os.PathLike[str] | None = None, *, file_bytes: int = _FILE_BYTES) -> Speeds:
    """Measure bus, disk, page cache, RAM and the accelerator's memory.

    Args:
        folder: on the disk to be measured, for a file that is removed again; ``None``: tuckaway's cache folder.
        file_bytes: its size.

    Raises:
        StoreError: the folder cannot be written to.
    """
    disk, cached = _file_speeds(make_folder(folder or cache_folder()), file_bytes)
    bus, memory = _device_speeds() if torch.accelerator.is_available() else (None, None)
    return Speeds(device_name(), bus, disk, cached, _host_speed(), memory)


def _host_speed() -> float:
    """Bytes a second that all cores together read from RAM."""
    nbytes = min(2**29, psutil.virtual_memory().available // 8)
    source = torch.ones(max(nbytes // 4, 1), dtype=torch.float32, device="cpu")
    return _rate(source.nbytes, lambda: source.sum())


def _file_speeds(folder: Path, nbytes: int) -> tuple[float | None, float]:
    """Bytes a second of a file that is not in the page cache, and of one that is."""
    threads = max(1, min(14, (os.cpu_count() or 2) - 2))
    with AtomicFile(folder / "speed", nbytes) as file:
        piece = os.urandom(_PIECE)  # zeros would be compressed by some disks
        for offset in range(0, nbytes, _PIECE):
            file.write(memoryview(piece)[: nbytes - offset])
        file.finish()
        cold = None
        if hasattr(os, "posix_fadvise"):
            fd = os.open(file.temp, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
            cold = nbytes / _read(file.temp, nbytes, threads)
        _read(file.temp, nbytes, threads)
        return cold, max(nbytes / _read(file.temp, nbytes, threads) for _ in range(3))


def _read(path: Path, nbytes: int, threads: int) -> float:
    """Seconds that reading a file takes."""
    buffers = [bytearray(_PIECE) for _ in range(threads)]
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def piece(number: int) -> None:
        view = memoryview(buffers[number % threads])
        read_at(fd, view[: nbytes - number * _PIECE], number * _PIECE, path)

    try:
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            list(pool.map(piece, range(-(-nbytes // _PIECE))))
            return time.perf_counter() - begin
    finally:
        os.close(fd)


def _device_speeds() -> tuple[float, float]:
    """Bytes a second from pinned RAM to the accelerator, and of reading the accelerator's own memory."""
    device = torch.accelerator.current_accelerator()
    free, _ = torch.accelerator.get_memory_info()
    source = torch.ones(min(2**28, free // 8), dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    bus = _rate(source.nbytes, lambda: target.copy_(source, non_blocking=True), torch.accelerator.synchronize)
    big = torch.ones(min(2**30, free // 4) // 4, dtype=torch.float32, device=device)
    memory = _rate(big.nbytes, lambda: big.sum(), torch.accelerator.synchronize)
    return bus, memory


def _rate(nbytes: int, act: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Bytes a second of an action that is repeated; the first time does not count."""
    act()
    wait()
    begin, turns = time.perf_counter(), 0
    while turns == 0 or time.perf_counter() - begin < _SECONDS:
        for _ in range(4):
            act()
        wait()
        turns += 4
    return nbytes * turns / (time.perf_counter() - begin)
