"""What every model of the zoo goes through: built empty, loaded in a format, run resident and paged from disk.

The definition is the same model with the very weights that were loaded, dequantized into plain tensors: its outputs
must be equal within the rounding of fp32, and those of the paged model equal bit for bit to the resident one's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import tuckaway
from tuckaway import QuantizationConfig, QuantizedTensor

__all__ = ["CONFIGS", "check_model", "dequantized", "outputs", "with_weights"]

CONFIGS = {
    "nf4": QuantizationConfig("nf4", compute_dtype=torch.float32),
    # products with the weights as they are: LLM.int8() rounds inputs as well, which no dequantized model does
    "int8": QuantizationConfig("int8", compute_dtype=torch.float32, int8_threshold=None),
}


def with_weights(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model with seeded weights of some size: an initialization with zeros would hide what is wrong behind it."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() < 2:
                continue
            fan_in = max(parameter.shape[-1] if parameter.dim() > 1 else 1, 1)
            if not parameter.isfinite().all() or (parameter.dim() > 1 and parameter.std() < 0.03):
                parameter.normal_(0, min(0.5 / fan_in**0.5, 0.1))
            elif parameter.dim() == 1 and not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def outputs(model: nn.Module, arguments: Mapping[str, Any] | tuple[Any, ...]) -> list[torch.Tensor]:
    """All float tensors that a forward returns, seeded: some models draw numbers even in evaluation."""
    torch.manual_seed(7)
    with torch.no_grad():
        result = model(**arguments) if isinstance(arguments, Mapping) else model(*arguments)
    leaves = tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    assert found, "the forward returns no tensor"
    return found


def dequantized(loaded: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain`` with the weights of ``loaded``, which must be resident, dequantized."""
    theirs = dict(loaded.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            weight = theirs[name]
            value = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            parameter.copy_(value)
    return plain


def check_model(
    build: Callable[[], nn.Module],
    arguments: Callable[[nn.Module], Any],
    save: Callable[[nn.Module, Path], None],
    format: str,
    folder: Path,
    **config: Any,
) -> tuckaway.QuantizationConfig:
    """Do all of it.

    Args:
        build: makes the model; called under :func:`tuckaway.init_empty_weights` too.
        arguments: makes the forward's arguments.
        save: writes the checkpoint.
        format: a key of :data:`CONFIGS`.
        folder: a temporary one.
        **config: other options of the config.

    Returns:
        The report of the resident model.
    """
    options = CONFIGS[format].replace(**config)
    plain = with_weights(build)
    torch.manual_seed(99)  # what a constructor draws must come from the checkpoint
    save(plain, folder / "checkpoint")

    def load(**placement: Any) -> nn.Module:
        with tuckaway.init_empty_weights():
            empty = build()
        assert all(p.is_meta for p in empty.parameters())
        model = tuckaway.load_and_quantize_model(
            empty, options, folder / "checkpoint", progress=False, **placement
        )
        check_report(model)
        return model

    resident = load(device_map={"": "cpu"})
    assert_nothing_is_meta(resident)
    given = arguments(plain)
    found = outputs(resident, copy.deepcopy(given))
    expected = outputs(dequantized(resident, plain), copy.deepcopy(given))
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 1.0
        # sums of a few hundred products in another order, through a few layers
        assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * max(scale, 1e-3))
    paged = load(device_map={"": "disk"}, offload_folder=folder / "pages")
    assert any(p.is_meta for p in paged.parameters()), "nothing is paged"
    for ours, theirs in zip(outputs(paged, copy.deepcopy(given)), found, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    return resident.quantization_report


def check_report(model: nn.Module) -> None:
    """Every parameter is in the report, quantized there if and only if it is, and with a reason if it is not."""
    rows = {name: row for row in model.quantization_report.rows for name in (row.name, *row.aliases)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert rows[name].quantized == isinstance(parameter, QuantizedTensor), name
        assert rows[name].quantized or rows[name].reason, name


def assert_nothing_is_meta(model: nn.Module) -> None:
    """A resident model is whole: parameters, buffers, and tensors that modules keep as attributes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for path, module in model.named_modules():
        tensors += [(f"{path}.{k}", v) for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
    assert [name for name, tensor in tensors if tensor.is_meta] == []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny products are slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
