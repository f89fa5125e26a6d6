"""What becomes of every tensor of a checkpoint: :func:`decide`, by the rules that loading into a model follows."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.config import QuantizationConfig
from tuckaway.convert.architecture import models_of
from tuckaway.convert.guess import guess_model
from tuckaway.convert.layout import Item
from tuckaway.errors import ConfigError, MismatchError
from tuckaway.load.bind import cast_kept
from tuckaway.load.match import Feed, distinct, match_checkpoint
from tuckaway.load.renaming import renamed
from tuckaway.load.state_hooks import after_hooks
from tuckaway.plan import QuantizationReport, choose_specs, quantization_report, tied_groups
from tuckaway.save import plain_linears, state_of
from tuckaway.tensor import TensorSpec

__all__ = ["Decision", "decide"]

_log = logging.getLogger("tuckaway")


@dataclass(frozen=True)
class Decision:
    """What is to be written.

    Args:
        items: the tensors of the result, in the model's order.
        basis: whose names and modules decided: a class's name, or ``"names and shapes"``.
        report: what is quantized, what not and why.
        plain_linears: linear layers that stay as they are, for ``config.json``.
        dropped: tensors of the source that the model computes itself, and that are not written.
    """

    items: tuple[Item, ...]
    basis: str
    report: QuantizationReport
    plain_linears: tuple[str, ...]
    dropped: tuple[str, ...]


def decide(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    model: nn.Module | None = None,
    *,
    own_config: bool = True,
) -> Decision:
    """Decide by the given model, else by the one that ``config.json`` names, else by names and shapes.

    Args:
        checkpoint: an open checkpoint.
        config: what to quantize to.
        model: an empty model that the checkpoint belongs to.
        own_config: names in ``config`` that match nothing are an error.

    Raises:
        ConfigError: a name in ``config`` matches nothing.
        MismatchError: ``model`` and the checkpoint do not belong together.
    """
    if model is not None:
        return _by(model, type(model).__name__, checkpoint, config, own_config=own_config)
    for name, candidate in _candidates(checkpoint):
        try:
            return _by(candidate, name, checkpoint, config, own_config=own_config)
        except MismatchError as error:
            _log.info("the checkpoint is not one of %s: %s", name, error.what)
        except ConfigError as error:
            if "matches nothing" not in error.what:
                raise
            _log.info("the config is not one for %s: %s", name, error.what)
    return _by(guess_model(checkpoint), "names and shapes", checkpoint, config, own_config=own_config)


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[str, nn.Module]]:
    yield from models_of(checkpoint.directory, checkpoint.config())


def _by(
    model: nn.Module, basis: str, checkpoint: Checkpoint, config: QuantizationConfig, *, own_config: bool
) -> Decision:
    wanted, reasons = choose_specs(model, config, strict=own_config)
    groups = tied_groups(model)
    # parameters must come from the source, even where the model has some already
    real = {name: t for name, t in model.named_buffers(remove_duplicate=False) if not t.is_meta}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    needed = [names for names in distinct(wanted, groups) if wanted[names[0]].persistent]
    checkpoint, notes = renamed(checkpoint, model, needed)
    for note in notes:
        _log.info("%s", note)
    checkpoint = after_hooks(checkpoint, model)
    match = match_checkpoint(checkpoint, wanted, groups, config, real=real, ignored=ignored, strict=False)
    specs = {**wanted, **match.specs}
    items = {feed.names[0]: Item(feed) for feed in match.feeds}
    for name in match.kept:
        spec = specs[name]
        if spec.persistent and name in real:
            items[name] = Item(Feed((name,), spec, {}, {}), cast_kept(real[name], spec))
    ordered = [items.pop(name) for name, _ in state_of(model) if name in items]
    for name in match.unexpected:
        entry = checkpoint.entries[name]
        spec = TensorSpec(tuple(entry.shape), entry.dtype)
        ordered.append(Item(Feed((name,), spec, {"": entry}, {})))
    if match.unexpected:
        _log.warning(
            "%d tensors are unknown to %s and are carried along as they are: %s",
            len(match.unexpected),
            basis,
            ", ".join(match.unexpected[:5]),
        )
    quantized = {name for item in ordered if item.feed.spec.layout is not None for name in item.feed.names}
    return Decision(
        items=tuple(ordered),
        basis=basis,
        report=quantization_report(specs, reasons, ties=groups),
        plain_linears=tuple(plain_linears(model, quantized)),
        dropped=tuple(_dropped(checkpoint, wanted, ignored)),
    )


def _dropped(
    checkpoint: Checkpoint, specs: dict[str, TensorSpec], ignored: tuple[str, ...] | list[str]
) -> Iterator[str]:
    for name in checkpoint.entries:
        spec = specs.get(name)
        if (spec is not None and not spec.persistent) or (
            spec is None and any(re.search(pattern, name) for pattern in ignored)
        ):
            yield name
