"""transformers' face of :class:`~tuckaway.QuantizationConfig`: :class:`TuckawayConfig`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from tuckaway.config import QuantizationConfig
from tuckaway.errors import ConfigError, nearest_names

__all__ = ["METHOD", "TuckawayConfig"]

METHOD = "tuckaway"
"""``quant_method`` in a ``config.json``."""


class TuckawayConfig(QuantizationConfigMixin):
    """How transformers quantizes a model with tuckaway; has the fields of :class:`~tuckaway.QuantizationConfig`.

    Args:
        *args: the fields, in their order.
        **kwargs: the fields, by name.

    Raises:
        ConfigError: a field that is unknown, or a value that makes no sense.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> import tuckaway
        >>> tuckaway.TuckawayConfig("nf4", blocksize=128).to_dict()["quant_method"]
        'tuckaway'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name != "quant_method"}
        if args and isinstance(args[0], QuantizationConfig):
            config = args[0].replace(**kwargs)
        else:
            _check_fields(kwargs)
            config = QuantizationConfig(*args, **kwargs)
        self.quant_method: Any = METHOD
        for field in dataclasses.fields(config):
            setattr(self, field.name, getattr(config, field.name))

    def quantization_config(self) -> QuantizationConfig:
        """Return the same as tuckaway's own config."""
        return QuantizationConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(QuantizationConfig)}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a ``config.json`` says."""
        fields = dataclasses.fields(QuantizationConfig)
        return {
            "quant_method": METHOD,
            **{field.name: _as_json(getattr(self, field.name)) for field in fields},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, for printing."""
        default = TuckawayConfig().to_dict()
        return {
            key: value
            for key, value in self.to_dict().items()
            if key == "quant_method" or value != default[key]
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TuckawayConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # its fields can be assigned to, as transformers does

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


TuckawayConfig.__signature__ = inspect.signature(QuantizationConfig)  # type: ignore[attr-defined]


def _check_fields(given: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(QuantizationConfig)]
    for name in given:
        if name not in known:
            hint = nearest_names(name, known) or "it may have been written by a newer tuckaway"
            raise ConfigError(f"a config has no field {name!r}", hint=hint)


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
