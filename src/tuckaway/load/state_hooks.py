"""What modules do themselves when a state is loaded: hooks that rename or compute tensors, and ``_extra_state``.

A hook gets a state dict and changes it. Here it gets one of tensors on the meta device that stand for those of the
checkpoint: what it renames is the same bytes under another name; what it computes is recorded, and computed when the
loader comes to read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tuckaway.checkpoint import Checkpoint, TensorEntry
from tuckaway.checkpoint.reader import read_tensor
from tuckaway.errors import MismatchError
from tuckaway.load.merging import ComputedEntry

__all__ = ["EXTRA", "after_hooks", "extra_states", "set_extra_states"]

EXTRA = "_extra_state"
"""The last piece of the name that torch gives what ``get_extra_state`` returns."""


def after_hooks(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the checkpoint as the modules' own hooks leave it: pre-hooks, and overrides of ``_load_from_state_dict``.

    Raises:
        MismatchError: a hook fails, or needs the values of tensors.
    """
    hooks = [(path, run) for path, module in model.named_modules() if (run := _hooks_of(module)) is not None]
    if not hooks:
        return checkpoint
    recorder = _Recorder()
    state: dict[str, Any] = {}
    for name, entry in checkpoint.entries.items():
        state[name] = recorder.stand_in(entry)
    for path, run in hooks:
        try:
            with torch.no_grad(), recorder:
                run(state, f"{path}." if path else "")
        except Exception as error:
            raise MismatchError(
                f"a hook on loading a state failed: {error}",
                where=path or type(model).__name__,
                hint="it must do with shapes alone; or convert the checkpoint first and save it anew",
            ) from error
    entries = {name: recorder.entry(name, value) for name, value in state.items()}
    return dataclasses.replace(checkpoint, entries=entries)


def extra_states(checkpoint: Checkpoint, model: nn.Module) -> dict[str, TensorEntry | None]:
    """Return what the checkpoint has of the states that modules keep beside tensors; None where it lacks one."""
    names = {
        f"{path}.{EXTRA}" if path else EXTRA
        for path, module in model.named_modules()
        if type(module).set_extra_state is not nn.Module.set_extra_state
    }
    return {name: checkpoint.entries.get(name) for name in sorted(names)}


def set_extra_states(model: nn.Module, states: Mapping[str, TensorEntry | None]) -> Callable[[], None]:
    """Give modules their extra states; the function that is returned takes them back."""
    before: list[tuple[nn.Module, Any]] = []

    def undo() -> None:
        for module, state in before:
            module.set_extra_state(state)

    try:
        for name, entry in states.items():
            if entry is not None:
                module = model.get_submodule(name.rpartition(".")[0])
                before.append((module, module.get_extra_state()))
                module.set_extra_state(read_tensor(entry))
    except BaseException:
        undo()
        raise
    return undo


_Run = Callable[[dict[str, Any], str], None]


def _hooks_of(module: nn.Module) -> _Run | None:
    """What a module would do to a state, or None if that is only what torch's own modules do."""
    override = type(module)._load_from_state_dict
    if not override.__module__.startswith("torch."):

        def run(state: dict[str, Any], prefix: str) -> None:
            # on a stand-in for the module: what it copies into parameters must reach none
            double = object.__new__(type(module))
            double.__dict__.update(module.__dict__)
            for kind in ("_parameters", "_buffers"):
                tensors = getattr(module, kind)
                double.__dict__[kind] = {
                    n: None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta")
                    for n, t in tensors.items()
                }
            override(double, state, prefix, _metadata(module), True, [], [], [])

        return run
    hooks = list(module._load_state_dict_pre_hooks.values())
    if not hooks:
        return None

    def run_hooks(state: dict[str, Any], prefix: str) -> None:
        for hook in hooks:
            hook(state, prefix, _metadata(module), True, [], [], [])

    return run_hooks


def _metadata(module: nn.Module) -> dict[str, Any]:
    # safetensors record no versions: what was saved is taken to be of this one, as it must be where all names match
    return {} if module._version is None else {"version": module._version}


class _Recorder(TorchDispatchMode):
    """Remembers how tensors on the meta device are made of those that stand for a checkpoint's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._entries: dict[int, TensorEntry] = {}
        self._steps: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any], int]] = {}
        self._alive: list[torch.Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler

    def stand_in(self, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor for ``entry``."""
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        self._entries[id(tensor)] = entry
        self._alive.append(tensor)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            return result  # of a copy into the module's stand-in, which nobody reads
        for index, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, torch.Tensor):
                self._steps[id(leaf)] = (func, args, kwargs, index)
                self._alive.append(leaf)
        return result

    def entry(self, name: str, value: Any) -> TensorEntry:
        """Return the checkpoint's tensor that ``value`` stands for, or one that is computed like it."""
        if not isinstance(value, torch.Tensor):
            raise MismatchError(f"a hook left {type(value).__name__} in a state", where=name)
        found = self._entries.get(id(value))
        if found is not None:
            return found
        if value.is_meta and id(value) not in self._steps:
            raise MismatchError("a hook made a tensor in a way that cannot be followed", where=name)
        path = next(iter(self._entries.values())).path
        like = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return ComputedEntry(name, like, path, lambda: self._value(value))

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        entry = self._entries.get(id(tensor))
        if entry is not None:
            return read_tensor(entry)
        if id(tensor) not in self._steps:
            return tensor
        func, args, kwargs, index = self._steps[id(tensor)]
        args, kwargs = tree_map(
            lambda v: self._value(v) if isinstance(v, torch.Tensor) else v, (args, kwargs)
        )
        result: torch.Tensor = tree_leaves(func(*args, **kwargs))[index]
        return result
