"""A model by its name, as the commands take it: built empty, then loaded, with what each step cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tuckaway
from tuckaway.cli.memory import Memory, memory
from tuckaway.cli.options import DeviceMap
from tuckaway.config import as_dtype
from tuckaway.errors import CheckpointNotFound, ConfigError

__all__ = ["Built", "Loaded", "build", "load", "quantization_config", "tokenizer_of"]


@dataclass(frozen=True)
class Built:
    """A model without weights.

    Args:
        name: what the user called it.
        source: folder or Hub id of its files.
        network: the module, on the meta device.
        parameters: how many it has; tied ones once.
        revision: branch, tag or commit on the Hub.
    """

    name: str
    source: str
    network: Any
    parameters: int
    revision: str | None = None

    @property
    def blocks(self) -> list[str]:
        """Names of the modules that may not be split between devices."""
        whole = set(self.network._no_split_modules or ())
        return [name for name, module in self.network.named_modules() if type(module).__name__ in whole]


@dataclass(frozen=True)
class Loaded:
    """A model with its weights.

    Args:
        network: the module.
        seconds: that reading, quantizing and placing took.
        before: memory before.
        after: memory after.
    """

    network: Any
    seconds: float
    before: Memory
    after: Memory


def build(name: str, *, source: str | None = None, revision: str | None = None) -> Built:
    """Build a causal language model of transformers from its config, without any memory.

    Args:
        name: folder or Hub id.
        source: where its files are, if not under ``name``.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointNotFound: no config can be read there.
        ConfigError: transformers has no causal language model of that type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source or name
    with _found(source):
        architecture = AutoConfig.from_pretrained(source, revision=revision or "main")
    try:
        with tuckaway.init_empty_weights():
            network: Any = AutoModelForCausalLM.from_config(architecture)
    except ValueError as error:  # what transformers raises for a config that is no causal language model's
        raise ConfigError(
            f"{architecture.model_type!r} is no causal language model",
            where=source,
            hint="load it in Python: tuckaway.load_and_quantize_model takes any torch.nn.Module",
        ) from error
    network.eval()
    network.tie_weights()
    _take_generation_config(network, source, revision)
    return Built(name, source, network, sum(p.numel() for p in network.parameters()), revision)


def tokenizer_of(built: Built) -> Any:
    """Return the model's tokenizer.

    Raises:
        CheckpointNotFound: there is none.
    """
    from transformers import AutoTokenizer

    with _found(built.source):
        return AutoTokenizer.from_pretrained(built.source, revision=built.revision or "main")


def quantization_config(
    built: Built, format: str | None, dtype: str | torch.dtype | None = None
) -> tuckaway.QuantizationConfig | None:
    """Return what the model is quantized to; ``None`` leaves it as it is.

    Args:
        built: a model that may say in its own config that it is quantized already.
        format: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"none"``; ``None``: as the model says itself, or nf4.
        dtype: what products are computed in. ``None``: what is fastest at the batch of one of an answer: bf16 on an
            accelerator, fp32 on a CPU.
    """
    compute = as_dtype(dtype, "dtype") or (
        torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    )
    own = getattr(built.network.config, "quantization_config", None)
    if format is None and own is not None:
        return tuckaway.QuantizationConfig.of(own).replace(compute_dtype=compute)
    if format == "none":
        return None
    return tuckaway.QuantizationConfig(format=format or "nf4", compute_dtype=compute)


@contextmanager
def load(
    built: Built,
    config: tuckaway.QuantizationConfig | None,
    *,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: Path | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
) -> Iterator[Loaded]:
    """Load the weights; a context manager, at whose end a temporary offload folder goes.

    Args:
        built: the model; it is filled.
        config: what it is quantized to; ``None`` leaves weights as they are.
        device_map: where modules lie; ``None``: ``"auto"``.
        max_memory: bytes by device.
        offload_folder: for what goes to disk; ``None``: a temporary one.
        dtype: dtype of unquantized weights where ``config`` is ``None``.
        progress: show a bar; ``None``: in a terminal.

    Raises:
        TuckawayError: as :func:`~tuckaway.load_and_quantize_model`.
    """
    where: Any = {
        "device_map": "auto" if device_map is None else device_map.value,
        "max_memory": max_memory,
        "progress": progress,
    }
    with tempfile.TemporaryDirectory(prefix="tuckaway-") as temporary:
        where["offload_folder"] = offload_folder or temporary
        before, began = memory(), time.perf_counter()
        if config is None:
            network = tuckaway.load_checkpoint_and_dispatch(
                built.network, built.source, dtype=as_dtype(dtype, "dtype"), **where
            )
        else:
            network = tuckaway.load_and_quantize_model(
                built.network, config, built.source, revision=built.revision, **where
            )
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        yield Loaded(network, time.perf_counter() - began, before, memory())


def _take_generation_config(network: Any, source: str, revision: str | None) -> None:
    """Let the model end its answers as its makers say: a model built from a config knows one end token only."""
    from transformers import GenerationConfig

    try:
        network.generation_config = GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:  # it has none: what its config says holds
        return


@contextmanager
def _found(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # what transformers raises for a folder or Hub id it cannot read
        first = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointNotFound(
            first, where=source, hint="name a folder with config.json, or an id on the Hub"
        ) from error
