"""A decoding step of a paged model in CUDA graphs: :class:`CapturedStep`.

Pages in host memory are brought in by the graph itself. A page on disk cannot be: threads read it. So the graph is cut
where such a page's turn begins, and a replay launches the pieces one after the other while the threads read ahead, the
first page of the next replay included. Either way Python is out of the way: one launch a page instead of some thirty.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tuckaway.errors import PagingError
from tuckaway.paging.binding import Page
from tuckaway.paging.slots import Slot
from tuckaway.paging.state import paging_of

__all__ = ["CapturedStep"]


class _Piece:
    """A graph, and the disk page that must be in its slot before it runs.

    Attributes:
        until: number of the last piece that reads the slot.
        ends: slots that are free after it, each with the number of the piece that it is filled for next; after the
            last that is one of the next replay.
    """

    __slots__ = ("ends", "graph", "page", "slot", "until")

    def __init__(self, graph: torch.cuda.CUDAGraph, page: Page | None, slot: Slot | None) -> None:
        self.graph = graph
        self.page = page
        self.slot = slot
        self.until = 0
        self.ends: list[tuple[Slot, int]] = []

    def end(self) -> None:
        """End its capture. Before a first block on disk nothing may have been launched: torch warns of that."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self.graph.capture_end()


class CapturedStep:
    """A function that runs a paged model on fixed tensors, captured once and then replayed by calling it.

    Args:
        model: paged on a CUDA device; a model that is not paged is captured as it is.
        step: takes nothing, reads and writes tensors that stay where they are (token, position, a static cache), and
            asks the device for nothing (no ``.item()``). It is run ``warmup`` times first and once while capturing,
            so a step that counts must be reset after this.
        warmup: eager runs, in which the order of pages is learned and kernels are compiled; one at least.
        slots: disk pages on the device at once. ``None``: as the model's own.

    Raises:
        PagingError: the model does not execute on CUDA, or a forward of it is under way.
        RuntimeError: torch's, if the step does what cannot be captured.

    Example::

        decode = CapturedStep(model, lambda: logits.copy_(model(token, past_key_values=cache).logits))
        cache.reset()
        for _ in range(100):
            decode()
            token.copy_(logits[:, -1].argmax(-1, keepdim=True))
    """

    def __init__(
        self, model: nn.Module, step: Callable[[], Any], *, warmup: int = 3, slots: int | None = None
    ) -> None:
        paging = paging_of(model)
        if not torch.cuda.is_available() or (paging is not None and paging.pager.device.type != "cuda"):
            raise PagingError(
                "only a model that executes on a CUDA device is captured", hint="call it as it is"
            )
        self._paging = paging
        self._device = torch.device("cuda") if paging is None else paging.pager.device
        self._step = step
        self._count = slots or (1 if paging is None else paging.pager.slots.count)
        self._pieces: list[_Piece] = []
        self._slots: list[Slot] = []
        self._holds: dict[int, int] = {}
        self._turning: dict[int, int] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)
        self.output = self._capture(max(warmup, 1))
        """What the step returned while it was captured; its tensors are written by every replay."""

    def _capture(self, warmup: int) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.no_grad(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(warmup):
                self._run()
            self._prepare()
            torch.cuda.synchronize()
            gc.collect()  # what the collector frees while capturing would end the capture
            torch.cuda.empty_cache()
            self._begin(None, None)
            try:
                output = self._run(record=True)
            except BaseException:
                self._abandon()
                raise
            self._pieces[-1].end()
        current.wait_stream(self._stream)
        self._link()
        return output

    def _prepare(self) -> None:
        """Let nothing be under way that a capture would have to wait for, and allocate what it may not."""
        if self._paging is None:
            return
        pager, homes = self._paging.pager, self._paging.homes
        pager.settle()
        outside = [page.unit for page in pager.pages if not page.gone and homes.pinned(page.unit) is None]
        for unit in outside:
            if unit.outer:
                self._add(unit.layout.nbytes)
        for _ in range(min(self._count, sum(not unit.outer for unit in outside))):
            self._add(pager.slots.nbytes)
        pager.steps.add(self)

    def _add(self, nbytes: int) -> Slot:
        slot = Slot(len(self._slots), nbytes, self._device)
        self._transfer.used(slot)
        self._slots.append(slot)
        self._turning[slot.index] = 0
        return slot

    def _run(self, *, record: bool = False) -> Any:
        if self._paging is None:
            return self._step()
        pager = self._paging.pager
        pager.begin_forward(self, recorder=self if record else None)
        try:
            return self._step()
        finally:
            pager.end_forward(self)

    def _begin(self, page: Page | None, slot: Slot | None) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that read for other models go on
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._pieces.append(_Piece(graph, page, slot))

    def _abandon(self) -> None:
        try:
            self._pieces[-1].end()
        except RuntimeError:
            torch.cuda.synchronize()  # the step's own error says more than that its capture is invalid
        self._pieces.clear()

    # A recorder, to the pager

    @property
    def idle(self) -> bool:
        """Whether no disk page is in its turn."""
        return not any(self._turning.values())

    def cut(self, page: Page) -> Slot:
        """End the piece that is being captured and begin the one that ``page`` is in its slot for."""
        self._pieces[-1].end()
        slot = next((s for s in self._slots if s.page is page), None)
        if slot is None or self._turning[slot.index] == 0:
            slot = self._claim(page)
            self._begin(page, slot)
        else:
            self._begin(None, None)
        self._turning[slot.index] += 1
        return slot

    def _claim(self, page: Page) -> Slot:
        nbytes = page.unit.layout.nbytes
        free = [s for s in self._slots if self._turning[s.index] == 0 and s.buffer.numel() >= nbytes]
        slot = next((s for s in free if s.page is page), None) or min(free, key=self._left_at, default=None)
        if slot is None:
            with torch.cuda.stream(torch.cuda.default_stream(self._device)):  # not of the graphs' memory
                slot = self._add(nbytes)
        slot.page = page
        return slot

    def _left_at(self, slot: Slot) -> tuple[int, int]:
        last = next((piece.until for piece in reversed(self._pieces) if piece.slot is slot), -1)
        return last, slot.buffer.numel()

    def leave(self, slot: Slot) -> None:
        """A turn of the slot's page ended: pieces to come do not read it."""
        self._turning[slot.index] -= 1
        number = len(self._pieces) - 1
        next(piece for piece in reversed(self._pieces) if piece.slot is slot).until = number

    def forget(self, page: Page) -> None:
        """Read a page anew before its next piece, because its home changed."""
        for index, number in list(self._holds.items()):
            if self._pieces[number].page is page:
                del self._holds[index]

    def _link(self) -> None:
        for slot in self._slots:
            mine = [number for number, piece in enumerate(self._pieces) if piece.slot is slot]
            for number, after in zip(mine, (*mine[1:], *mine[:1]), strict=True):
                self._pieces[self._pieces[number].until].ends.append((slot, after))

    # Replaying

    def __call__(self) -> Any:
        """Run the step on what its tensors hold now, and return :attr:`output`.

        Raises:
            StoreError: a page cannot be read; the step may be called again.
            ChecksumError: its bytes changed on disk.
        """
        for number, piece in enumerate(self._pieces):
            if piece.slot is not None:
                self._ensure(number)
            piece.graph.replay()
            for slot, after in piece.ends:
                self._transfer.used(slot)
                self._fill(after)
        return self.output

    @property
    def _transfer(self) -> Any:
        assert self._paging is not None
        return self._paging.pager.transfer

    def _fill(self, number: int) -> None:
        piece = self._pieces[number]
        slot, page = piece.slot, piece.page
        assert slot is not None
        assert page is not None
        held = self._holds.get(slot.index)
        if held is None or self._pieces[held].page is not page:
            self._transfer.start(page.unit, slot)
        self._holds[slot.index] = number

    def _ensure(self, number: int) -> None:
        slot = self._pieces[number].slot
        assert slot is not None
        if self._holds.get(slot.index) != number:
            self._fill(number)
        try:
            self._transfer.wait(slot)
        except BaseException:
            self._holds.pop(slot.index, None)
            raise
