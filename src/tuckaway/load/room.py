"""Memory on accelerators for all that is about to be loaded, in one block: :func:`make_room`.

torch's allocator keeps what is freed and cuts later requests out of it. So one large request, freed at once, leaves a
block that the weights then lie in side by side. Without it they lie in some 200 blocks of their own, each asked of the
driver while the checkpoint streams in, and most larger than what they hold: 4.21 GB were reserved for a model of 3.87.
Every weight remains a tensor of its own, with its own storage.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable

import torch

from tuckaway.plan.allocator import large_bytes
from tuckaway.tensor import TensorSpec

__all__ = ["make_room"]

_log = logging.getLogger("tuckaway")


def make_room(resident: Iterable[tuple[torch.device, TensorSpec]], work_bytes: int) -> None:
    """Have the allocator hold a free block for what will be allocated on the current streams.

    Args:
        resident: what will lie where.
        work_bytes: that loading takes beside it, on each accelerator.
    """
    wanted: dict[torch.device, int] = defaultdict(int)
    for device, spec in resident:
        wanted[device] += large_bytes(spec)
    for device, nbytes in wanted.items():
        if device.type in ("cpu", "meta", "mps") or not nbytes:
            continue
        with torch.accelerator.device_index(device.index):
            # blocks that are free but too small would stay beside the new one, and be filled first
            torch.accelerator.empty_cache()
            try:
                torch.empty(nbytes + work_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                # the work may take less, and smaller blocks may fit where one does not
                _log.debug("no block of %d bytes on %s", nbytes + work_bytes, device, exc_info=True)
