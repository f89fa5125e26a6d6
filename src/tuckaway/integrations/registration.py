"""Make transformers know tuckaway's configs, without importing transformers: :func:`register_when_imported`.

transformers has no entry points for quantizers: whoever offers one must run before a model is loaded. If transformers
is there already, that is done at once; else an import hook waits for the one module that holds transformers' table of
quantizers, and is gone after that. So ``import tuckaway`` costs nothing, and a saved model loads whichever of the two
was imported first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from typing_extensions import override

__all__ = ["register_when_imported"]

_TABLE = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Enter tuckaway in transformers' table of quantizers, now or when transformers comes to need it."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from tuckaway.integrations.transformers.quantizer import register

    register()


class _Waiting(MetaPathFinder):
    """Finds the table as everybody else does, but runs ``_register`` once its module is complete."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Another loader, and the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    @override
    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # inspect and pkgutil ask it for the source
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
