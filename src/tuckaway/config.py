"""What to quantize a model to: :class:`QuantizationConfig`, and the configs of others it is made from.

accelerate's ``BnbQuantizationConfig``, transformers' ``BitsAndBytesConfig`` and the ``quantization_config`` of a
``config.json`` are read by their attribute names, so neither library is imported; they are never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuckaway.errors import ConfigError, nearest_names

__all__ = ["FORMATS", "QuantizationConfig", "as_dtype"]

FORMATS = ("nf4", "fp4", "int8")
"""Names a config may ask for; ``tuckaway.formats`` has one file for each family."""

_DTYPE_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "half": torch.float16}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def as_dtype(value: torch.dtype | str | None, parameter: str) -> torch.dtype | None:
    """Read a float dtype as users write it: ``torch.bfloat16``, ``"bfloat16"``, ``"torch.bfloat16"``, ``"bf16"``.

    Raises:
        ConfigError: it names no float dtype of 16 or 32 bits.
    """
    if value is None:
        return None
    dtype: object = value
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        dtype = _DTYPE_NAMES.get(name, getattr(torch, name, None))
    if dtype not in _FLOATS:
        raise ConfigError(
            f"{parameter} cannot be {value!r}", hint="use torch.float32, torch.float16 or torch.bfloat16"
        )
    return dtype


@dataclass(frozen=True)
class QuantizationConfig:
    """How the weights of a model are quantized, and which are not.

    Args:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        nested: quantize the scales too (double quantization): 0.37 bits a weight less at blocksize 64. 4-bit only.
        blocksize: weights that share one scale; a power of two from 32 to 4096. 4-bit only: int8 has a scale a row.
        compute_dtype: dtype that products are computed in. ``None``: whatever dtype the input has.
        dtype: dtype of everything that is not quantized (norms, biases, embeddings, float buffers of the
            checkpoint). ``None``: ``compute_dtype``, as accelerate has it.
        int8_threshold: inputs of at least this magnitude bypass the int8 product (LLM.int8(), arXiv 2208.07339);
            0.0: none does; ``None``: weights are int8 and the product is computed in ``compute_dtype``.
        skip_modules: names of modules that stay unquantized, with all below them. A name is a full dotted path
            or a trailing part of it on a dot's boundary (``"lm_head"``, ``"mlp.c_proj"``); wildcards ``*`` and ``?``
            match whole paths. ``None``: the output head and whatever is tied to it.
        keep_in_fp32_modules: names, matched likewise, of modules that are not quantized and stay in fp32.
        quantize_embeddings: quantize ``nn.Embedding`` weights too.

    Raises:
        ConfigError: a value is not one of these.

    Example:
        >>> QuantizationConfig(format="nf4", compute_dtype="bf16").compute_dtype
        torch.bfloat16
    """

    format: str = "nf4"
    nested: bool = True
    blocksize: int = 64
    compute_dtype: torch.dtype | str | None = torch.bfloat16
    dtype: torch.dtype | str | None = None
    int8_threshold: float | None = 6.0
    skip_modules: Sequence[str] | None = None
    keep_in_fp32_modules: Sequence[str] | None = None
    quantize_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            near = nearest_names(str(self.format), FORMATS)
            raise ConfigError(
                f"unknown format {self.format!r}", hint=near or f"known are {', '.join(FORMATS)}"
            )
        size = self.blocksize
        if isinstance(size, bool) or not isinstance(size, int) or not 32 <= size <= 4096 or size & (size - 1):
            raise ConfigError(f"blocksize cannot be {size!r}", hint="use a power of two from 32 to 4096")
        threshold = self.int8_threshold
        if threshold is not None and not (_is_number(threshold) and threshold >= 0):
            raise ConfigError(f"int8_threshold cannot be {threshold!r}", hint="use 0.0 or more, or None")
        for name in ("nested", "quantize_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("skip_modules", "keep_in_fp32_modules"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
                raise ConfigError(f"{name} must be a list of names, not {value!r}")
            value = tuple(value)
            if not all(isinstance(v, str) for v in value):
                raise ConfigError(f"{name} must be a list of names, not {value!r}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "compute_dtype", as_dtype(self.compute_dtype, "compute_dtype"))
        object.__setattr__(self, "dtype", as_dtype(self.dtype, "dtype"))

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """The dtype of what is not quantized; ``None`` keeps each tensor's own."""
        return self.dtype if self.dtype is not None else self.compute_dtype  # type: ignore[return-value]

    def replace(self, **changes: Any) -> QuantizationConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_bitsandbytes(self) -> dict[str, Any]:
        """Return the ``quantization_config`` under which transformers loads a checkpoint of this config."""
        four_bit = self.format != "int8"
        name = str(self.compute_dtype or torch.float32).removeprefix("torch.")
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four_bit,
            "load_in_8bit": not four_bit,
            "bnb_4bit_quant_type": self.format if four_bit else "fp4",
            "bnb_4bit_use_double_quant": self.nested and four_bit,
            "bnb_4bit_compute_dtype": name,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0 if self.int8_threshold is None else self.int8_threshold,
            "llm_int8_skip_modules": None if self.skip_modules is None else list(self.skip_modules),
        }

    @classmethod
    def of(cls, config: object) -> QuantizationConfig:
        """Make a config of whatever a user has: ours, accelerate's, transformers', or a ``quantization_config`` dict.

        Raises:
            ConfigError: it is none of these, or asks for both or neither of 4 and 8 bits.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            return cls(format=config)
        read = (
            config.get
            if isinstance(config, Mapping)
            else lambda key, default=None: getattr(config, key, default)
        )
        method = read("quant_method")
        method = getattr(method, "value", method)  # transformers' is an enumeration
        if method not in (None, "bitsandbytes"):
            raise ConfigError(
                f"weights quantized by {method!r} are not known",
                hint="take a checkpoint that is plain or quantized by tuckaway or bitsandbytes",
            )
        four, eight = bool(read("load_in_4bit")), bool(read("load_in_8bit"))
        if four == eight:
            if not four and read("load_in_4bit") is None:
                raise ConfigError(
                    f"{type(config).__name__} is no quantization config",
                    hint="pass a QuantizationConfig, a BnbQuantizationConfig or a BitsAndBytesConfig",
                )
            asked = "both" if four else "neither"
            raise ConfigError(
                f"the config asks for {asked} of 4 and 8 bits", hint="set load_in_4bit or load_in_8bit"
            )
        skip = read("skip_modules")
        if skip is None:
            skip = read("llm_int8_skip_modules")
        dtype = read("torch_dtype")
        threshold = read("llm_int8_threshold")
        compute = read("bnb_4bit_compute_dtype")
        return cls(
            format=str(read("bnb_4bit_quant_type") or "fp4") if four else "int8",
            nested=bool(read("bnb_4bit_use_double_quant")),
            compute_dtype=as_dtype(compute, "bnb_4bit_compute_dtype")
            if four
            else as_dtype(dtype, "torch_dtype") or torch.float16,
            dtype=as_dtype(dtype, "torch_dtype"),
            int8_threshold=6.0 if threshold is None else threshold,
            skip_modules=skip,
            keep_in_fp32_modules=read("keep_in_fp32_modules"),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
