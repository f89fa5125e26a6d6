"""What becomes of every tensor of a model: :func:`choose_specs`.

A weight is chosen by what its module uses it for, and by what the config says of it. Whatever is not quantized has a
reason, in words, for the report: no model is silently half-quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from tuckaway.config import QuantizationConfig, as_dtype
from tuckaway.errors import ConfigError, PlanError
from tuckaway.plan.declared import declared_precise
from tuckaway.plan.patterns import ModelNames, is_wild
from tuckaway.plan.reasons import is_stored_transposed, quantized_spec, reason_against
from tuckaway.plan.ties import named_tensors, tied_groups
from tuckaway.tensor import QuantizedTensor, TensorSpec

__all__ = ["choose_specs", "output_head"]


def choose_specs(
    model: nn.Module,
    config: QuantizationConfig | None,
    *,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Choose the final form of every parameter and buffer.

    Args:
        model: may be empty (on the meta device); it is not changed.
        config: what to quantize to, and what not. ``None``: nothing is quantized, dtypes stay.
        dtype: dtype of what is not quantized; ``None``: the config's, and without one each tensor keeps its own.
        strict: a pattern of the config that matches nothing is an error. ``False``: a warning, for configs that name
            modules of other models too (``"lm_head"`` on a model without one).

    Returns:
        The specs of all tensors under each of their names, in the model's order, and for those that are not
        quantized the reason.

    Raises:
        ConfigError: a pattern that matches nothing, or a name in ``only_modules`` or ``formats`` below which nothing
            can be quantized.
        PlanError: a lazy module whose parameters have no shape yet.
    """
    for name, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise PlanError("a lazy module has no shapes yet", where=name, hint="run it once, then plan")
    wanted = as_dtype(dtype, "dtype") or (None if config is None else config.plain_dtype)
    choice = _Choice(ModelNames(model, strict=strict), config, wanted, tied_groups(model))
    names, reasons = choice.names, choice.reasons()
    if config is not None and strict:
        _refuse_idle_names(names, config, reasons)

    specs: dict[str, TensorSpec] = {}
    for name, tensor in names.parameters.items():
        spec = TensorSpec.of(tensor)
        if spec.layout is None:
            spec = _plain(spec, wanted, fp32=name in choice.fp32)
            if config is not None and name not in reasons:
                transposed = is_stored_transposed(names.user(name))
                spec = quantized_spec(spec, choice.config_of(name), transposed=transposed)
        specs[name] = spec
    for name, tensor in names.buffers.items():
        own = name.rpartition(".")[2]
        persistent = own not in names.owner(name)._non_persistent_buffers_set
        spec = TensorSpec.of(tensor, is_buffer=True, persistent=persistent)
        # values computed in the constructor (rotary frequencies) are not the checkpoint's: they keep their dtype
        specs[name] = _plain(spec, wanted, fp32=name in choice.fp32) if persistent else spec
        reasons[name] = "a buffer"
    return specs, reasons


def output_head(model: nn.Module) -> str | None:
    """Return the name of the module that makes the model's outputs, or None.

    It is what ``get_output_embeddings()`` returns; else the last child, if that is a single layer with a weight
    matrix and there are other children. A stack of layers registered last is no head.

    Example:
        >>> output_head(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        '2'
    """
    asked = getattr(model, "get_output_embeddings", None)
    if callable(asked):
        try:
            head = asked()
        except (AttributeError, NotImplementedError):
            head = None  # transformers' base class promises the method to models that have no head
        if isinstance(head, nn.Module):
            return next((name for name, module in model.named_modules() if module is head), None)
    children = list(model.named_children())
    if len(children) < 2:
        return None
    name, last = children[-1]
    weight = getattr(last, "weight", None)
    if any(True for _ in last.children()) or not isinstance(weight, nn.Parameter):
        return None
    return name if weight.dim() == 2 or isinstance(last, _ConvNd) else None


class _Choice:
    """A config read for one model: what it says of each name, tied names of one tensor alike."""

    def __init__(
        self,
        names: ModelNames,
        config: QuantizationConfig | None,
        plain: torch.dtype | None,
        groups: Sequence[Sequence[str]],
    ) -> None:
        self.names, self.config, self.plain, self.groups = names, config, plain, groups
        self._left: dict[str, str] = {}
        self.fp32: set[str] = set()
        self._named: set[str] = set()
        self._format: dict[str, str] = {}
        self._configs: dict[str, QuantizationConfig] = {}
        if config is not None:
            self._read(config)

    def config_of(self, name: str) -> QuantizationConfig:
        """The config with the format that this parameter gets."""
        assert self.config is not None
        format = self._format.get(name, self.config.format)
        if format not in self._configs:
            self._configs[format] = self.config.replace(format=format)
        return self._configs[format]

    def reasons(self) -> dict[str, str]:
        """Why parameters stay unquantized, by each of their names."""
        names, found = self.names, dict[str, str]()
        for name, tensor in names.parameters.items():
            if isinstance(tensor, QuantizedTensor):
                continue
            reason = self._left.get(name)
            if self.config is None:
                reason = "no format was asked for"
            elif reason is None:
                own, named = name.rpartition(".")[2], name in self._named
                reason = reason_against(
                    names.user(name), own, tensor, self.config_of(name), self.plain, named=named
                )
                if reason is None and not named and names.in_router(name):
                    reason = "a router"
            if reason is not None:
                found[name] = reason
        for group in self.groups:
            against = [name for name in group if name in found]
            transposed = {is_stored_transposed(names.user(name)) for name in group}
            for name in group:
                if against and name not in found:
                    found[name] = f"tied to {against[0]} ({found[against[0]]})"
                elif not against and len(transposed) > 1 and name in names.parameters:
                    found[name] = "tied to a weight that is stored transposed"
        return found

    def _read(self, config: QuantizationConfig) -> None:
        names = self.names
        choices = names.choices(config.formats or {})
        exact = [
            *(config.only_modules or ()),
            *(p for p, f in (config.formats or {}).items() if f is not None),
        ]
        for pattern in exact:
            self._named |= names.named_by(str(pattern), "only_modules")
        self._named = _with_ties(self._named, self.groups)
        if config.skip_modules is None and not config.quantize_head:
            head = output_head(names.modules[""])
            if head is not None:
                self._leave({n: "the output head" for n in names.within(head) if n not in self._named})
        self._format = self._tied_formats(choices)
        self._leave({n: f"formats: {p!r} is None" for n, (p, f) in choices.items() if f is None})
        if config.only_modules is not None:
            only = {n for p in config.only_modules for n in names.below(str(p), "only_modules")}
            only = _with_ties(only, self.groups)
            self._leave({name: "not in only_modules" for name in names.parameters if name not in only})
        kept = {
            n for p in config.keep_in_fp32_modules or () for n in names.below(str(p), "keep_in_fp32_modules")
        }
        self._leave(dict.fromkeys(kept, "kept in fp32"))
        kept |= self._leave_declared()
        self.fp32 = _with_ties(kept, self.groups)
        for pattern in config.skip_modules or ():
            self._leave({n: f"skipped: {pattern!r}" for n in names.below(str(pattern), "skip_modules")})

    def _leave_declared(self) -> set[str]:
        """Leave alone what the model's classes keep precise, unless it is named; return what of that is fp32."""
        names = self.names
        tensors = (*names.parameters, *names.buffers)
        found = declared_precise(names.modules[""], tensors, self.plain)
        found = {name: value for name, value in found.items() if name not in self._named}
        reasons = {name: f"kept precise by its class ({attribute})" for name, (attribute, _) in found.items()}
        self._leave({name: reason for name, reason in reasons.items() if name not in self._left})
        return {name for name, (_, single) in found.items() if single}

    def _leave(self, reasons: Mapping[str, str]) -> None:
        self._left.update(reasons)

    def _tied_formats(self, choices: Mapping[str, tuple[str, str | None]]) -> dict[str, str]:
        """One tensor has one format: that of its first name that is named, else of the first that is matched."""
        formats = {name: format for name, (_, format) in choices.items() if format is not None}
        for group in self.groups:
            given = sorted((n for n in group if n in formats), key=lambda n: is_wild(choices[n][0]))
            if given:
                formats.update(dict.fromkeys(group, formats[given[0]]))
        return formats


def _refuse_idle_names(names: ModelNames, config: QuantizationConfig, reasons: Mapping[str, str]) -> None:
    """Refuse a name that asks for something to be quantized where nothing is: it would do nothing, silently."""
    asked = [*(config.only_modules or ()), *(p for p, f in (config.formats or {}).items() if f is not None)]
    for pattern in map(str, asked):
        if is_wild(pattern):
            continue
        below = [name for name in names.below(pattern, "formats") if name in names.parameters]
        if all(name in reasons for name in below):
            why = "; ".join(f"{name}: {reasons[name]}" for name in below[:3]) or "it has no parameters"
            raise ConfigError(f"{pattern!r} names nothing that can be quantized", where=why)


def _with_ties(names: set[str], groups: Iterable[Sequence[str]]) -> set[str]:
    tied = {name for group in groups if not names.isdisjoint(group) for name in group}
    return names | tied


def _plain(spec: TensorSpec, dtype: torch.dtype | None, *, fp32: bool) -> TensorSpec:
    wanted = torch.float32 if fp32 else dtype
    # 8-bit floats are somebody's format, not a precision to convert
    convertible = spec.dtype.is_floating_point and spec.dtype.itemsize >= 2
    if wanted is None or not convertible:
        return spec
    return replace(spec, dtype=wanted)
