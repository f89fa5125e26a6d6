"""transformers' face of :class:`~tuckaway.QuantizationConfig`: :class:`TuckawayConfig`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from tuckaway.config import QuantizationConfig

__all__ = ["METHOD", "BitsAndBytesOrTuckawayConfig", "TuckawayConfig"]

METHOD = "tuckaway"
"""``quant_method`` in a ``config.json``."""

_UNIMPORTED = {
    "load_in_4bit": True,
    "bnb_4bit_compute_dtype": "this model was quantized by tuckaway: run `import tuckaway` before loading it",
}
"""What a ``config.json`` says to a transformers that does not know tuckaway.

It passes over a method that it does not know, with a warning, and computes with codes as if they were weights. But
``load_in_4bit`` makes it read bitsandbytes' fields, and it raises over a dtype that torch has not, with its name.
"""


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
        kwargs = {name: v for name, v in kwargs.items() if name not in ("quant_method", *_UNIMPORTED)}
        names = [field.name for field in dataclasses.fields(QuantizationConfig)]
        if args and isinstance(args[0], QuantizationConfig):
            config = args[0].replace(**kwargs)
        else:
            config = QuantizationConfig.from_dict({**dict(zip(names, args, strict=False)), **kwargs})
        self.quant_method: Any = METHOD
        for name in names:
            setattr(self, name, getattr(config, name))

    def quantization_config(self) -> QuantizationConfig:
        """Return the same as tuckaway's own config."""
        return QuantizationConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(QuantizationConfig)}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a ``config.json`` says."""
        return {"quant_method": METHOD, **self.quantization_config().to_dict(), **_UNIMPORTED}

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


class BitsAndBytesOrTuckawayConfig(BitsAndBytesConfig):
    """What transformers' table has for bitsandbytes' fields: reads those, or what :class:`TuckawayConfig` wrote."""

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: Any = False, **kwargs: Any) -> Any:
        """Return the config of whoever wrote it."""
        owner = TuckawayConfig if config_dict.get("quant_method") == METHOD else BitsAndBytesConfig
        return owner.from_dict(config_dict, return_unused_kwargs, **kwargs)


TuckawayConfig.__signature__ = inspect.signature(QuantizationConfig)  # type: ignore[attr-defined]
