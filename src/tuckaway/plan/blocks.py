"""The blocks of a placed model with their exact bytes: the rows of a plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tuckaway.plan.accounts import Accounts
from tuckaway.plan.allocate import Tree, is_block
from tuckaway.plan.memory import Device
from tuckaway.plan.sizes import tensor_sizes
from tuckaway.plan.ties import ancestors
from tuckaway.tensor import TensorSpec

__all__ = ["PlannedBlock", "planned_blocks"]

_NESTED = ("nested_absmax", "nested_offset")


@dataclass(frozen=True)
class PlannedBlock:
    """A module, or the part of one that lies on one device; all in bytes.

    Args:
        name: path of the module; ``""`` for what the model holds itself.
        device: an accelerator's index, ``"mps"``, ``"cpu"`` or ``"disk"``.
        paged: brought to the executing device for its turn.
        codes_bytes: quantized weights.
        scales_bytes: their scales.
        nested_bytes: the scales' own scales.
        plain_bytes: everything that is not quantized.
        padding_bytes: what alignment in its page adds.
        formats: bytes by format, ``{"nf4": 93_000_000, "bfloat16": 16_384}``.
    """

    name: str
    device: Device
    paged: bool
    codes_bytes: int = 0
    scales_bytes: int = 0
    nested_bytes: int = 0
    plain_bytes: int = 0
    padding_bytes: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Exact bytes of its tensors, without padding."""
        return self.codes_bytes + self.scales_bytes + self.nested_bytes + self.plain_bytes


def planned_blocks(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    accounts: Accounts,
    whole: Sequence[str] = (),
) -> tuple[PlannedBlock, ...]:
    """Return the rows of a placed model, in the model's order; a tied tensor counts in its first block.

    Args:
        model: its structure.
        specs: final form of every tensor.
        accounts: of :func:`~tuckaway.plan.accounts.account`.
        whole: class names of modules that must not be split.
    """
    tree = Tree(model, tensor_sizes(model, specs))
    names = {node.name for node in tree.leaves("", lambda name, _: is_block(model, name, whole))}
    rows: dict[tuple[str, Device, bool], dict[str, int]] = {}
    formats: dict[tuple[str, Device, bool], dict[str, int]] = {}
    page_names = {page.index: page.name if page.askers[0] else "" for page in accounts.pages.pages}
    for name, place in accounts.places.items():
        page = accounts.pages.page_of(name)
        if page is not None:
            block = page_names[page.index]
        else:
            block = next((path for path in ancestors(name) if path in names), "")
            block = block.rpartition(".")[0] if block == name else block
        key = (block, place, page is not None)
        parts, kinds = rows.setdefault(key, defaultdict(int)), formats.setdefault(key, defaultdict(int))
        spec = specs[name]
        kinds[str(spec.dtype).removeprefix("torch.") if spec.layout is None else spec.layout.format] += (
            spec.nbytes
        )
        for component, (shape, dtype) in spec.components().items():
            parts[_kind(component)] += math.prod(shape) * dtype.itemsize
    for page in accounts.pages.pages:
        exact = sum(specs[name].nbytes for name in page.tensors)
        rows[page_names[page.index], page.home, True]["padding_bytes"] += page.layout.extent - exact
    return tuple(
        PlannedBlock(name, device, paged, **parts, formats=dict(formats[name, device, paged]))
        for (name, device, paged), parts in rows.items()
    )


def _kind(component: str) -> str:
    if component in _NESTED:
        return "nested_bytes"
    return {"": "plain_bytes", "codes": "codes_bytes"}.get(component, "scales_bytes")
