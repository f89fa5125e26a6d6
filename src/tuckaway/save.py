"""Save a model to a checkpoint that bitsandbytes, transformers and tuckaway read: :func:`save_model`.

Tensors go to disk one at a time, from wherever they lie: a paged-out block is read from its page and never needs
the GPU. Codes and scales are written as they are; nothing is dequantized.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway import files
from tuckaway.checkpoint import CheckpointWriter
from tuckaway.config import QuantizationConfig
from tuckaway.errors import ConfigError, PagingError
from tuckaway.formats import Components, Layout, format_of
from tuckaway.paging import offloaded_tensor
from tuckaway.plan import tied_groups
from tuckaway.tensor import QuantizedTensor, components_of

__all__ = ["describe", "plain_linears", "save_model", "state_of"]

_log = logging.getLogger("tuckaway")


def save_model(
    model: nn.Module,
    save_directory: str | Path,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Write a model's weights, quantized ones included, as safetensors shards.

    The files appear at once or not at all: a checkpoint that was there before stays whole until the new one is. It
    may be the very one the model is paged from. Tied weights are written once. A model with a ``config`` that has
    ``to_dict`` (a transformers model) gets its ``config.json`` too, with a ``quantization_config`` under which
    transformers loads the checkpoint through bitsandbytes.

    Args:
        model: resident, or paged from RAM or disk.
        save_directory: folder to write to; made if it does not exist.
        max_shard_size: bytes of a shard at most, as a number or like ``"5GB"``.
        safe_serialization: must be True; pickled checkpoints are not written.

    Raises:
        ConfigError: ``safe_serialization`` is False, or a module's extra state is no tensor.
        PagingError: a tensor is on the meta device and has no page: the model was never loaded.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save_model(nn.Linear(4, 2), folder)
        >>> sorted(p.name for p in Path(folder).iterdir())
        ['model.safetensors']
    """
    if not safe_serialization:
        raise ConfigError("pickled checkpoints are not written", hint="leave safe_serialization=True")
    directory = Path(save_directory)
    names = _names_to_write(model)
    writer = CheckpointWriter(directory, max_shard_size=max_shard_size)
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, tensor in names:
        for key, part in _serialized(name, tensor, _small_components(model, name, tensor)).items():
            plan.append((key, part.dtype, tuple(part.shape)))
    with writer:
        writer.plan(plan)
        for name, tensor in names:
            for key, part in _serialized(name, tensor, _all_components(model, name, tensor)).items():
                writer.write(key, part.detach().cpu().contiguous())
        writer.commit()
    _write_config(model, directory)


def _names_to_write(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each once: of tied names, the first."""
    duplicates = {name for group in tied_groups(model) for name in group[1:]}
    return [(name, tensor) for name, tensor in state_of(model) if name not in duplicates]


def state_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, persistent buffers and extra states, module by module: the order that they are written in.

    Raises:
        ConfigError: a module's extra state is no tensor, which safetensors cannot hold.
    """
    for prefix, module in model.named_modules(remove_duplicate=True):
        head = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield head + name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield head + name, buffer
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra = module.get_extra_state()
            if not isinstance(extra, torch.Tensor):
                raise ConfigError(
                    f"an extra state is {type(extra).__name__}, and safetensors hold tensors alone",
                    where=prefix or type(module).__name__,
                    hint="return a tensor from get_extra_state()",
                )
            yield f"{head}_extra_state", extra


def _small_components(model: nn.Module, name: str, tensor: torch.Tensor) -> Components:
    """Components on the meta device, but what is 0-d is real: enough to know every shape that is to be written."""
    if not isinstance(tensor, QuantizedTensor):
        return {"": tensor.detach().to("meta")}
    small: Components = {}
    for key, part in tensor.components.items():
        if part.dim() == 0 and part.is_meta:
            small[key] = _paged(model, name)[key]
        else:
            small[key] = part if part.dim() == 0 else part.to("meta")
    return small


def _all_components(model: nn.Module, name: str, tensor: torch.Tensor) -> Components:
    return _paged(model, name) if tensor.is_meta else components_of(tensor)


def _paged(model: nn.Module, name: str) -> Components:
    components = offloaded_tensor(model, name)
    if components is None:
        raise PagingError(
            f"{name!r} is on the meta device and in no page",
            hint="load the model with tuckaway.load_and_quantize_model before saving it",
        )
    return components


def _serialized(name: str, tensor: torch.Tensor, components: Components) -> Components:
    if isinstance(tensor, QuantizedTensor):
        return format_of(tensor.format).serialize(name, components, tensor.layout_info)
    return {name: components[""]}


def _write_config(model: nn.Module, directory: Path) -> None:
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return
    content: dict[str, Any] = config.to_dict()  # type: ignore[union-attr]
    if not content.get(
        "architectures"
    ):  # transformers writes null into the config of a model it did not save
        content["architectures"] = [type(model).__name__]
    dtypes = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
    if dtypes:  # of the weights as they are, whatever dtype the model was once built with
        content["dtype"] = str(dtypes[0]).removeprefix("torch.")
    quantization = _quantization_of(model)
    if quantization is not None:
        content["quantization_config"] = quantization
    files.write_atomically(directory / "config.json", json.dumps(content, indent=2, default=str).encode())
    generation = getattr(model, "generation_config", None)
    if callable(getattr(generation, "to_dict", None)):
        text = json.dumps(generation.to_dict(), indent=2, default=str)  # type: ignore[union-attr]
        files.write_atomically(directory / "generation_config.json", text.encode())


def _quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """What a ``config.json`` says of the quantized modules; the rest is listed as skipped."""
    layouts = {n: p.layout_info for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    return describe(layouts.values(), plain_linears(model, layouts))


def plain_linears(model: nn.Module, quantized: Container[str]) -> list[str]:
    """Return the names of the linear layers whose weight is not among the ``quantized`` names."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight".removeprefix(".") not in quantized
    ]


def describe(layouts: Iterable[Layout], plain_linears: Sequence[str]) -> dict[str, Any] | None:
    """Return the ``quantization_config`` under which transformers loads a checkpoint; ``None``: nothing is quantized.

    Args:
        layouts: of the quantized tensors.
        plain_linears: linear layers that are not.
    """
    layouts = list(layouts)
    if not layouts:
        return None
    kinds = {layout.format for layout in layouts}
    if len(kinds) > 1:
        _log.warning("formats %s lie in one checkpoint; config.json can name only one", sorted(kinds))
    one = layouts[0]
    return QuantizationConfig(
        format=one.format,
        nested=one.nested,
        blocksize=one.blocksize or 64,
        compute_dtype=one.compute_dtype,
        int8_threshold=one.int8_threshold if one.format == "int8" else 6.0,
        skip_modules=plain_linears or None,
    ).to_bitsandbytes()
