"""Bring every byte of a checkpoint to its place: the stream of pieces on one side, destinations on the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing

import torch

from tuckaway.checkpoint import Progress, Request, Ring, stream
from tuckaway.checkpoint.reader import read_tensor
from tuckaway.errors import NonFiniteError
from tuckaway.formats import Components
from tuckaway.load.finite import NonFinite, counted
from tuckaway.load.match import Feed
from tuckaway.load.place import Destination, Streaming
from tuckaway.load.scaled import SCALE, ScaledSink
from tuckaway.load.sinks import CopySink, QuantizeSink, Sink, sink_for

__all__ = ["fill", "fill_from_tensors"]

_DECODED = 4
"""Bytes of an 8-bit float that was multiplied by its scale: in pieces of codes, work would take 5 times the planned."""


class _Filling:
    """One tensor on its way: its components, the sinks that fill them, and how many sinks are still open."""

    def __init__(self, feed: Feed, destination: Destination) -> None:
        self.destination = destination
        self.streaming = destination if isinstance(destination, Streaming) else None
        self.components: Components = destination.open(feed.spec)
        for key, value in feed.values.items():
            if value.numel() == 1:
                # the host knows the number: a copy of unpinned memory would wait for all copies before it
                self.components[key].fill_(value.item())
            else:
                self.components[key].copy_(value)
        self.open = sum(component != SCALE for component in feed.entries)

    def sink(self, feed: Feed, component: str) -> Sink:
        inner = self._plain_sink(feed, component)
        if SCALE not in feed.entries:
            return inner
        device = next((part.device for part in self.components.values()), torch.device("cpu"))
        return ScaledSink(inner, read_tensor(feed.entries[SCALE]), feed.entries[component].shape, device)

    def _plain_sink(self, feed: Feed, component: str) -> Sink:
        if self.streaming is not None:
            return self.streaming.sink(feed.spec, component, feed.entries[component].dtype, self.components)
        if not feed.quantized_already:
            return sink_for(feed.spec, self.components)
        return CopySink(self.components[component], feed.entries[component].dtype)

    def finished_one(self) -> None:
        self.open -= 1
        if self.open == 0:
            self.destination.close(self.components)


def fill(
    feeds: tuple[Feed, ...],
    destination_of: Callable[[Feed], Destination],
    *,
    piece_bytes: int,
    progress: Progress | bool | None = None,
    ring: Ring | None = None,
    non_finite: str = "raise",
) -> None:
    """Read every feed's tensors in file order and fill their destinations.

    Args:
        feeds: what is to be read.
        destination_of: gives the destination of a feed; asked once, when its first byte arrives.
        piece_bytes: most bytes of a checkpoint in memory at once, but for tensors that must come whole.
        progress: show a bar; ``None``: when standard error is a terminal; or one to advance that goes on after.
        ring: the buffers that the bytes pass through.
        non_finite: ``"raise"`` or ``"keep"``: what to do about NaN and infinity in weights that are quantized.

    Raises:
        NonFiniteError: there are some; it names them with their number.
        CheckpointError: a file is not what its header promised.
    """
    owner: dict[str, tuple[Feed, str]] = {}
    requests = []
    for feed in feeds:
        for component, entry in feed.entries.items():
            if component == SCALE:
                continue
            owner[entry.name] = (feed, component)
            widest = _DECODED if entry.dtype.itemsize == 1 and not feed.quantized_already else 0
            requests.append(Request(entry, *_piece_rules(feed), widest))
    fillings: dict[tuple[str, ...], _Filling] = {}
    suspects: dict[str, NonFinite] = {}
    sinks: dict[str, Sink] = {}
    # closed at once when a sink fails: the traceback would keep the file and the thread that reads ahead
    reading = stream(requests, piece_bytes=piece_bytes, progress=progress, ring=ring)
    with torch.no_grad(), closing(reading) as pieces:  # type: ignore[type-var]
        for piece in pieces:
            name = piece.entry.name
            feed, component = owner[name]
            filling = fillings.get(feed.names)
            if filling is None:
                filling = fillings[feed.names] = _Filling(feed, destination_of(feed))
            sink = sinks.get(name)
            if sink is None:
                sink = sinks[name] = filling.sink(feed, component)
            if piece.tensor.numel():
                sink.write(piece.start, piece.tensor)
            if piece.last:
                sink.finish()
                if isinstance(inner := getattr(sink, "inner", sink), QuantizeSink):
                    suspects[name] = inner.non_finite
                del sinks[name]
                filling.finished_one()
                if filling.open == 0:
                    del fillings[feed.names]
    _refuse_non_finite(suspects, non_finite)


def _refuse_non_finite(suspects: Mapping[str, NonFinite], policy: str) -> None:
    """Complain of the weights with values that no block of weights can be scaled by."""
    if policy == "keep":
        return
    counts = counted(suspects)
    bad = [f"{name!r} ({count})" for name, count in counts.items() if count]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        named = ", ".join(bad[:5]) + more
        raise NonFiniteError(
            f"weights that are to be quantized hold NaN, infinity or (int8) more than fp16 can: {named}",
            hint="no scale can be made of them: skip these modules, or quantize all the same with non_finite='keep'",
        )


def _piece_rules(feed: Feed) -> tuple[int, bool]:
    """Return what pieces must start on a multiple of, and whether the tensor must come whole."""
    layout = feed.spec.layout
    align, whole = 1, False
    if not feed.quantized_already and layout is not None:
        sink = sink_for(feed.spec, feed.spec.empty("meta"))
        align, whole = sink.align, sink.whole
    if SCALE in feed.entries and feed.spec.shape:
        align = math.lcm(align, max(feed.entries[""].shape[-1], 1))
    return align, whole


def fill_from_tensors(
    feeds: tuple[Feed, ...],
    state: Mapping[str, torch.Tensor],
    destination_of: Callable[[Feed], Destination],
    *,
    non_finite: str = "raise",
) -> None:
    """Quantize tensors that are in memory already: a model with real weights.

    Raises:
        NonFiniteError: as by :func:`fill`.
    """
    suspects: dict[str, NonFinite] = {}
    with torch.no_grad():
        for feed in feeds:
            destination = destination_of(feed)
            components = destination.open(feed.spec)
            source = state[feed.names[0]].detach().contiguous()
            sink = sink_for(feed.spec, components)
            if source.numel():
                sink.write(0, source.view(-1))
            sink.finish()
            if isinstance(sink, QuantizeSink):
                suspects[feed.names[0]] = sink.non_finite
            destination.close(components)
    _refuse_non_finite(suspects, non_finite)
