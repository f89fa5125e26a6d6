"""What to quantize a model to: :class:`QuantizationConfig`, and the configs of others it is made from.

accelerate's ``BnbQuantizationConfig``, transformers' ``BitsAndBytesConfig`` and the ``quantization_config`` of a
``config.json`` are read by their attribute names, so neither library is imported; they are never changed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tuckaway.errors import ConfigError, nearest_names

__all__ = ["FORMATS", "Pattern", "QuantizationConfig", "as_dtype"]

Pattern = str | re.Pattern[str]
"""How modules are named: see :class:`QuantizationConfig`."""

FORMATS = ("nf4", "fp4", "int8")
"""Names a config may ask for; ``tuckaway.formats`` has one file for each family."""

_DTYPE_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "half": torch.float16}
_ABSENT = object()
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
    r"""How the weights of a model are quantized, and which are not.

    Args:
        format: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        nested: quantize the scales too (double quantization): 0.37 bits a weight less at blocksize 64. 4-bit only.
        blocksize: weights that share one scale; a power of two from 32 to 4096. 4-bit only: int8 has a scale a row.
        compute_dtype: dtype that products are computed in. ``None``: whatever dtype the input has.
        dtype: dtype of everything that is not quantized (norms, biases, embeddings, float buffers of the
            checkpoint). ``None``: ``compute_dtype``, as accelerate has it.
        int8_threshold: inputs of at least this magnitude bypass the int8 product (LLM.int8(), arXiv 2208.07339);
            0.0: none does; ``None``: weights are int8 and the product is computed in ``compute_dtype``.
        skip_modules: modules or parameters that stay unquantized, with all below them. ``None``: the output head and
            whatever is tied to it.
        keep_in_fp32_modules: modules that are not quantized and stay in fp32.
        quantize_embeddings: quantize ``nn.Embedding`` weights too.
        only_modules: modules that may be quantized; all others stay. ``None``: all may.
        formats: formats of some modules, by pattern: ``{"*.attn.*": "int8", "lm_head": None}``; ``None`` leaves them
            unquantized. A name without wildcards counts before one with; of several, the first.
        min_weights: parameters of fewer weights stay unquantized.
        quantize_head: quantize the output head too, where ``skip_modules`` is ``None``. A head that is tied to an
            embedding needs ``quantize_embeddings`` as well.

    A module is named by its full dotted path or a trailing part of it on a dot's boundary (``"lm_head"``,
    ``"mlp.c_proj"``), by a glob that matches the whole path (``"*.layers.[0-3].mlp"``), or by a regular expression
    that does (``"re:.*layers[.]\d+[.]mlp"``, or a compiled one). Never by a part of a name. A module or parameter that
    ``only_modules`` or ``formats`` names without wildcards is quantized even where the defaults leave it alone (a head,
    an embedding, a router).

    Raises:
        ConfigError: a value is not one of these.

    Example:
        >>> QuantizationConfig(format="nf4", compute_dtype="bf16").compute_dtype
        torch.bfloat16
        >>> mixed = QuantizationConfig(formats={"*.mlp.*": "nf4", "*.attn.*": "int8"}, min_weights=4096)
        >>> QuantizationConfig.from_dict(mixed.to_dict()) == mixed
        True
    """

    format: str = "nf4"
    nested: bool = True
    blocksize: int = 64
    compute_dtype: torch.dtype | str | None = torch.bfloat16
    dtype: torch.dtype | str | None = None
    int8_threshold: float | None = 6.0
    skip_modules: Sequence[Pattern] | None = None
    keep_in_fp32_modules: Sequence[Pattern] | None = None
    quantize_embeddings: bool = False
    only_modules: Sequence[Pattern] | None = None
    formats: Mapping[Pattern, str | None] | None = None
    min_weights: int = 0
    quantize_head: bool = False

    def __post_init__(self) -> None:
        _check_format(self.format)
        size = self.blocksize
        if isinstance(size, bool) or not isinstance(size, int) or not 32 <= size <= 4096 or size & (size - 1):
            raise ConfigError(f"blocksize cannot be {size!r}", hint="use a power of two from 32 to 4096")
        threshold = self.int8_threshold
        if threshold is not None and not (_is_number(threshold) and threshold >= 0):
            raise ConfigError(f"int8_threshold cannot be {threshold!r}", hint="use 0.0 or more, or None")
        floor = self.min_weights
        if isinstance(floor, bool) or not isinstance(floor, int) or floor < 0:
            raise ConfigError(
                f"min_weights cannot be {floor!r}", hint="use a number of weights, 0 for no limit"
            )
        for name in ("nested", "quantize_embeddings", "quantize_head"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("skip_modules", "keep_in_fp32_modules", "only_modules"):
            object.__setattr__(self, name, _patterns(getattr(self, name), name))
        if self.formats is not None:
            object.__setattr__(self, "formats", _Formats(self.formats))
        object.__setattr__(self, "compute_dtype", as_dtype(self.compute_dtype, "compute_dtype"))
        object.__setattr__(self, "dtype", as_dtype(self.dtype, "dtype"))

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """The dtype of what is not quantized; ``None`` keeps each tensor's own."""
        return self.dtype if self.dtype is not None else self.compute_dtype  # type: ignore[return-value]

    def replace(self, **changes: Any) -> QuantizationConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON has them: dtypes and patterns are strings."""
        content: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            content[field.name] = value
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> QuantizationConfig:
        """Make a config of what :meth:`to_dict` gave; fields that are not there keep their defaults.

        Raises:
            ConfigError: a field that is unknown, or a value that makes no sense.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in content:
            if name not in known:
                near = nearest_names(str(name), known)
                raise ConfigError(
                    f"a config has no field {name!r}", hint=near or f"known are {', '.join(known)}"
                )
        return cls(**content)

    def to_bitsandbytes(self) -> dict[str, Any]:
        """Return the ``quantization_config`` under which transformers loads a checkpoint of this config.

        Under ``"tuckaway"`` it holds the whole config, which bitsandbytes' fields cannot express and transformers
        passes over.
        """
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
            "tuckaway": self.to_dict(),
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
        if isinstance(config, Mapping):
            own = config.get("tuckaway")
            if isinstance(own, Mapping):
                return cls.from_dict(own)
            if "format" in config and "quant_method" not in config:
                return cls.from_dict(config)
        read = (
            config.get
            if isinstance(config, Mapping)
            else lambda key, default=None: getattr(config, key, default)
        )
        method = read("quant_method")
        method = getattr(method, "value", method)  # transformers' is an enumeration
        if method == "tuckaway":  # transformers' face of this config, or what that writes into a config.json
            names = [field.name for field in dataclasses.fields(cls)]
            return cls(**{name: value for name in names if (value := read(name, _ABSENT)) is not _ABSENT})
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


def _check_format(value: object) -> None:
    if value not in FORMATS:
        near = nearest_names(str(value), FORMATS)
        raise ConfigError(f"unknown format {value!r}", hint=near or f"known are {', '.join(FORMATS)}")


def _patterns(value: Any, parameter: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{parameter} must be a list of names, not {value!r}")
    given = tuple(value)
    if not all(isinstance(v, str | re.Pattern) for v in given):
        raise ConfigError(f"{parameter} must be a list of names, not {given!r}")
    return tuple(_as_text(v, parameter) for v in given)


def _as_text(pattern: Pattern, parameter: str) -> str:
    """Return a pattern as a string, which JSON can hold; a regular expression begins with ``re:``."""
    if isinstance(pattern, re.Pattern):
        letters = "".join(letter for letter in "aimsx" if pattern.flags & getattr(re, letter.upper()))
        pattern = f"re:(?{letters}){pattern.pattern}" if letters else f"re:{pattern.pattern}"
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{pattern!r} in {parameter} is no regular expression: {error}") from None
    return pattern


class _Formats(Mapping[str, str | None]):
    """Formats by pattern; hashable, as configs are."""

    def __init__(self, given: Any) -> None:
        if not isinstance(given, Mapping) or not all(isinstance(k, str | re.Pattern) for k in given):
            raise ConfigError(f"formats must be a dict of patterns to formats, not {given!r}")
        self._formats: dict[str, str | None] = {}
        for pattern, format in given.items():
            if format is not None:
                _check_format(format)
            self._formats[_as_text(pattern, "formats")] = format

    def __getitem__(self, pattern: str) -> str | None:
        return self._formats[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __hash__(self) -> int:
        return hash(tuple(self._formats.items()))

    def __repr__(self) -> str:
        return repr(self._formats)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
