"""A model to plan for, from whatever names it: a module, a configuration, a folder or an id on the Hub.

Only ``config.json``, the headers of safetensors files and their index are read; no weights are downloaded.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.checkpoint.hub import is_repo_id
from tuckaway.empty import init_empty_weights
from tuckaway.errors import CheckpointNotFound, ConfigError, TuckawayError
from tuckaway.formats import registered_formats
from tuckaway.plan.hub_headers import hub_config, hub_headers
from tuckaway.plan.skeleton import skeleton_of
from tuckaway.tensor import TensorSpec

__all__ = ["Source", "find_source"]

_log = logging.getLogger("tuckaway")

_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""How names of architectures end, and which of transformers' classes builds them."""


@dataclass(frozen=True)
class Source:
    """A model's structure, and what is known of its checkpoint.

    Args:
        model: its tensors may be on the meta device.
        name: what to call it.
        own_config: the ``quantization_config`` that its files state.
        checkpoint: headers of its files, where they are here.
        checkpoint_bytes: bytes of all tensors in its files.
    """

    model: nn.Module
    name: str
    own_config: Any = None
    checkpoint: Checkpoint | None = None
    checkpoint_bytes: int | None = None

    def stored(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return the specs with the formats of what the checkpoint holds quantized already: those are kept."""
        found = dict(specs)
        if self.checkpoint is None:
            return found
        for name, spec in specs.items():
            for format in registered_formats().values():
                serialized = format.find(name, self.checkpoint.entries, self.checkpoint.read)
                if serialized is not None:
                    found[name] = replace(spec, layout=serialized.layout, requires_grad=False)
                    break
        return found


def find_source(given: Any, *, revision: str | None = None) -> Source:
    """Return the model that a user names.

    Args:
        given: a module; a configuration of transformers, as an object or a dict; a folder or file of a checkpoint; or
            an id on the Hub.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ConfigError: it is none of these, or transformers knows no model of that configuration.
        CheckpointNotFound: there is no such folder or repository, or it has neither configuration nor weights.
    """
    if isinstance(given, nn.Module):
        return Source(given, type(given).__name__)
    if isinstance(given, str | os.PathLike):
        return _named(given, revision)
    if isinstance(given, Mapping) or hasattr(given, "model_type"):
        model = _built(given)
        return Source(model, type(model).__name__, _get(given, "quantization_config"))
    raise ConfigError(
        f"cannot plan for {type(given).__name__}",
        hint="pass a module, a configuration of transformers, a folder, or an id on the Hub",
    )


def _named(given: str | os.PathLike[str], revision: str | None) -> Source:
    path, name = Path(given), os.fspath(given)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        config = _read_config(folder / "config.json")
        checkpoint = _opened(path)
        if config is None and checkpoint is None:
            raise CheckpointNotFound(
                "no config.json and no weights", where=path, hint="name a folder that has one of them"
            )
        model = _built_or_skeleton(config, None if checkpoint is None else _shapes(checkpoint), name)
        nbytes = None if checkpoint is None else checkpoint.nbytes
        return Source(model, name, (config or {}).get("quantization_config"), checkpoint, nbytes)
    if not is_repo_id(name):
        raise CheckpointNotFound(
            "no such file or folder", where=path, hint="name a folder, a file or a Hub id like 'org/name'"
        )
    config, headers = hub_config(name, revision), hub_headers(name, revision)
    if config is None and headers is None:
        raise CheckpointNotFound(f"{name!r} has neither config.json nor safetensors on the Hub")
    model = _built_or_skeleton(config, headers, name)
    nbytes = None if headers is None else sum(_nbytes(*header) for header in headers.values())
    return Source(model, name, (config or {}).get("quantization_config"), None, nbytes)


def _opened(path: Path) -> Checkpoint | None:
    try:
        return Checkpoint.open(path, allow_pickle=False)
    except (
        TuckawayError
    ) as error:  # a plan needs no weights: where there are none yet, its load time is not known
        _log.info("planning without a checkpoint: %s", error)
        return None


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration: {error}", where=path) from error
    if not isinstance(content, dict):
        raise ConfigError("the configuration is no JSON object", where=path)
    return content


def _built_or_skeleton(
    config: dict[str, Any] | None, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None, name: str
) -> nn.Module:
    """The model of a configuration; where that cannot be, what the names in the checkpoint tell."""
    if config is not None and "model_type" in config:
        try:
            return _built(config)
        except (ConfigError, ModuleNotFoundError) as error:
            if shapes is None:
                raise
            _log.info("planning from the checkpoint's names: %s", error)
    if shapes is None:
        raise ConfigError(
            "the configuration names no model_type of transformers", where=name, hint="pass the module itself"
        )
    return skeleton_of(shapes)


def _built(config: Any) -> nn.Module:
    """Build the model of a transformers configuration, empty."""
    import transformers  # only here: all else is planned without it

    if isinstance(config, Mapping):
        kind = str(config.get("model_type"))
        fields = {
            key: value for key, value in config.items() if key not in ("model_type", "quantization_config")
        }
        try:
            auto: Any = transformers.AutoConfig
            config = auto.for_model(kind, **fields)
        except ValueError as error:
            raise ConfigError(f"transformers knows no model of type {kind!r}") from error
    architecture = next(iter(getattr(config, "architectures", None) or ()), "ForCausalLM")
    ending = next((end for end in _CLASSES if architecture.endswith(end)), None)
    names = [_CLASSES[ending]] if ending else []
    for name in (*names, "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel"):
        builder: Any = getattr(transformers, name, None)
        try:
            with init_empty_weights():
                model: Any = builder.from_config(config)
        except (ValueError, AttributeError):  # of another kind of model, or a version without the class
            continue
        model.tie_weights()
        model.eval()
        return model  # type: ignore[no-any-return]
    raise ConfigError(
        f"transformers builds no {architecture!r}", hint="build the module yourself and pass it instead"
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype by name; of what is quantized already, those that it has as a weight."""
    found, consumed = {}, set[str]()
    for name in checkpoint.entries:
        for format in registered_formats().values():
            serialized = format.find(name, checkpoint.entries, checkpoint.read)
            if serialized is not None:
                found[name] = (serialized.layout.shape, serialized.layout.dtype)
                consumed |= set(serialized.consumed)
                break
    for name, entry in checkpoint.entries.items():
        if name not in consumed and name not in found:
            found[name] = (tuple(entry.shape), entry.dtype)
    return found


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
