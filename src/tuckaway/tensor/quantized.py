"""What torch sees of a quantized weight: :class:`QuantizedTensor`.

It is a wrapper subclass: a tensor with a shape and a float dtype but no storage of its own, around a few plain
tensors (its *components*: codes, scales) and a :class:`~tuckaway.formats.Layout`. ``nn.Linear`` and every other
module keep it as an ordinary parameter. What an operation does with it stands in two tables:

- :mod:`tuckaway.tensor.functions`: calls caught whole, before autograd (``F.linear``, ``.data = ...``), for speed or
  because nothing below could see them;
- :mod:`tuckaway.tensor.dispatch`: aten operations, below autograd. Whatever is in neither table works on the
  dequantized weight, for that one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from tuckaway.config import QuantizationConfig
from tuckaway.formats import BoundLinear, Components, Layout, Shape, format_of

__all__ = ["QuantizedTensor", "quantize"]

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""What catches a call whole, by the function called; filled by :mod:`tuckaway.tensor.functions`."""


class QuantizedTensor(torch.Tensor):
    """A weight in a quantized format.

    Made by :func:`quantize` or by the loader. Shape, dtype and device are those torch sees; the bytes lie in
    :attr:`components`.

    Args:
        data: the components by name, or another QuantizedTensor to share the components of.
        layout: how the components are read; taken from ``data`` when that is a QuantizedTensor.
        dtype: dtype that torch sees; ``None``: the layout's.
        requires_grad: accepted for ``nn.Parameter``'s sake.

    Raises:
        TypeError: ``data`` is a plain tensor (which :func:`quantize` turns into codes).

    Example:
        >>> w = quantize(torch.randn(64, 128), QuantizationConfig(nested=False, compute_dtype=None))
        >>> w.shape, w.format, w.codes.shape, w.absmax.shape
        (torch.Size([64, 128]), 'nf4', torch.Size([4096]), torch.Size([128]))
        >>> torch.nn.functional.linear(torch.ones(1, 128), w).shape
        torch.Size([1, 64])
    """

    _is_copy = False  # of parts that were picked by index, not a view of them
    _keys: tuple[str, ...]
    _layout: Layout
    _bound_linear: BoundLinear | None

    @staticmethod
    def __new__(
        cls,
        data: Mapping[str, torch.Tensor] | QuantizedTensor,
        layout: Layout | None = None,
        *,
        dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ) -> QuantizedTensor:
        """Make the wrapper; see the class."""
        if isinstance(data, QuantizedTensor):
            dtype = dtype or data.dtype
            layout = layout or data._layout
            data = data.components
        if isinstance(data, torch.Tensor) or layout is None:
            raise TypeError(
                "a QuantizedTensor is made from components and a layout; use tuckaway.quantize(tensor)"
            )
        shape = layout.logical_shape
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=_strides(layout),
            dtype=dtype or layout.dtype,
            device=data["codes"].device,
            requires_grad=requires_grad,
        )
        self._layout = layout
        self._keys = tuple(data)
        self._bound_linear = None
        for key, tensor in data.items():
            setattr(self, f"_{key}", tensor)
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Everything happens in ``__new__``, where a wrapper's shape is fixed."""

    # What it is made of

    @property
    def components(self) -> Components:
        """The plain tensors that hold it, by name."""
        return {key: getattr(self, f"_{key}") for key in self._keys}

    @property
    def layout_info(self) -> Layout:
        """How the components are read (``layout`` itself is torch's word for strided or sparse)."""
        return self._layout

    @property
    def format(self) -> str:
        """Name of the format: ``"nf4"``, ``"fp4"`` or ``"int8"``."""
        return self._layout.format

    @property
    def blocksize(self) -> int:
        """Weights that share one scale; 0 for int8, where a row does."""
        return self._layout.blocksize

    @property
    def codes(self) -> torch.Tensor:
        """The packed codes: uint8 ``[(n + 1) // 2]`` for 4-bit formats, int8 of the stored shape for int8."""
        return self._codes  # type: ignore[attr-defined, no-any-return]

    @property
    def absmax(self) -> torch.Tensor:
        """The scales in fp32, restored when they are nested: one a block of weights, or one a row for int8."""
        return format_of(self.format).absmax(self.components, self._layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight as a plain tensor, in ``dtype`` or the dtype torch sees."""
        with torch._C.DisableTorchFunctionSubclass():
            stored = format_of(self.format).dequantize(self.components, self._layout, dtype or self.dtype)
            return stored.transpose(-2, -1) if self._layout.transposed else stored

    def like(self, components: Mapping[str, torch.Tensor], layout: Layout | None = None) -> QuantizedTensor:
        """Return a tensor of the same dtype around other components."""
        return QuantizedTensor(components, layout or self._layout, dtype=self.dtype)

    def apply_to_components(self, function: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        """Return the tensor whose components are ``function`` of these."""
        return self.like({key: function(tensor) for key, tensor in self.components.items()})

    def requantize_(self, value: torch.Tensor) -> QuantizedTensor:
        """Overwrite the components with ``value`` (of this shape) quantized anew, in place."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if isinstance(value, QuantizedTensor):
                if value._layout.with_shape(()) == self._layout.with_shape(()) and value.shape == self.shape:
                    fresh = value.components
                else:
                    return self.requantize_(value.dequantize(torch.float32))
            else:
                value = value.to(self._codes.device).expand(self.shape)  # type: ignore[attr-defined]
                stored = value.transpose(-2, -1) if self._layout.transposed else value
                fresh = format_of(self.format).quantize(stored.contiguous(), self._layout)
            for key, tensor in self.components.items():
                tensor.copy_(fresh[key])
        return self

    # What torch asks of a wrapper

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Layout, torch.dtype]]:
        return [f"_{key}" for key in self._keys], (self._layout, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: tuple[Layout, torch.dtype], size: Shape, stride: Shape
    ) -> QuantizedTensor:
        layout, dtype = context
        return QuantizedTensor({key[1:]: tensor for key, tensor in inner.items()}, layout, dtype=dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # the compiler sees the aten operations below instead: it unwraps the components there
        if not torch.compiler.is_compiling():
            handler = FUNCTIONS.get(func)
            if handler is not None:
                result = handler(*args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without cls and func
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        from tuckaway.tensor.dispatch import dispatch

        return dispatch(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        nested = ", nested" if self._layout.nested else ""
        size = f", blocksize={self.blocksize}" if self.blocksize else ""
        return (
            f"QuantizedTensor({self.format}{size}{nested}, shape={list(self.shape)}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )

    # Copies, pickles, addresses: what a wrapper without storage would get wrong

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        fields = {f.name: getattr(self._layout, f.name) for f in dataclasses.fields(self._layout)}
        is_parameter = isinstance(self, torch.nn.Parameter)
        return _rebuild, (self.components, fields, self.dtype, is_parameter, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        with torch.no_grad():
            copy = same_kind(self, self.apply_to_components(torch.clone))
        memo[id(self)] = copy
        return copy

    def data_ptr(self) -> int:
        """Address of the codes: unique, where a wrapper's own would be 0 for all (accelerate tells ties by it)."""
        return self.codes.data_ptr()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all components."""
        return sum(tensor.nbytes for tensor in self.components.values())

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes of a weight with its share of the scales: a fraction, exact when multiplied by ``nelement()``."""
        return self.nbytes / max(self.numel(), 1)

    def share_memory_(self) -> QuantizedTensor:
        """Move the components to shared memory (a wrapper's own storage cannot be)."""
        for tensor in self.components.values():
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Tell whether the components are in shared memory."""
        return all(tensor.is_shared() for tensor in self.components.values())

    def is_pinned(self, device: object = None) -> bool:
        """Tell whether the components are in pinned memory."""
        return all(tensor.is_pinned() for tensor in self.components.values())

    def pin_memory(self, device: object = None) -> QuantizedTensor:
        """Return a copy in pinned memory."""
        return self.apply_to_components(torch.Tensor.pin_memory)

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that ``stream`` uses the components."""
        for tensor in self.components.values():
            tensor.record_stream(stream)

    def _stable_hash_for_caching(self) -> str:
        """Key of this tensor's kind in torch's compile cache."""
        return repr((self._layout, self.dtype, self._keys))


def same_kind(tensor: QuantizedTensor, fresh: QuantizedTensor) -> QuantizedTensor:
    """Return ``fresh``, as an ``nn.Parameter`` if ``tensor`` is one (which stays a QuantizedTensor)."""
    if not isinstance(tensor, torch.nn.Parameter):
        return fresh
    return cast("QuantizedTensor", torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad))


def quantize(
    tensor: torch.Tensor, config: QuantizationConfig | str | None = None, *, transposed: bool = False
) -> QuantizedTensor:
    """Quantize a tensor where it lies.

    Args:
        tensor: any shape, fp32, fp16 or bf16. Blocks of weights run along the last dimension, across rows.
        config: a :class:`~tuckaway.QuantizationConfig`, a format's name, or ``None`` for the default (nf4, nested).
        transposed: store the transpose of the last two dimensions: for weights ``[in, out]`` such as Hugging Face's
            ``Conv1D``, so that blocks run along the input dimension, as bitsandbytes has them.

    Raises:
        ConfigError: an unknown format.
        TypeError: the tensor is not a float tensor of 16 or 32 bits.

    Example:
        >>> quantize(torch.ones(4, 64), "int8").dequantize().unique()
        tensor([1.])
    """
    options = QuantizationConfig.of(config if config is not None else QuantizationConfig())
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"cannot quantize {tensor.dtype}; convert it to float32, float16 or bfloat16 first")
    stored = tensor.detach()
    if transposed:
        stored = stored.transpose(-2, -1)
    stored = stored.contiguous()
    layout = layout_for(options, tuple(stored.shape), tensor.dtype, transposed=transposed)
    with torch.no_grad():
        return QuantizedTensor(format_of(layout.format).quantize(stored, layout), layout)


def layout_for(
    config: QuantizationConfig, stored_shape: Shape, dtype: torch.dtype, *, transposed: bool
) -> Layout:
    """Return the layout that ``config`` gives a tensor of ``stored_shape``."""
    four_bit = config.format != "int8"
    return Layout(
        format=config.format,
        shape=stored_shape,
        dtype=dtype,
        blocksize=config.blocksize if four_bit else 0,
        nested=config.nested and four_bit,
        transposed=transposed,
        compute_dtype=config.compute_dtype,  # type: ignore[arg-type]
        int8_threshold=None if four_bit else config.int8_threshold,
    )


def _strides(layout: Layout) -> list[int]:
    strides, step = [], 1
    for size in reversed(layout.shape):
        strides.append(step)
        step *= max(size, 1)
    strides.reverse()
    if layout.transposed:
        strides[-2], strides[-1] = strides[-1], strides[-2]
    return strides


def _rebuild(
    components: Components,
    fields: dict[str, Any],
    dtype: torch.dtype,
    is_parameter: bool,
    requires_grad: bool,
) -> torch.Tensor:
    """Unpickle; registered with torch so that ``torch.load(weights_only=True)`` accepts it."""
    fields = {**fields, "shape": tuple(fields["shape"])}
    tensor = QuantizedTensor(components, Layout(**fields), dtype=dtype)
    return torch.nn.Parameter(tensor, requires_grad=requires_grad) if is_parameter else tensor


torch.serialization.add_safe_globals([_rebuild])
