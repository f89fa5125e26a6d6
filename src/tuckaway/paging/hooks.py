"""What happens before and after a module's forward: :class:`PageHook`.

It is an ``AlignDevicesHook``, found at ``module._hf_hook``, so that accelerate, transformers and peft see an offloaded
module. Unlike accelerate's it does not replace ``module.forward``: torch's own forward hooks drive it, which also run
when the forward raises. Modules inside a page get one too, which nothing drives; it serves those who ask for the
weights of a single layer (``accelerate.utils.align_module_device``, peft's merging).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.paging.binding import Page, Turn
from tuckaway.paging.inputs import first_device, move, wants_grad
from tuckaway.paging.recompute import bring_in_again
from tuckaway.paging.units import as_device

if TYPE_CHECKING:
    from tuckaway.paging.state import Paging

__all__ = ["PageHook", "PagedWeights"]


class _Entry:
    """One forward under way: its turns, and where its input was."""

    __slots__ = ("away", "direct", "home", "turns")

    def __init__(self, *, direct: bool) -> None:
        self.turns: list[Turn] = []
        self.home: torch.device | None = None
        self.direct = direct
        self.away: list[tuple[Any, str, torch.Tensor]] = []


class PagedWeights(MutableMapping[str, torch.Tensor]):
    """The paged tensors below a module by name, on the CPU, read when asked for: accelerate's ``weights_map``.

    Args:
        paging: the model's paging.
        names: name below the module to full name.
    """

    def __init__(self, paging: Paging, names: dict[str, str]) -> None:
        self.paging = paging
        self.names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.paging.read(self.names[name])

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.paging.write(self.names[name], value)

    def __delitem__(self, name: str) -> NoReturn:
        raise PagingError(f"{self.names.get(name, name)!r} is paged and cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class PageHook(AlignDevicesHook):  # type: ignore[misc]
    """Brings a module's pages in for its forward, and its inputs to the device it executes on.

    Args:
        paging: the model's paging.
        module: whose forward it belongs to.
        pages: pages that forward needs.
        device: where it executes; None leaves inputs where they are.
        io_same_device: bring the output to where the first input was.
        root: the module is the whole model.
        skip_keys: keyword arguments that are not moved.
        weights: the paged tensors below the module.
    """

    def __init__(
        self,
        paging: Paging,
        module: nn.Module,
        pages: Sequence[Page],
        device: torch.device | None,
        *,
        io_same_device: bool = False,
        root: bool = False,
        skip_keys: str | Collection[str] | None = None,
        weights: PagedWeights | None = None,
    ) -> None:
        skip = [skip_keys] if isinstance(skip_keys, str) else list(skip_keys or ())
        self._weights = weights
        super().__init__(
            execution_device=device, offload=bool(pages), io_same_device=io_same_device, skip_keys=skip
        )
        self.paging = paging
        self.pages = tuple(pages)
        self.original_devices = {name: torch.device("cpu") for name in weights or ()}
        self._device = device
        self._root = root
        self._local = threading.local()
        self._handles: list[Any] = []
        self._module = module

    @property
    def weights_map(self) -> PagedWeights | None:
        """The paged tensors below the module, by name; what is assigned to it is written to their homes."""
        return self._weights

    @weights_map.setter
    def weights_map(self, value: Mapping[str, torch.Tensor] | None) -> None:
        # peft assigns what a layer holds after it merged an adapter into it, buffers and resident tensors included
        for name, tensor in (value or {}).items():
            if self._weights is not None and name in self._weights:
                self._weights[name] = tensor

    # Driven by torch

    def drive(self) -> None:
        """Let torch call this hook around the module's forward."""
        module = self._module
        self._handles = [
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def driven(self) -> bool:
        """Whether torch calls it."""
        return bool(self._handles)

    @property
    def running(self) -> bool:
        """Whether this thread is in the module's forward."""
        return bool(self._entries())

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            # the compiler of torch 2.11 takes is_exporting() for true whenever it traces
            exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
            if self.pages and exporting:
                raise PagingError(
                    "a paged model cannot be exported",
                    hint="bring it back first: tuckaway.materialize(model)",
                )
            return uncompiled(PageHook._enter)(self, args, kwargs)
        return self._enter(args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return uncompiled(PageHook._leave)(self, output)
        return self._leave(output)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # first of all: torch calls _after even when this raises, and it takes the last entry
        entries = self._entries()
        if entries:
            self.end_stale_turns(entering=True)
        if self._root and not entries:
            self.paging.end_stale_turns()
            self.paging.pager.begin_forward()
        entry = _Entry(direct=False)
        entries.append(entry)
        if self.io_same_device:
            entry.home = first_device((args, kwargs))
        if self.pages:
            bring_in_again(self._module, self._in_place)
            self._bring_in(entry, (args, kwargs))
        if self._device is None:
            return args, kwargs
        return move(args, self._device), move(kwargs, self._device, self.skip_keys)

    def _leave(self, output: Any) -> Any:
        entries = self._entries()
        if not entries:
            return output
        entry = entries[-1]
        self._release(entry)
        entries.pop()  # last of all: what is in the list will be ended, if not by this call
        if self._root and not entries and not entry.direct:
            self.paging.pager.end_forward()
        return output if entry.home is None or output is None else move(output, entry.home, self.skip_keys)

    def _bring_in(self, entry: _Entry, inputs: Any, *, own: bool = False) -> None:
        own = own or (
            torch.is_grad_enabled()
            and (
                wants_grad(inputs)
                or any(binding.away.requires_grad for page in self.pages for binding in page.bindings)
                or any(parameter.requires_grad for parameter in self._module.parameters())
            )
        )
        for page in self.pages:
            self.paging.pager.bring_in(page, own=own, turns=entry.turns)

    def _in_place(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function with the pages in, as they are already unless it is run in a backward pass."""
        if all(page.turns for page in self.pages):
            return function(*args, **kwargs)
        entry = _Entry(direct=True)
        try:
            try:
                self._bring_in(entry, (args, kwargs), own=True)
                return function(*args, **kwargs)
            finally:
                self._release(entry)
        finally:
            if entry.turns:  # interrupted right there
                self._release(entry)

    def _release(self, entry: _Entry) -> None:
        while entry.turns:
            self.paging.pager.release(entry.turns[-1])
            entry.turns.pop()
        for tensors, attribute, away in entry.away:
            tensors[attribute] = away
        entry.away.clear()

    def _entries(self) -> list[_Entry]:
        try:
            return self._local.entries  # type: ignore[no-any-return]
        except AttributeError:
            self._local.entries = []
            return self._local.entries  # type: ignore[no-any-return]

    def end_stale_turns(self, *, entering: bool = False) -> None:
        """End this thread's turns that torch did not: a KeyboardInterrupt in a forward skips the hooks after it.

        Args:
            entering: one of the module's calls has no entry yet.
        """
        entries = self._entries()
        if not entries:
            return
        running = sum(1 for _ in _calls_of(self._module))
        allowed = max(running - entering, 0)
        while sum(1 for entry in entries if not entry.direct) > allowed:
            number = max(i for i, entry in enumerate(entries) if not entry.direct)
            self._release(entries[number])
            entries.pop(number)

    # Called by accelerate, transformers and peft

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Do nothing: a paged module is bound when it is attached."""
        return module

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Bring the module's weights in, to :attr:`execution_device`, until :meth:`post_forward`."""
        entry = _Entry(direct=True)
        try:
            device = None if self.execution_device is None else as_device(self.execution_device)
            if self.pages and device is not None and device != self.paging.plan.execution_device:
                self._bind_elsewhere(entry, module, device)
            elif self.pages:
                # what the caller writes to the weights must not stay in a slot
                own = not any(page.turns for page in self.pages)
                self._bring_in(entry, (args, kwargs), own=own)
        except BaseException:
            self._release(entry)
            raise
        self._entries().append(entry)
        if device is None:
            return args, kwargs
        return move(args, device), move(kwargs, device, self.skip_keys)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """End what :meth:`pre_forward` began."""
        return self._leave(output)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Leave real tensors on the CPU behind, in every module of the pages this one needs."""
        self.remove()
        self.paging.take_out(self.pages, torch.device("cpu"))
        return module

    def remove(self) -> None:
        """Stop being driven; the tensors stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _bind_elsewhere(self, entry: _Entry, module: nn.Module, device: torch.device) -> None:
        for page in self.pages:
            for binding in page.bindings:
                if binding.module is module and not page.gone:
                    tensor = self.paging.read(binding.name, device)
                    entry.away.append(
                        (binding.tensors, binding.attribute, binding.tensors[binding.attribute])
                    )
                    binding.tensors[binding.attribute] = tensor

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()


def refuse_copy() -> NoReturn:
    """Say that a paged model cannot be copied."""
    raise PagingError(
        "a paged model cannot be copied or pickled",
        hint="save it with tuckaway.save_model, or bring it back first: tuckaway.materialize(model)",
    )


_disabled: dict[Any, Callable[..., Any]] = {}


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a break in the compiled graph; made late because it imports the compiler."""
    found = _disabled.get(function)
    if found is None:
        found = _disabled[function] = torch.compiler.disable(function)
    return found


_CALL = nn.Module._call_impl.__code__


def _calls_of(module: nn.Module) -> Iterator[None]:
    """Yield once for each call of ``module`` on this thread's stack."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            yield None
        frame = frame.f_back  # type: ignore[assignment]
