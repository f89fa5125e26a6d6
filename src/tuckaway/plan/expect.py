"""Times to expect from bytes and speeds: :class:`Expected`. Limits, not promises: Python's own time comes on top."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tuckaway.plan.blocks import PlannedBlock
from tuckaway.plan.machine import Speeds
from tuckaway.plan.memory import Device

__all__ = ["Expected"]

TYPICAL = Speeds("typical", bus=25e9, disk=1.5e9, page_cache=6e9, host=40e9, memory=1e12)
"""What placements are compared by on a machine that was never measured; no time is shown from it."""


@dataclass(frozen=True)
class Expected:
    """Seconds, as the bytes that must move allow; ``None``: not known.

    Args:
        load_seconds: to load, with no file in the page cache.
        warm_load_seconds: to load, with all of them there.
        step_seconds: one forward of few tokens: every page is brought in, those on disk from the disk itself, and
            every weight is read once. Copying and computing go on at once: the slower one counts.
        warm_step_seconds: the same with the pages on disk in the page cache.
        transfer_seconds: the copying alone.
    """

    load_seconds: float | None = None
    warm_load_seconds: float | None = None
    step_seconds: float | None = None
    warm_step_seconds: float | None = None
    transfer_seconds: float | None = None

    @classmethod
    def of(
        cls,
        blocks: Iterable[PlannedBlock],
        execution_device: Device,
        checkpoint_bytes: int | None,
        speeds: Speeds | None,
    ) -> Expected:
        """Return what to expect of a placed model."""
        if speeds is None:
            return cls()
        blocks = list(blocks)
        from_disk = sum(block.nbytes for block in blocks if block.paged and block.device == "disk")
        paged = sum(block.nbytes for block in blocks if block.paged)
        everything = sum(block.nbytes for block in blocks)
        on_cpu = execution_device == "cpu"
        bus = 0.0 if on_cpu else _time(paged, speeds.bus)
        computing = _time(everything, speeds.host if on_cpu else speeds.memory)
        transfer = _longest(bus, _time(from_disk, speeds.disk))
        return cls(
            _slowest(checkpoint_bytes, speeds.disk, None if on_cpu else speeds.bus),
            _slowest(checkpoint_bytes, speeds.page_cache, None if on_cpu else speeds.bus),
            _longest(transfer, computing),
            _longest(bus, _time(from_disk, speeds.page_cache), computing),
            transfer,
        )

    def tokens_per_second(self, batch_size: int = 1) -> float | None:
        """Return the most tokens a second that a batch can be given."""
        return None if not self.step_seconds else batch_size / self.step_seconds

    def lines(self, batch_size: int = 1) -> list[str]:
        """Return it as text: nothing, where nothing is known."""
        parts = []
        if self.load_seconds is not None and self.warm_load_seconds is not None:
            parts.append(
                f"loads in {self.load_seconds:.1f} s, from the page cache in {self.warm_load_seconds:.1f} s"
            )
        rate = self.tokens_per_second(batch_size)
        if rate is not None:
            warm = batch_size / (self.warm_step_seconds or self.step_seconds or 1)
            cached = f" ({warm:.3g} from the page cache)" if warm > rate else ""
            parts.append(f"at most {rate:.3g} tokens/s{cached}")
        return [f"expected at the measured speeds: {'; '.join(parts)}"] if parts else []


def _time(nbytes: int, speed: float | None) -> float | None:
    if nbytes == 0:
        return 0.0
    return None if not speed else nbytes / speed


def _longest(*times: float | None) -> float | None:
    known = [time for time in times if time is not None]
    return max(known) if len(known) == len(times) else None


def _slowest(nbytes: int | None, *speeds: float | None) -> float | None:
    known = [speed for speed in speeds if speed]
    return None if nbytes is None or not known or not speeds[0] else nbytes / min(known)
