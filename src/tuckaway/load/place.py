"""Where the bytes of each tensor finally lie: resident on a device, in a page in RAM, or in a page on disk.

A :class:`Destination` gives the loader components to fill and takes them back when they are full. What is quantized
is quantized on the device that executes, wherever its bytes go afterwards, so that every placement holds the same
bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch

from tuckaway.formats import Components
from tuckaway.load.sinks import Sink
from tuckaway.tensor import TensorSpec

__all__ = ["Destination", "InPage", "OnDevice", "OnDisk", "Streaming"]


class Destination(Protocol):
    """Takes one tensor."""

    def open(self, spec: TensorSpec) -> Components:
        """Return components to fill."""

    def close(self, components: Components) -> None:
        """Take the filled components to their place."""


class Streaming(ABC):
    """A destination that takes one tensor piece by piece, so that it is never whole in memory."""

    @abstractmethod
    def open(self, spec: TensorSpec) -> Components:
        """Return components to fill."""

    @abstractmethod
    def close(self, components: Components) -> None:
        """Take the filled components to their place."""

    @abstractmethod
    def sink(
        self, spec: TensorSpec, component: str, stored_dtype: torch.dtype, components: Components
    ) -> Sink:
        """Return what takes the pieces of the checkpoint's tensor for ``component`` (``""``: all of them)."""


class OnDevice:
    """Resident: the components are allocated on their device and stay there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.components: Components = {}

    def open(self, spec: TensorSpec) -> Components:
        """Allocate the components on the device."""
        self.components = spec.empty(self.device)
        return self.components

    def close(self, components: Components) -> None:
        """They are where they belong."""


class InPage:
    """In a page in RAM: the components are views into it, filled in place when the CPU does the work."""

    def __init__(self, views: Components, work_device: torch.device) -> None:
        self.views = views
        self.work_device = work_device

    def open(self, spec: TensorSpec) -> Components:
        """Return the views themselves, or components on the device that works."""
        return self.views if self.work_device.type == "cpu" else spec.empty(self.work_device)

    def close(self, components: Components) -> None:
        """Copy what was made on another device into the page."""
        if components is not self.views:
            for key, view in self.views.items():
                view.copy_(components[key])


class OnDisk:
    """In a page on disk: the components are made in memory, one tensor's at a time, and written."""

    def __init__(self, write: Callable[[str, torch.Tensor], None], work_device: torch.device) -> None:
        self.write = write
        self.work_device = work_device

    def open(self, spec: TensorSpec) -> Components:
        """Allocate the components on the device that works."""
        return spec.empty(self.work_device)

    def close(self, components: Components) -> None:
        """Write them."""
        for key, component in components.items():
            self.write(key, component.cpu())
