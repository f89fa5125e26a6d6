"""What a model's own classes ask to be kept precise: :func:`declared_precise`.

transformers and diffusers let a class name what must not lose precision: ``_keep_in_fp32_modules`` (fp32 in a model of
fp16, whose range is too small for it) and ``_keep_in_fp32_modules_strict`` (fp32 in a model of bf16 as well). Their
quantizers leave both unquantized. Any class may have these attributes; whose it is makes no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["declared_precise"]

_ATTRIBUTES = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
}
"""Attribute of a class, and the dtypes of a model beside which what it names is fp32."""


def declared_precise(
    model: nn.Module, names: Iterable[str], dtype: torch.dtype | None
) -> dict[str, tuple[str, bool]]:
    """Return, by tensor, the attribute that names it, and whether it is fp32 in a model of ``dtype``.

    Args:
        model: any module; what a class says holds for the modules below it.
        names: of parameters and buffers.
        dtype: of what is not quantized; ``None``: each tensor keeps its own.

    Example:
        >>> class Gated(nn.Module):
        ...     _keep_in_fp32_modules = ["gate"]
        >>> found = declared_precise(Gated(), ["gate.weight", "gate_proj.weight"], torch.float16)
        >>> found["gate.weight"]
        ('_keep_in_fp32_modules', True)
    """
    names, found = list(names), dict[str, tuple[str, bool]]()
    for path, attribute, pattern in _declarations(model):
        # transformers searches anywhere in a name where it chooses a dtype, and between dots where it quantizes
        whole = re.compile(rf"(?:^|\.)(?:{pattern.pattern})(?:\.|$)")
        single = dtype in _ATTRIBUTES[attribute]
        for name in names:
            if not name.startswith(path):
                continue
            own = name[len(path) :]
            if whole.search(own) or (single and pattern.search(own)):
                before = found.get(name, (attribute, False))
                found[name] = (before[0], before[1] or single)
    return found


def _declarations(model: nn.Module) -> Iterator[tuple[str, str, re.Pattern[str]]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in _ATTRIBUTES:
            patterns = getattr(module, attribute, None)
            for pattern in [patterns] if isinstance(patterns, str) else sorted(patterns or ()):
                yield f"{path}." if path else "", attribute, _compiled(pattern)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.replace("*", ".*"))
    except re.error:
        return re.compile(re.escape(pattern))
