"""Replace a method of another library's class, once: :func:`wrap`."""

from __future__ import annotations

from typing import Any

__all__ = ["wrap"]


def wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Replace a method by a wrapper of it, unless that was done before.

    Args:
        owner: the class that has the method in its own namespace.
        name: of the method.
        wrapper: called with the method (or classmethod object), returns what takes its place.
    """
    original = owner.__dict__[name]
    function = getattr(original, "__func__", original)
    if not getattr(function, "_tuckaway", False):
        wrapped = wrapper(original)
        getattr(wrapped, "__func__", wrapped)._tuckaway = True
        setattr(owner, name, wrapped)
