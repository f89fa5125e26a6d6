"""Quantized parameters from tensors in memory, and flat tensors from quantized parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.checkpoint.entry import ResidentEntry
from tuckaway.config import QuantizationConfig
from tuckaway.formats import Components, format_of
from tuckaway.load.match import find_source
from tuckaway.load.sinks import CopySink, sink_for
from tuckaway.paging import offloaded_tensor
from tuckaway.plan import tied_groups
from tuckaway.tensor import QuantizedTensor, TensorSpec, components_of

__all__ = ["deserialized", "flat_state_dict", "quantized"]

_NOWHERE = Path("a tensor in memory")


def quantized(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the parameter of form ``spec`` that holds ``tensor``, quantized on the device it lies on."""
    components = spec.empty(tensor.device)
    sink = sink_for(spec, components)
    with torch.no_grad():
        if tensor.numel():
            sink.write(0, tensor.detach().contiguous().view(-1))
        sink.finish()
    return spec.build(components)


def deserialized(
    name: str, tensors: Mapping[str, torch.Tensor], spec: TensorSpec, config: QuantizationConfig
) -> torch.Tensor:
    """Return the parameter ``name`` that ``tensors`` hold in bitsandbytes' serialized form, on their device.

    Raises:
        CheckpointError: they do not fit together.
        ShapeMismatch: they hold a weight of another shape than ``spec``.
    """
    entries = {
        key: ResidentEntry(
            key, tensor.dtype, tuple(tensor.shape), _NOWHERE, 0, tensor.nbytes, data=tensor.detach()
        )
        for key, tensor in tensors.items()
    }
    # a saved model is seen in the dtype that it is loaded in, whatever it was quantized from
    config = config.replace(dtype=spec.dtype)
    found = find_source(Checkpoint(dict(entries), (), {}, _NOWHERE), name, spec, config)
    if found is None:
        raise KeyError(name)
    sources, values, final, _ = found
    if "" in sources:
        return tensors[name]  # a plain weight among quantized ones
    with torch.no_grad():
        components = final.empty(tensors[name].device)
        for key, value in values.items():
            components[key].copy_(value)
        for key, source in sources.items():
            CopySink(components[key], source.dtype).write(0, entries[source.name].data.reshape(-1))
    return final.build(components)


def flat_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict with every quantized weight as bitsandbytes' plain tensors; ties once.

    Paged weights are read from where they are: from disk, into memory. :func:`tuckaway.save_model` does not need that.
    """
    repeated = {name for group in tied_groups(model) for name in group[1:]}
    flat: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            flat[name] = tensor
            continue
        if name in repeated and (tensor.is_meta or isinstance(tensor, QuantizedTensor)):
            continue  # transformers itself tells other ties by their storage
        components: Components = components_of(tensor)
        if tensor.is_meta:
            components = offloaded_tensor(model, name) or components
        if not isinstance(tensor, QuantizedTensor):
            flat[name] = components[""]
        else:
            parts = format_of(tensor.format).serialize(name, components, tensor.layout_info)
            for key, part in parts.items():
                # codebooks are the same tensor for every weight, which would look like a tie
                flat[key] = part.clone() if key.endswith("quant_map") else part
    return flat
