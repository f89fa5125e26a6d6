"""One model of the zoo: how it is built, tiny and random, and what it is run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]

LENGTH = 16


@dataclass(frozen=True)
class Entry:
    """A model of transformers, by the names of its classes.

    Args:
        name: of the architecture.
        kind: column of the table.
        config: class of its config.
        model: class of the model.
        options: what makes it tiny.
        inputs: makes the arguments of its forward from its config.
    """

    name: str
    kind: str
    config: str
    model: str
    options: Mapping[str, Any]
    inputs: Callable[[Any], Inputs]
    note: str = field(default="", compare=False)

    def make_config(self) -> Any:
        """The config, a new one each time: models write to theirs."""
        import transformers

        return getattr(transformers, self.config)(**self.options)

    def build(self) -> nn.Module:
        """The model, with weights or without, as the caller's context has it."""
        import transformers

        return getattr(transformers, self.model)(self.make_config()).eval()

    def arguments(self, model: nn.Module) -> Inputs:
        """What to run it on."""
        return self.inputs(model.config)


def _tokens(config: Any, seed: int, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (2, length), generator=generator)


def normal(*shape: int) -> torch.Tensor:
    """Seeded values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids(config: Any) -> Inputs:
    """Two sequences of tokens."""
    return {"input_ids": _tokens(config, 1)}


def pair(config: Any) -> Inputs:
    """Tokens for an encoder and a decoder."""
    return {"input_ids": _tokens(config, 1), "decoder_input_ids": _tokens(config, 2, 8)}


def image(config: Any) -> Inputs:
    """Two pictures of the size that the config names."""
    size = getattr(config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": normal(2, 3, size, size)}


def audio(config: Any) -> Inputs:
    """Half a second of sound."""
    return {"input_values": normal(2, 2000)}
