"""What transformers' loader runs on the tensors of one parameter: :class:`Quantize` and :class:`Deserialize`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from tuckaway.integrations.transformers.tensors import deserialized, quantized

if TYPE_CHECKING:
    from tuckaway.integrations.transformers.quantizer import TuckawayQuantizer

__all__ = ["Deserialize", "Quantize", "deserializers"]

_SUFFIXES = (
    "nested_absmax",
    "nested_quant_map",
    "absmax",
    "quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
    "SCB",
    "weight_format",
)
"""What stands beside a parameter's codes in a checkpoint, by format."""


class Quantize(ConversionOps):
    """Quantizes a parameter that was read, and merged from its parts where the model fuses them."""

    def __init__(self, hf_quantizer: TuckawayQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the quantized parameters by their full names."""
        return {
            name: quantized(_single(value), self.hf_quantizer.specs[name])
            for name, value in input_dict.items()
        }


class Deserialize(ConversionOps):
    """Makes one parameter of the tensors that a quantized checkpoint holds for it."""

    def __init__(self, hf_quantizer: TuckawayQuantizer, own: str) -> None:
        self.hf_quantizer = hf_quantizer
        self.own = own

    def convert(
        self, input_dict: Mapping[str, Any], *args: Any, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Return the parameter under its full name; a plain one as it is."""
        path, _, leaf = full_layer_name.rpartition(".")
        tensors: dict[str, torch.Tensor] = {}
        for pattern, value in input_dict.items():
            suffix = next((s for s in _SUFFIXES if pattern.endswith(f"{re.escape(s)}$")), "")
            beside = leaf == "weight" and suffix in ("SCB", "weight_format")
            key = (
                f"{path}.{suffix}" if beside else f"{full_layer_name}.{suffix}" if suffix else full_layer_name
            )
            tensors[key] = _single(value)
        quantizer = self.hf_quantizer
        spec, config = quantizer.specs[full_layer_name], quantizer.config
        return {full_layer_name: deserialized(full_layer_name, tensors, spec, config)}


def deserializers(hf_quantizer: TuckawayQuantizer, names: Iterable[str]) -> list[Any]:
    """Return the converters that gather the tensors of every parameter in ``names``.

    Patterns are anchored at both ends. All ``weight`` share one; a parameter of another name (an expert stack's
    ``experts.down_proj``) has one with its module's name, for there may be modules called ``down_proj`` as well.
    """
    ends = sorted({_end(name) for name in names}, key=lambda end: (end == "weight", end))
    return [
        WeightConverter(
            source_patterns=[*(_pattern(end, suffix) for suffix in _SUFFIXES), f"(?<![^.]){re.escape(end)}$"],
            target_patterns=end,
            operations=[Deserialize(hf_quantizer, end)],
        )
        for end in ends
    ]


def _end(name: str) -> str:
    leaf = name.rpartition(".")[2]
    return leaf if leaf == "weight" else ".".join(name.split(".")[-2:])


def _pattern(end: str, suffix: str) -> str:
    beside = end == "weight" and suffix in ("SCB", "weight_format")
    return f"(?<![^.]){'' if beside else re.escape(end + '.')}{re.escape(suffix)}$"


def _single(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor
