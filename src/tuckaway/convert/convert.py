"""The order of the job: open, decide, plan, write shard by shard, switch. :func:`quantize_checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway import files
from tuckaway.checkpoint import Checkpoint, Progress, Ring, TensorEntry
from tuckaway.checkpoint.hub import is_repo_id, push
from tuckaway.checkpoint.seal import INDEX_PLACEHOLDER, sealed_index
from tuckaway.checkpoint.shards import as_bytes
from tuckaway.config import QuantizationConfig
from tuckaway.convert.decide import Decision, decide
from tuckaway.convert.layout import Item, ShardPlan, plan_files
from tuckaway.convert.remote import RemoteSource
from tuckaway.convert.shard import InShard, ShardFile, checksum_of
from tuckaway.convert.sidecars import carry, files_to_carry, write_config
from tuckaway.convert.sources import LocalSource, Source
from tuckaway.convert.staging import Record, Staging, fingerprint_of
from tuckaway.errors import ChecksumError, StoreError
from tuckaway.load.carry import PIECE_BYTES, piece_bytes
from tuckaway.load.copies import check_copies
from tuckaway.load.fill import fill
from tuckaway.load.match import Feed, Match
from tuckaway.plan import QuantizationReport, format_bytes

__all__ = ["Conversion", "quantize_checkpoint"]

_log = logging.getLogger("tuckaway")

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Conversion:
    """What :func:`quantize_checkpoint` did.

    Args:
        destination: the new checkpoint's folder.
        files: its weight files.
        source_bytes: bytes of the source's tensors that were read, or would have been without an earlier run's.
        nbytes: bytes of the new weight files.
        kept_shards: shards that an earlier run had finished.
        seconds: how long it took.
        basis: what decided which tensors are weights: a model's class, or ``"names and shapes"``.
        report: what was quantized, what not and why.
        dropped: tensors of the source that its model computes itself, and that were not written.
        address: where it was pushed to.
    """

    destination: Path
    files: tuple[Path, ...]
    source_bytes: int
    nbytes: int
    kept_shards: int
    seconds: float
    basis: str
    report: QuantizationReport
    dropped: tuple[str, ...]
    address: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.report}\ndecided by {self.basis}; {format_bytes(self.source_bytes)} became "
            f"{format_bytes(self.nbytes)} in {len(self.files)} files in {self.seconds:.1f} s: {self.destination}"
        )


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    quantization_config: QuantizationConfig | Any = None,
    *,
    model: nn.Module | None = None,
    max_shard_size: int | str | None = None,
    low_disk: bool = False,
    push_to_hub: str | None = None,
    device: torch.device | str | int | None = None,
    revision: str | None = None,
    allow_pickle: bool = True,
    non_finite: str = "raise",
    progress: bool | None = None,
) -> Conversion:
    """Turn a checkpoint of any size into a quantized one, in the memory of a ring of buffers.

    The tensors are those that :func:`~tuckaway.load_and_quantize_model` and :func:`~tuckaway.save_model` would write,
    bit for bit. Which of them are weights is decided by the empty ``model``, else by the class that ``config.json``
    names, where transformers knows it, else by names and shapes; the report says it. ``config.json`` comes along with
    a ``quantization_config`` that transformers understands, and so do tokenizer, generation settings and templates.

    The destination appears whole or not at all. After a kill, the same call goes on behind the shards that were
    finished, which are verified first; the result is the same.

    Args:
        source: a safetensors file, an index of shards, a folder, a ``pytorch_model.bin`` or a Hub id.
        destination: folder of the result; it must not exist, or be empty.
        quantization_config: a :class:`~tuckaway.QuantizationConfig`, accelerate's or transformers' own, or a format's
            name; ``None``: nf4, nested.
        model: a model, built empty, that the checkpoint belongs to.
        max_shard_size: bytes of a shard of the result at most; a shard is what a kill can cost. ``None``: 5 GB, or 1 GB
            with ``low_disk``, as the shards of the source that make one must be there together.
        low_disk: take every shard of a Hub id out of the Hub's cache when what was made of it is verified on the disk.
        push_to_hub: Hub id to upload the result to; a new repository is private.
        device: where weights are quantized; ``None``: the GPU, where there is one.
        revision: branch, tag or commit of a Hub id.
        allow_pickle: read ``pytorch_model.bin`` files (always with ``weights_only``).
        non_finite: as :func:`~tuckaway.load_and_quantize_model` has it.
        progress: show a bar with the time that is left; ``None``: when standard error is a terminal.

    Raises:
        ConfigError: a config that makes no sense, or a name in it that matches nothing.
        CheckpointError: something is wrong with the source's files.
        MismatchError: ``model`` and the source do not belong together, or copies of a tied weight differ.
        StoreBusy: another process makes the same destination.
        StoreFull: the disk has no room for the result.
        StoreError: the destination is not empty, lies in the source, or cannot be written to.

    Example:
        >>> import tempfile, tuckaway
        >>> folder = Path(tempfile.mkdtemp())
        >>> tuckaway.save_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), folder / "plain")
        >>> done = quantize_checkpoint(folder / "plain", folder / "quantized", "nf4")
        >>> [(row.name, row.format) for row in done.report.quantized]
        [('0.weight', 'nf4')]
    """
    began = time.perf_counter()
    max_bytes = as_bytes(max_shard_size or ("1GB" if low_disk else "5GB"))
    config = QuantizationConfig.of(
        quantization_config if quantization_config is not None else QuantizationConfig()
    )
    own = quantization_config is None or isinstance(quantization_config, QuantizationConfig)
    target = Path(destination).absolute()
    opened = _open(source, revision=revision, allow_pickle=allow_pickle, low_disk=low_disk)
    try:
        _check_apart(opened.checkpoint, target, whole=not Path(source).is_file())
        decision = decide(opened.checkpoint, config, model, own_config=own)
        if isinstance(opened, RemoteSource) and not all(map(_is_plain, decision.items)):
            opened.close()  # tensors are put together of several: they are all fetched first
            opened = LocalSource(Checkpoint.open(source, revision=revision, allow_pickle=allow_pickle))
            decision = decide(opened.checkpoint, config, model, own_config=own)
        plans = plan_files(_ordered(opened, decision), max_bytes, _METADATA)
        job = _Job(opened, decision, plans, _device(device), non_finite)
        identity = fingerprint_of(opened.identity(), dataclasses.asdict(config), max_bytes, job.layout())
        description = {"source": str(source), "format": config.format, "decided_by": decision.basis}
        with Staging(target, identity, description) as staging:
            kept = len(staging.records)
            if not staging.complete:
                job.run(staging, progress)
            records = staging.records
    finally:
        opened.close()
    address = None if push_to_hub is None else push(target, push_to_hub)
    return Conversion(
        destination=target,
        files=tuple(target / name for name in sorted(records)),
        source_bytes=job.source_bytes,
        nbytes=sum(record.nbytes for record in records.values()),
        kept_shards=kept,
        seconds=time.perf_counter() - began,
        basis=decision.basis,
        report=decision.report,
        dropped=decision.dropped,
        address=address,
    )


def _open(source: str | Path, *, revision: str | None, allow_pickle: bool, low_disk: bool) -> Source:
    if isinstance(source, str) and is_repo_id(source) and not Path(source).exists():
        remote = RemoteSource.find(source, revision, low_disk=low_disk)
        if remote is not None:
            return remote
    return LocalSource(Checkpoint.open(source, revision=revision, allow_pickle=allow_pickle))


def _check_apart(checkpoint: Checkpoint, target: Path, *, whole: bool) -> None:
    folder, inside = checkpoint.directory.resolve(), target.resolve()
    if inside == folder or (whole and inside.is_relative_to(folder)):
        raise StoreError("the destination lies in the source", where=target, hint="choose another folder")
    if folder.is_relative_to(inside):
        raise StoreError("the source lies in the destination", where=target, hint="choose another folder")


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (
        torch.device("cpu")
        if found is None
        else torch.device(found.type, torch.accelerator.current_device_index())
    )


def _ordered(source: Source, decision: Decision) -> Sequence[Item]:
    if not source.in_shard_order:
        return decision.items
    number = {path: i for i, path in enumerate(source.checkpoint.files)}
    return sorted(
        decision.items,
        key=lambda item: max((number[entry.path] for entry in item.feed.entries.values()), default=0),
    )


class _Job:
    """Everything that is known before the first byte is read."""

    def __init__(
        self,
        source: Source,
        decision: Decision,
        plans: list[ShardPlan],
        device: torch.device,
        non_finite: str,
    ) -> None:
        self.source = source
        self.decision = decision
        self.config = source.checkpoint.config()
        self.carried = files_to_carry(source.checkpoint.directory)
        self.device = device
        self.non_finite = non_finite
        if len(plans) == 1:
            self.plans = {"model.safetensors": plans[0]}
        else:
            count = len(plans)
            self.plans = {
                f"model-{i:05d}-of-{count:05d}.safetensors": plan for i, plan in enumerate(plans, 1)
            }

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for all shards."""
        return sum(map(_bytes_read, self.plans.values()))

    def layout(self) -> list[object]:
        """Return names, dtypes and shapes of all that is to be written."""
        return [
            [name, [[key, str(part[0]), part[1]] for key, part in plan.fixed.items()], sorted(plan.open)]
            for name, plan in self.plans.items()
        ]

    def run(self, staging: Staging, progress: bool | None) -> None:
        """Write what is missing, and let the destination appear."""
        todo = [name for name in self.plans if name not in staging.records]
        files.require_space(staging.folder, sum(self.plans[name].most_bytes for name in todo))
        done = sum(_bytes_read(self.plans[name]) for name in staging.records)
        with Progress(self.source_bytes, "Quantizing", done=done, show=progress) as bar:
            for number, name in enumerate(todo):
                for later in todo[number : number + 2]:
                    self.source.expect(_needs(self.plans[later]))
                record = self._write(staging.folder / name, self.plans[name], bar)
                if self.source.low_disk:
                    _verify(staging.folder / name, record)
                staging.add(name, record)
                needed = {path for later in todo[number + 1 :] for path in _needs(self.plans[later])}
                self.source.drop(_needs(self.plans[name]) - needed)
        if len(self.plans) > 1:
            files.write_atomically(
                staging.folder / "model.safetensors.index.json", self._index(staging.records)
            )
        carry(self.carried, staging.folder)
        write_config(self.config, self.decision.items, self.decision.plain_linears, staging.folder)
        staging.finish()

    def _write(self, path: Path, plan: ShardPlan, bar: Progress) -> Record:
        feeds = {item.name: _present(item.feed, self.source) for item in plan.items if item.value is None}
        check_copies(Match(tuple(feeds.values()), (), ()), piece_bytes=PIECE_BYTES)
        ring = Ring.towards(self.device)
        with ShardFile(path, plan, _METADATA) as shard:
            for item in plan.items:
                if item.value is not None:
                    shard.write(item.name, 0, item.value.detach().cpu().contiguous())
            fill(
                tuple(feeds.values()),
                lambda feed: InShard(shard, feed.names[0], self.device),
                piece_bytes=piece_bytes(ring),
                progress=bar,
                ring=ring,
                non_finite=self.non_finite,
            )
            return Record(*shard.commit())

    def _index(self, records: Mapping[str, Record]) -> bytes:
        keys = {key: name for name, plan in self.plans.items() for key in (*plan.fixed, *plan.open)}
        total = sum(record.nbytes - self.plans[name].room for name, record in records.items())
        content = {
            "metadata": {"total_size": total, **INDEX_PLACEHOLDER},
            "weight_map": dict(sorted(keys.items())),
        }
        return sealed_index(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _verify(path: Path, record: Record) -> None:
    """Read a shard back, from the disk where the system allows it, before what it was made of goes."""
    files.forget(path)
    if checksum_of(path) != (record.nbytes, record.checksum):
        raise ChecksumError("the disk does not give back what was written", where=path, hint="check the disk")


def _is_plain(item: Item) -> bool:
    return all(type(entry) is TensorEntry for entry in item.feed.entries.values())


def _bytes_read(plan: ShardPlan) -> int:
    return sum(entry.nbytes for item in plan.items for entry in item.feed.entries.values())


def _needs(plan: ShardPlan) -> set[Path]:
    return {
        entry.path
        for item in plan.items
        for entries in (item.feed.entries, *item.feed.copies)
        for entry in entries.values()
    }


def _present(feed: Feed, source: Source) -> Feed:
    """Return a feed whose shards are there."""
    return dataclasses.replace(
        feed,
        entries={key: source.entry(entry) for key, entry in feed.entries.items()},
        copies=tuple({key: source.entry(entry) for key, entry in copy.items()} for copy in feed.copies),
    )
