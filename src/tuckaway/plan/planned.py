"""A plan as data: where everything of a model goes and how many bytes it takes. Made by :func:`~tuckaway.plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuckaway.config import QuantizationConfig
from tuckaway.errors import PlanError
from tuckaway.files import PathLike, write_atomically
from tuckaway.plan.accounts import DeviceMemory
from tuckaway.plan.blocks import PlannedBlock
from tuckaway.plan.draw import draw
from tuckaway.plan.expect import Expected
from tuckaway.plan.machine import Speeds
from tuckaway.plan.memory import Device, format_bytes
from tuckaway.plan.text import filled, joined, pattern_of, table

__all__ = ["Plan", "place"]

_VERSION = 1

_PARTS = ("codes", "scales", "nested", "plain", "padding")
"""Parts of a block that the table shows."""

_HELD = ("weights", "padding", "slots", "cache", "buffers", "in use", "reserve", "loading", "peak")
"""Parts of a device's memory that the table shows."""


@dataclass(frozen=True)
class Plan:
    """Where everything of a model goes, in exact bytes. ``str()`` is a table, a notebook shows a picture.

    Args:
        name: the model's class, folder or Hub id.
        quantization: the quantization config as a dict; ``None``: unquantized.
        dtype: dtype of what is not quantized, as planned; ``None``: the model's own.
        device_map: module names to an accelerator's index, ``"cpu"`` or ``"disk"``.
        execution_device: the device that executes.
        slots: pages that it holds at once.
        slot_bytes: size of one.
        blocks: every block, with its place and bytes, in the model's order.
        devices: every device that holds something.
        offload_buffers: buffers of offloaded blocks are paged too.
        no_split_module_classes: class names of modules that stay whole.
        batch_size: that the reserve was estimated for.
        sequence_length: tokens that the reserve was estimated for.
        tied: groups of names that are one tensor.
        checkpoint_bytes: bytes to be read when it is loaded; ``None``: not known.
        speeds: speeds of the machine that times are expected from; ``None``: never measured.
        disk_cache_bytes: RAM that blocks on disk may stay in once they were read.

    Example:
        >>> import tuckaway
        >>> from torch import nn
        >>> with tuckaway.init_empty_weights():
        ...     model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)])
        >>> plan = tuckaway.plan(model, "nf4", max_memory={"cpu": "5MB"}, reserve_bytes=0)
        >>> plan.weights_bytes, plan.paged_bytes > 0
        (5900060, True)
        >>> tuckaway.Plan.from_dict(plan.to_dict()) == plan
        True
    """

    name: str
    quantization: Mapping[str, Any] | None
    dtype: str | None
    device_map: Mapping[str, Device]
    execution_device: Device
    slots: int
    slot_bytes: int
    blocks: tuple[PlannedBlock, ...]
    devices: tuple[DeviceMemory, ...]
    offload_buffers: bool = False
    no_split_module_classes: tuple[str, ...] = ()
    batch_size: int = 1
    sequence_length: int = 2048
    tied: tuple[tuple[str, ...], ...] = ()
    checkpoint_bytes: int | None = None
    speeds: Speeds | None = None
    disk_cache_bytes: int = 0

    # Bytes

    @property
    def weights_bytes(self) -> int:
        """Exact bytes of all tensors; tied ones once."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def paged_bytes(self) -> int:
        """Bytes that are brought to the executing device for every forward."""
        return sum(block.nbytes for block in self.blocks if block.paged)

    @property
    def resident(self) -> bool:
        """Nothing is paged."""
        return self.paged_bytes == 0

    def on(self, device: Device) -> DeviceMemory:
        """Return what one device holds; nothing, where it is in no plan."""
        return next((memory for memory in self.devices if memory.device == device), DeviceMemory(device))

    def bytes_by_format(self) -> dict[str, int]:
        """Return bytes by format."""
        totals: dict[str, int] = {}
        for block in self.blocks:
            for name, nbytes in block.formats.items():
                totals[name] = totals.get(name, 0) + nbytes
        return totals

    def check(self, weights: Mapping[Device, int]) -> None:
        """Check that a model that is being placed takes the bytes that were planned.

        Args:
            weights: bytes of its tensors by device.

        Raises:
            PlanError: it takes others: the plan is of another model, format or checkpoint.
        """
        for device in dict.fromkeys([*weights, *(memory.device for memory in self.devices)]):
            planned, found = self.on(device).weights_bytes, weights.get(device, 0)
            if planned != found:
                raise PlanError(
                    f"the plan puts {planned} bytes on {place(device)}, and the model has {found} there",
                    where=self.name,
                    hint="make the plan for this model, checkpoint and quantization_config",
                )

    # Expectations

    @property
    def expected(self) -> Expected:
        """Seconds that loading and a token take at the machine's measured speeds, where they are known."""
        return Expected.of(self.blocks, self.execution_device, self.checkpoint_bytes, self.speeds)

    @property
    def quantization_config(self) -> QuantizationConfig | None:
        """The config that the model is to be quantized with; ``None``: not at all."""
        return None if self.quantization is None else QuantizationConfig.from_dict(self.quantization)

    # As text, JSON and picture

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it; :meth:`from_dict` reads it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "version": _VERSION,
            **fields,
            "quantization": None if self.quantization is None else dict(self.quantization),
            "device_map": dict(self.device_map),
            "blocks": [{**vars(block), "formats": dict(block.formats)} for block in self.blocks],
            "devices": [vars(memory).copy() for memory in self.devices],
            "no_split_module_classes": list(self.no_split_module_classes),
            "tied": [list(group) for group in self.tied],
            "speeds": None if self.speeds is None else self.speeds.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PlanError: it is no plan, or one of a later version.
        """
        try:
            if content["version"] != _VERSION:
                raise PlanError(
                    f"the plan is of version {content['version']!r}, and this tuckaway reads {_VERSION}",
                    hint="make it again",
                )
            fields = {name: value for name, value in content.items() if name != "version"}
            speeds = fields.get("speeds")
            return cls(
                **{
                    **fields,
                    "blocks": tuple(PlannedBlock(**block) for block in fields["blocks"]),
                    "devices": tuple(DeviceMemory(**memory) for memory in fields["devices"]),
                    "no_split_module_classes": tuple(fields["no_split_module_classes"]),
                    "tied": tuple(tuple(group) for group in fields["tied"]),
                    "speeds": None if speeds is None else Speeds.from_dict(speeds),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is no plan: {error}", hint="save one with Plan.save") from error

    def save(self, path: PathLike) -> None:
        """Write the plan as JSON.

        Raises:
            StoreError: the file cannot be written.
        """
        write_atomically(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: there is no plan in the file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read a plan: {error}", where=path) from error
        return cls.from_dict(content)

    def picture(self, path: PathLike | None = None) -> str:
        """Draw GPU, RAM and disk with the blocks in them, as an SVG, and return it.

        Args:
            path: file to write it to; ``None``: none.

        Raises:
            StoreError: the file cannot be written.
        """
        svg = draw(self.name, self.title, self.blocks, self.devices)
        if path is not None:
            write_atomically(path, svg.encode())
        return svg

    @property
    def title(self) -> str:
        """Formats and sizes in one line."""
        formats = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.bytes_by_format().items())
        where = "all of it resident" if self.resident else f"{format_bytes(self.paged_bytes)} paged"
        return f"{format_bytes(self.weights_bytes)} ({formats}); {where}"

    def _repr_html_(self) -> str:
        return self.picture()

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {self.title}",
            table(*self.block_table(), right=3),
            table(*self.device_table(), right=1),
            *self.expected.lines(self.batch_size),
        ]
        return "\n\n".join(parts)

    def block_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return headings and cells of the blocks; those that differ in a number only are one line."""
        groups: dict[tuple[object, ...], list[PlannedBlock]] = {}
        for block in self.blocks:
            shape = (block.nbytes, block.padding_bytes, tuple(block.formats.items()))
            groups.setdefault((pattern_of(block.name), block.device, block.paged, shape), []).append(block)
        lines = [
            (
                joined([block.name for block in rows]) or "(the model itself)",
                place(rows[0].device) + (", paged" if rows[0].paged else ""),
                ", ".join(rows[0].formats),
                *(_size(sum(getattr(block, f"{part}_bytes") for block in rows)) for part in _PARTS),
            )
            for rows in groups.values()
        ]
        return filled(("blocks", "on", "format", *_PARTS), lines)

    def device_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return headings and cells of the devices: what stays, what comes with running, what with loading."""
        lines = [
            (
                place(memory.device),
                *(_size(getattr(memory, f"{part.replace(' ', '_')}_bytes")) for part in _HELD),
                "" if memory.free_bytes is None else format_bytes(memory.free_bytes),
            )
            for memory in self.devices
        ]
        return filled(("device", *_HELD, "free"), lines)


def place(device: Device) -> str:
    """Write a device for people."""
    return f"GPU {device}" if isinstance(device, int) else {"cpu": "RAM"}.get(device, device)


def _size(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else ""
