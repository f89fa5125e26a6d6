"""Pages in host memory: one allocation of exactly their size, pinned where a device executes.

``torch.Tensor.pin_memory`` rounds every allocation up to a power of two (up to 1.9 times the bytes). Here the memory
is an anonymous map of the exact size, and a thread has the driver lock it piece by piece while loading goes on, because
locking 4 GiB takes 2.4 s.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import torch

from tuckaway.paging.page import PageLayout

__all__ = ["PIN_STEP", "Arena", "host_memory"]

logger = logging.getLogger("tuckaway")

PIN_STEP = 256 * 2**20
"""Bytes pinned at a time: about 150 ms."""

_PINNED_RATE, _PAGEABLE_RATE = 55e9, 7e9
"""Bytes a second to a device on PCIe 5, measured: what the warning about unpinned memory reckons with."""


def host_memory(nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of page-aligned host memory as uint8 ``[nbytes]``, touched by nobody yet.

    The map lives as long as any view of the tensor does.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8, count=nbytes)


class Arena:
    """CPU pages, each a stretch of one allocation.

    Args:
        layouts: one a page.
        pin: lock the memory for fast copies. ``None``: if there is an accelerator.
        device: which accelerator the driver is asked through; ``None``: the current one.

    Example:
        >>> arena = Arena([PageLayout([(("w", ""), (4,), torch.float32)])], pin=False)
        >>> arena.page(0).shape, arena.nbytes
        (torch.Size([256]), 4096)
    """

    def __init__(
        self, layouts: Sequence[PageLayout], *, pin: bool | None = None, device: torch.device | None = None
    ) -> None:
        self.layouts = tuple(layouts)
        self._starts: list[int] = []
        end = 0
        for layout in self.layouts:
            self._starts.append(end)
            end += layout.extent
        self.nbytes = end
        _unpin_waiting()
        self.buffer = host_memory(end)
        self._wanted = (
            torch.accelerator.is_available() if pin is None else pin and torch.accelerator.is_available()
        )
        self._device = device
        self._registered: list[int] = []
        self._pinned_to = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def pinned(self) -> bool:
        """Whether all of it is pinned."""
        return self._pinned_to == self.nbytes

    def page(self, index: int) -> torch.Tensor:
        """Return the bytes of a page, uint8 ``[layout.nbytes]``."""
        start = self._starts[index]
        return self.buffer[start : start + self.layouts[index].nbytes]

    def extent(self, index: int) -> torch.Tensor:
        """Return a page with the padding behind it, uint8 ``[layout.extent]``: what a direct read fills."""
        start = self._starts[index]
        return self.buffer[start : start + self.layouts[index].extent]

    def pin_step(self, nbytes: int = PIN_STEP) -> bool:
        """Pin the next pages, ``nbytes`` or a little more; return whether anything is left to pin."""
        with self._lock:
            if not self._wanted or self._pinned_to >= self.nbytes:
                return False
            # whole pages, because no copy may cross from one registered piece into another
            ends = (*self._starts[1:], self.nbytes)
            end = next((end for end in ends if end >= self._pinned_to + nbytes), self.nbytes)
            address, size = self.buffer.data_ptr() + self._pinned_to, end - self._pinned_to
            if not _register(address, size, self._device):
                self._wanted = False
                self._warn(self.nbytes - self._pinned_to)
                return False
            self._registered.append(address)
            self._pinned_to = end
            return end < self.nbytes

    def _warn(self, nbytes: int) -> None:
        logger.warning(
            "could not pin %d MiB of host memory (%d MiB are pinned): to bring it to the device takes about %.2f s "
            "instead of %.2f s each time. Raise the limit on locked memory (ulimit -l), or offload less to the CPU",
            nbytes >> 20,
            self._pinned_to >> 20,
            nbytes / _PAGEABLE_RATE,
            nbytes / _PINNED_RATE,
        )

    def start_pinning(self) -> None:
        """Pin all of it in a thread, beside whoever fills it; :meth:`pin` waits for the end."""
        if self._wanted and self._thread is None and self.nbytes:
            self._thread = threading.Thread(target=self._pin_on, name="tuckaway-pin", daemon=True)
            self._thread.start()

    def _pin_on(self) -> None:
        try:
            while self.pin_step():
                pass
        except BaseException as error:
            self._error = error

    def pin(self) -> bool:
        """Pin what is not pinned yet; return whether all of it is now.

        Raises:
            BaseException: what went wrong in the thread that pinned.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        while self.pin_step():
            pass
        return self.pinned

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """Unpin and let go of the memory; views that are still held keep it alive. Twice does no harm."""
        self._wanted = False  # ends the thread
        self._join()
        _unpin(self._registered, self.buffer)
        self._registered = []
        self._pinned_to = 0
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.layouts, self._starts, self.nbytes = (), [], 0

    def __del__(self) -> None:
        # memory that is freed while registered stays locked for the life of the process
        with contextlib.suppress(AttributeError, RuntimeError, ImportError):
            _unpin(self._registered, self.buffer)


_still_pinned: list[tuple[list[int], torch.Tensor]] = []
"""Memory that was let go of while a graph was being captured."""


def _unpin(addresses: list[int], memory: torch.Tensor) -> None:
    """Unpin ``memory``, or keep it until the next time if a graph is being captured, which waiting would invalidate.

    The collector may find an old model at any moment, in a capture too.
    """
    if addresses:
        _still_pinned.append((addresses, memory))
    _unpin_waiting()


def _unpin_waiting() -> None:
    while _still_pinned and not _capturing():
        _unregister(_still_pinned.pop()[0])


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _register(address: int, nbytes: int, device: torch.device | None = None) -> bool:
    """Lock host memory for the accelerator's copies. Only the CUDA runtime (and ROCm's) offers it to Python."""
    if not torch.cuda.is_available():
        return False
    # 1: cudaHostRegisterPortable, valid for every device. The binding returns an error code, and may raise as well
    try:
        # a thread begins on device 0, and asking there would set that one up
        with torch.cuda.device(device):
            if int(_runtime().cudaHostRegister(address, nbytes, 1)) == 0:
                return True
    except RuntimeError:
        logger.debug("cudaHostRegister failed", exc_info=True)
    # the runtime reports the failure once more, to whoever asks next: let that be this
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def _unregister(addresses: Sequence[int]) -> None:
    if addresses:
        torch.accelerator.synchronize()  # a copy may still be reading
    for address in addresses:
        _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()
