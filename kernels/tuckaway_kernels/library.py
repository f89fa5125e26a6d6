"""The torch.library namespace ``tuckaway`` and the one way an op enters it.

An op has a reference (any device) and, where Triton is installed, a launcher for the devices Triton serves.
``Library.define`` and ``impl`` are used rather than ``torch.library.custom_op``, whose Python wrapper costs about
5 us more a call in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tuckaway_kernels.backend import has_triton

LIBRARY = torch.library.Library("tuckaway", "FRAGMENT")

TRITON_KEYS = ("CUDA", "XPU")
"""Dispatch keys of the devices that Triton serves (ROCm answers to CUDA)."""


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> None:
    """Register an op under ``torch.ops.tuckaway``.

    Args:
        schema: the op's signature in torch's schema language, its name first.
        reference: serves every device that no launcher serves.
        fake: gives empty outputs of the right shape, dtype and device from fake inputs.
        triton: launches the kernels; imports Triton inside, at its first call.
        tags: torch's tags for the op.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None and has_triton():
        for key in TRITON_KEYS:
            LIBRARY.impl(name, triton, key)
    torch.library.register_fake(f"tuckaway::{name}", fake, lib=LIBRARY)


def eager(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Tell whether a call on these is nothing but its result: no gradient wanted, nobody watching, plain tensors.

    Then a kernel may be launched without asking torch's dispatcher, which costs 4 us a call (9 on an H100's host).
    """
    return (
        type(x) is torch.Tensor
        and (bias is None or type(bias) in _PLAIN)
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not x.is_neg()
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def differentiable(
    name: str,
    setup: Callable[[Any, tuple[Any, ...]], None],
    backward: Callable[..., tuple[Any, ...]],
    *,
    reference: Callable[..., torch.Tensor],
    triton: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Give the op ``name`` a gradient.

    ``torch.library.register_autograd`` would do, at tens of us a call even where no gradient is wanted: it goes through
    the dispatcher a second time. Here such a call goes straight to the implementation, unless something below autograd
    (a fake tensor, a tracer, a mode) wants to see the op.

    Args:
        name: of an op that `define` registered, with positional arguments without defaults and one result.
        setup: ``setup(ctx, inputs)`` keeps what ``backward`` needs.
        backward: ``backward(ctx, grad)`` returns one gradient (or None) for each input.
        reference: as given to `define`.
        triton: as given to `define`.
    """
    op = getattr(torch.ops.tuckaway, name).default
    after: Any = torch._C._after_autograd_keyset
    direct = {_key_bits(torch._C.DispatchKey.CPU): reference}
    if triton is not None and has_triton():
        direct |= {_key_bits(getattr(torch._C.DispatchKey, key)): triton for key in TRITON_KEYS}
    # every plain tensor has the first two of these, which do nothing for an op that writes to none of its inputs
    seen = after.raw_repr()
    for key in (torch._C.DispatchKey.ADInplaceOrView, torch._C.DispatchKey.BackendSelect):
        seen &= ~_key_bits(key)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            # the key set comes last: ctx.needs_input_grad[i] is then about input i
            *inputs, keyset = arguments
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keyset & after, *inputs)
            setup(ctx, tuple(inputs))
            return output

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return *backward(ctx, grad), None

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Differentiable.apply(*inputs, keyset)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            implementation = direct.get(keyset.raw_repr() & seen)
            if implementation is not None:
                return implementation(*inputs)
            return op.redispatch(keyset & after, *inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _key_bits(key: Any) -> int:
    bits: int = torch._C.DispatchKeySet(key).raw_repr()
    return bits
