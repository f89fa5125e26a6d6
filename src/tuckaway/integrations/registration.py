"""Make transformers, peft and accelerate know tuckaway, without importing them: :func:`register_when_imported`.

transformers has no entry points for quantizers, peft none for where an offloaded layer's adapter belongs, accelerate
none for how a weight is saved: somebody must tell them before they are used. What is imported already is told at once;
for the rest an import hook waits for the one module that matters and is gone after it. So ``import tuckaway`` imports
none of it, and what a user imports first makes no difference.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from typing_extensions import override

__all__ = ["register_when_imported"]


def register_when_imported() -> None:
    """Tell these libraries, now or when they come to be imported."""
    waiting: dict[str, Callable[[], None]] = {}
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register()
        else:
            waiting[name] = register
    for finder in sys.meta_path:
        if isinstance(finder, _Waiting):
            finder.waiting.update(waiting)
            return
    if waiting:
        sys.meta_path.insert(0, _Waiting(waiting))


def _register_quantizer() -> None:
    from tuckaway.integrations.transformers.quantizer import register

    register()


def _adapt_models() -> None:
    from tuckaway.integrations.transformers.device import adapt

    adapt()


def _adapt_peft() -> None:
    from tuckaway.integrations.peft import adapt

    adapt()


def _adapt_accelerate() -> None:
    from tuckaway.integrations.accelerate import adapt

    adapt()


_REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "transformers.modeling_utils": _adapt_models,
    "peft.peft_model": _adapt_peft,
    "accelerate.accelerator": _adapt_accelerate,
}
"""What to do once a module is complete."""


class _Waiting(MetaPathFinder):
    """Finds modules as everybody else does, but does something more once they are complete."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = self.waiting.pop(fullname, None)
        if register is None:
            return None
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # everybody else's: this name waits no more
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, register)
        return spec


class _Registering(Loader):
    """Another loader, and a registration after it."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self.loader = loader
        self.register = register

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    @override
    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # inspect and pkgutil ask it for the source
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.register()
