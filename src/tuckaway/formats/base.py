"""What a format is, and the registry of all formats.

A new format is one new file in this folder: a subclass of :class:`Format` with its name, decorated with
:func:`register`, and a line in ``formats/__init__.py`` that imports it. Nothing else in tuckaway lists formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from tuckaway.errors import ConfigError, nearest_names
from tuckaway.formats.layout import Components, Layout, Shape, Specs

__all__ = [
    "BoundLinear",
    "Emit",
    "Entries",
    "Format",
    "PieceQuantizer",
    "Serialized",
    "format_of",
    "register",
    "registered_formats",
]

_REGISTRY: dict[str, Format] = {}


class Entry(Protocol):
    """What a format asks of a checkpoint's tensor."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Shape: ...


Entries = Mapping[str, Entry]
BoundLinear = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

Emit = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Serialized:
    """A quantized parameter as it was found in a checkpoint.

    Args:
        layout: how it is to be read; ``transposed`` is left to whoever knows the module.
        sources: component name to the name of the checkpoint's tensor that holds it.
        values: components that the checkpoint holds in another way.
        consumed: all tensors of the checkpoint that belong to this parameter.
    """

    layout: Layout
    sources: dict[str, str]
    values: Components
    consumed: frozenset[str]


class PieceQuantizer(ABC):
    """Quantizes one tensor that arrives in pieces, straight into its components."""

    @abstractmethod
    def write(self, start: int, piece: torch.Tensor) -> None:
        """Quantize ``piece``, a 1-D run of the stored tensor from element ``start`` on.

        ``start`` is a multiple of :meth:`Format.piece_alignment`, and so is the length of all pieces but the last.
        """

    @abstractmethod
    def finish(self) -> None:
        """Do what needs the whole tensor (the scales of nested quantization)."""


class Format(ABC):
    """One way of storing a tensor in fewer bits. Stateless; one instance a name."""

    name: str

    @abstractmethod
    def component_specs(self, layout: Layout) -> Specs:
        """Return name, shape and dtype of every component, in the order they are stored; exact bytes follow."""

    @abstractmethod
    def piece_alignment(self, layout: Layout) -> int:
        """Return the number of elements a piece must start on a multiple of."""

    @abstractmethod
    def quantizer(self, layout: Layout, components: Components, emit: Emit | None = None) -> PieceQuantizer:
        """Return what quantizes a tensor of this layout into ``components``.

        Args:
            layout: how it is to be read.
            components: what is filled.
            emit: takes the codes of every piece, 1-D, with the position of the first; then ``components`` needs no
                ``codes``, and a tensor of any size takes the memory of its scales and one piece.
        """

    @abstractmethod
    def dequantize(self, components: Components, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        """Return the stored tensor (not transposed) in ``dtype``."""

    @abstractmethod
    def absmax(self, components: Components, layout: Layout) -> torch.Tensor:
        """Return the scales in fp32, restored when they are nested."""

    @abstractmethod
    def linear(
        self,
        x: torch.Tensor,
        components: Components,
        layout: Layout,
        bias: torch.Tensor | None,
        transpose: bool,
    ) -> torch.Tensor:
        """Return ``x @ S.T + bias`` (``transpose``) or ``x @ S + bias`` for the stored matrix ``S [rows, cols]``."""

    def bound_linear(self, components: Components, layout: Layout, transpose: bool) -> BoundLinear:
        """Return :meth:`linear` of these components as a function of ``x`` and bias alone.

        A weight keeps it for its eager calls, so that what does not change from call to call is looked up once.
        """

        def linear(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return self.linear(x, components, layout, bias, transpose)

        return linear

    @abstractmethod
    def embedding(
        self, index: torch.Tensor, components: Components, layout: Layout, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return rows ``index`` of the stored matrix, ``[*index.shape, cols]``."""

    @abstractmethod
    def grouped_linear(
        self,
        x: torch.Tensor,
        components: Components,
        layout: Layout,
        offs: torch.Tensor,
        transpose: bool,
    ) -> torch.Tensor:
        """Return the products of groups of rows with the matrices of a stack ``S [E, rows, cols]``.

        Rows ``offs[e - 1]`` to ``offs[e]`` of ``x`` are multiplied with ``S[e].T`` (``transpose``) or ``S[e]``.
        Only matrices that have rows are decoded, and never more than one of them at once.
        """

    @abstractmethod
    def gather(
        self, components: Components, layout: Layout, index: torch.Tensor
    ) -> tuple[Components, Layout] | None:
        """Return the parts ``index`` along the first dimension, copied as they are; None if a block spans two of them.

        The stored shape becomes ``[*index.shape, *layout.shape[1:]]``.
        """

    @abstractmethod
    def narrow(
        self, components: Components, layout: Layout, start: int, shape: Shape
    ) -> tuple[Components, Layout] | None:
        """Return the run of elements from ``start`` on as a tensor of its own, of stored shape ``shape``.

        Views where possible; None if the run does not begin and end between blocks.
        """

    @abstractmethod
    def serialize(self, name: str, components: Components, layout: Layout) -> Components:
        """Return the tensors a checkpoint holds for the parameter ``name``, by their full names.

        Only reshapes: components on the meta device give tensors of the right shape and dtype, except that what is
        0-d (the offset of nested scales) must be real.
        """

    @abstractmethod
    def find(self, name: str, entries: Entries, read: Callable[[str], torch.Tensor]) -> Serialized | None:
        """Recognize the parameter ``name`` among the tensors of a checkpoint, or return None.

        Args:
            name: the parameter's name.
            entries: dtype and shape of every tensor of the checkpoint.
            read: reads one of them whole; only asked for small ones.

        Raises:
            CheckpointError: the tensors are there but make no sense.
        """

    def empty(self, layout: Layout, device: torch.device | str) -> Components:
        """Return uninitialized components."""
        return {
            key: torch.empty(shape, dtype=dtype, device=device)
            for key, (shape, dtype) in self.component_specs(layout).items()
        }

    def quantize(self, tensor: torch.Tensor, layout: Layout) -> Components:
        """Quantize a whole tensor of the *stored* shape on its own device."""
        components = self.empty(layout, tensor.device)
        quantizer = self.quantizer(layout, components)
        quantizer.write(0, tensor.reshape(-1))
        quantizer.finish()
        return components


def register(format: Format) -> Format:
    """Add a format to the registry under its name."""
    _REGISTRY[format.name] = format
    return format


def registered_formats() -> Mapping[str, Format]:
    """Return the registry, by name."""
    return dict(_REGISTRY)


def format_of(name: str) -> Format:
    """Look a format up.

    Raises:
        ConfigError: no such format.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        known = sorted(_REGISTRY)
        raise ConfigError(
            f"unknown format {name!r}", hint=nearest_names(name, known) or f"known are {', '.join(known)}"
        ) from None
