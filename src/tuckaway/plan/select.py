"""What becomes of every tensor of a model: :func:`choose_specs`.

A weight is chosen by what its module uses it for. Whatever is not quantized has a reason, in words, for the report:
no model is silently half-quantized.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from tuckaway.config import QuantizationConfig, as_dtype
from tuckaway.errors import ConfigError, PlanError, nearest_names
from tuckaway.plan.ties import ancestors, named_tensors, tied_groups
from tuckaway.tensor import QuantizedTensor, TensorSpec, layout_for

__all__ = ["choose_specs", "output_head"]

_log = logging.getLogger("tuckaway")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_THINNEST = 32
"""Rows and columns a hand-written parameter must have: fewer are tables and states (``A_log [d, 16]``), not factors."""
_WORTH_IT = 0.75
"""Share of the plain bytes a quantized tensor may take. int8 scales of 3-wide convolution rows would take 1.17."""
_TABLES = re.compile(
    r"(^|_)(bias|biases|scale|scales|norm|gamma|beta|log|tokens?|pos|position|positional|positions|embed|embeds|"
    r"embedding|embeddings|emb|anchors?)(_|$)"
)
"""Pieces of names that hand-written parameters have which are added or looked up, not multiplied with."""


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
        strict: a name in ``skip_modules`` or ``keep_in_fp32_modules`` that matches nothing is an error. ``False``:
            a warning, for configs that name modules of other models too (``"lm_head"`` on a model without one).

    Returns:
        The specs of all tensors under each of their names, in the model's order, and for those that are not
        quantized the reason.

    Raises:
        ConfigError: a name that matches nothing.
        PlanError: a lazy module whose parameters have no shape yet.
    """
    for name, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise PlanError("a lazy module has no shapes yet", where=name, hint="run it once, then plan")
    wanted = as_dtype(dtype, "dtype") or (None if config is None else config.plain_dtype)
    names = _Names(model)
    skip_patterns = None if config is None else config.skip_modules
    keep_patterns = None if config is None else config.keep_in_fp32_modules
    skipped = {
        name: f"skipped: {p!r}"
        for p in skip_patterns or ()
        for name in names.below(p, "skip_modules", strict)
    }
    kept = {n for p in keep_patterns or () for n in names.below(p, "keep_in_fp32_modules", strict)}
    if config is not None and skip_patterns is None:
        head = output_head(model)
        if head is not None:
            skipped = {name: "the output head" for name in names.within(head)}

    reasons: dict[str, str] = {}
    for name, tensor in names.parameters.items():
        if isinstance(tensor, QuantizedTensor):
            continue
        if config is None:
            reason: str | None = "no format was asked for"
        elif name in skipped:
            reason = skipped[name]
        elif name in kept:
            reason = "kept in fp32"
        else:
            reason = _reason_against(names.owner(name), name.rpartition(".")[2], tensor, config, wanted)
        if reason is not None:
            reasons[name] = reason
    for group in tied_groups(model):
        against = [name for name in group if name in reasons]
        transposed = {_is_conv1d(names.owner(name)) for name in group}
        for name in group:
            if against and name not in reasons:
                reasons[name] = f"tied to {against[0]} ({reasons[against[0]]})"
            elif not against and len(transposed) > 1 and name in names.parameters:
                reasons[name] = "tied to a weight that is stored transposed"

    specs: dict[str, TensorSpec] = {}
    fp32 = _with_ties(kept, tied_groups(model))
    for name, tensor in names.parameters.items():
        spec = TensorSpec.of(tensor)
        if spec.layout is None:
            spec = _plain(spec, wanted, fp32=name in fp32)
            if config is not None and name not in reasons:
                spec = _quantized(spec, config, transposed=_is_conv1d(names.owner(name)))
        specs[name] = spec
    for name, tensor in names.buffers.items():
        own = name.rpartition(".")[2]
        persistent = own not in names.owner(name)._non_persistent_buffers_set
        spec = TensorSpec.of(tensor, is_buffer=True, persistent=persistent)
        # values computed in the constructor (rotary frequencies) are not the checkpoint's: they keep their dtype
        specs[name] = _plain(spec, wanted, fp32=name in fp32) if persistent else spec
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


class _Names:
    """A model's names, and the patterns that are matched against them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        # parameters as well: the names in a checkpoint are what people copy
        self.paths = [*filter(None, self.modules), *self.parameters, *self.buffers]

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds a tensor."""
        return self.modules[name.rpartition(".")[0]]

    def within(self, path: str) -> Iterator[str]:
        """Yield the names of the tensors at or below ``path``."""
        for name in (*self.parameters, *self.buffers):
            if path in ancestors(name):
                yield name

    def below(self, pattern: str, parameter: str, strict: bool) -> Iterator[str]:
        """Yield the names of the tensors at or below whatever ``pattern`` matches."""
        matched = {path for path in self.paths if _matches(pattern, path)}
        if not matched:
            message = f"{pattern!r} in {parameter} matches nothing in the model"
            if strict:
                raise ConfigError(message, hint=self._nearest(pattern) or "name modules by their dotted path")
            _log.warning("%s", message)
        for name in (*self.parameters, *self.buffers):
            if not matched.isdisjoint(ancestors(name)):
                yield name

    def _nearest(self, pattern: str) -> str:
        pieces = pattern.count(".") + 1
        ends = {".".join(path.split(".")[-pieces:]) for path in self.paths}
        return nearest_names(pattern, [*ends, *self.paths])


def _matches(pattern: str, path: str) -> bool:
    if any(wild in pattern for wild in "*?["):
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith(f".{pattern}")


def _with_ties(names: set[str], groups: Iterable[Sequence[str]]) -> set[str]:
    tied = {name for group in groups if not names.isdisjoint(group) for name in group}
    return names | tied


def _plain(spec: TensorSpec, dtype: torch.dtype | None, *, fp32: bool) -> TensorSpec:
    wanted = torch.float32 if fp32 else dtype
    # 8-bit floats are somebody's format, not a precision to convert
    convertible = spec.dtype.is_floating_point and spec.dtype.itemsize >= 2
    if wanted is None or not convertible:
        return spec
    return _changed(spec, dtype=wanted)


def _quantized(spec: TensorSpec, config: QuantizationConfig, *, transposed: bool) -> TensorSpec:
    shape = (*spec.shape[:-2], spec.shape[-1], spec.shape[-2]) if transposed else spec.shape
    layout = layout_for(config, shape, spec.dtype, transposed=transposed)
    return TensorSpec(spec.shape, spec.dtype, layout, requires_grad=False)


def _changed(spec: TensorSpec, *, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(spec.shape, dtype, spec.layout, spec.requires_grad, spec.is_buffer, spec.persistent)


# Reasons against quantizing, in the order they are asked


def _reason_against(
    module: nn.Module, own: str, tensor: torch.Tensor, config: QuantizationConfig, plain: torch.dtype | None
) -> str | None:
    dtype = plain or tensor.dtype
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return f"{_short(tensor.dtype)} values"
    if dtype not in _FLOATS or tensor.dtype.itemsize < 2:
        return f"{_short(tensor.dtype)} is quantized already or wider than fp32"
    if len(shape) < 2:
        return "one-dimensional"
    for kinds, reason in _KINDS:
        if isinstance(module, kinds):
            found = reason(module, own, config) if callable(reason) else reason
            if found is not None:
                return found
    if re.search(r"Norm(\dd)?$", type(module).__name__):
        return "a norm"
    if shape[0] == 1 or math.prod(shape) == max(shape):
        return "a broadcast vector"
    if not (isinstance(module, _MATRICES) or _is_conv1d(module)):
        found = _hand_written(module, own, tensor)
        if found is not None:
            return found
    if math.prod(shape) < config.blocksize:
        return "smaller than one block of weights"
    spec = TensorSpec(shape, dtype)
    if _quantized(spec, config, transposed=_is_conv1d(module)).nbytes > _WORTH_IT * spec.nbytes:
        return f"rows too short: {config.format} would not be smaller"
    return None


def _embedding(module: nn.Module, own: str, config: QuantizationConfig) -> str | None:
    if not config.quantize_embeddings:
        return "an embedding (quantize_embeddings is off)"
    return "an embedding with max_norm writes to its weight" if getattr(module, "max_norm", None) else None


def _convolution(module: nn.Module, own: str, config: QuantizationConfig) -> str | None:
    # groups of one channel are a filter each: few weights, and every error in them stays
    return "a depthwise convolution" if module.groups > 1 and module.weight.shape[1] == 1 else None  # type: ignore[operator, index]


_MATRICES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.Embedding, _ConvNd)

_Reason = str | Callable[[nn.Module, str, QuantizationConfig], str | None]
_KINDS: tuple[tuple[type | tuple[type, ...], _Reason], ...] = (
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, "an embedding bag"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent weights are used inside torch's own kernels"),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase), "a norm"),
    (_ConvTransposeNd, "a transposed convolution"),
    (_ConvNd, _convolution),
)


def _hand_written(module: nn.Module, own: str, tensor: torch.Tensor) -> str | None:
    if getattr(tensor, "_no_weight_decay", False):
        return "marked as no weight matrix (_no_weight_decay)"
    if _TABLES.search(own.lower()):
        return "named like something added or looked up"
    if "Router" in type(module).__name__:
        return "a router"
    if min(tensor.shape[-2:]) < _THINNEST:
        return f"fewer than {_THINNEST} rows or columns"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' ``Conv1D``, an ``nn.Linear`` whose weight is ``[in, out]``, without importing it."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
