"""The model that a checkpoint's ``config.json`` names, built empty: :func:`models_of`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tuckaway.empty import init_empty_weights

__all__ = ["models_of"]

_log = logging.getLogger("tuckaway")


def models_of(directory: Path, config: dict[str, Any] | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield what the weights can be of: the class that ``architectures`` names, then the same without its head.

    Nothing comes where transformers is not installed or does not know the model; code that a checkpoint brings along
    is not run.

    Args:
        directory: folder of ``config.json``.
        config: its content.
    """
    names = (config or {}).get("architectures")
    if not names or not (config or {}).get("model_type"):
        return
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        _log.info("transformers is not installed: what to quantize is decided by names and shapes")
        return
    try:
        settings = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning(
            "transformers does not know this model (%s): deciding by names and shapes", _first(error)
        )
        return
    kinds = [getattr(transformers, str(names[0]), None), getattr(transformers, "AutoModel", None)]
    for kind in kinds:
        if kind is None:
            continue
        try:
            with init_empty_weights():
                model = (
                    kind._from_config(settings)
                    if hasattr(kind, "_from_config")
                    else kind.from_config(settings)
                )
        except (ImportError, ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
            _log.info("%s cannot be built empty: %s", kind.__name__, _first(error))
            continue
        tie = getattr(model, "tie_weights", None)
        if callable(tie):
            tie()
        yield type(model).__name__, model


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0]
