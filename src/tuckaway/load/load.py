"""The public functions, and the order of the job: match, plan, validate, read, bind."""

from __future__ import annotations

import errno
import logging
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint, Ring, TensorEntry
from tuckaway.checkpoint.entry import reading
from tuckaway.config import QuantizationConfig
from tuckaway.empty import rebuild_buffers
from tuckaway.errors import ConfigError, LoadOutOfMemoryError, PagingError, PlanError, TuckawayError
from tuckaway.load.bind import bind_kept, bind_resident, cast_kept, check_kept, restoration
from tuckaway.load.copies import check_copies
from tuckaway.load.fill import fill, fill_from_tensors
from tuckaway.load.match import Feed, Match, distinct, match_checkpoint, match_model
from tuckaway.load.merging import Merge, Split
from tuckaway.load.place import Destination, InPage, OnDevice, OnDisk
from tuckaway.load.renaming import renamed
from tuckaway.load.state_hooks import after_hooks, extra_states, set_extra_states
from tuckaway.paging import PageHomes, PagePlan, attach, materialize, paging_of, plan_pages
from tuckaway.plan import (
    Plan,
    account,
    check_devices,
    choose_specs,
    executing_device,
    main_device_of,
    quantization_report,
    resolve_device_map,
    tied_groups,
)
from tuckaway.plan.memory import parse_bytes
from tuckaway.plan.ties import ancestors
from tuckaway.tensor import TensorSpec, components_of

__all__ = ["load_and_quantize_model", "load_checkpoint_and_dispatch", "run", "with_preloaded"]

_log = logging.getLogger("tuckaway")

PIECE_BYTES = 16 * 2**20 - 64
"""Bytes of a piece of a checkpoint: with the 64 that align it, a power of two, as pinned memory comes in no other size.

Larger pieces are no faster on a CPU, whose caches they leave."""

DeviceMap = Mapping[str, int | str | torch.device] | str | int | torch.device | Plan


def load_and_quantize_model(
    model: nn.Module,
    quantization_config: QuantizationConfig | Any = None,
    weights_location: str | Path | None = None,
    device_map: DeviceMap | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    offload_state_dict: bool = False,
    *,
    bnb_quantization_config: Any = None,
    main_device: int | str | torch.device | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    strict: bool = True,
    allow_pickle: bool = True,
    verify_checksums: bool = True,
    non_finite: str = "raise",
    revision: str | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[Merge | Split] = (),
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, quantizing its weights on the way, wherever they are placed.

    Args:
        model: built under :func:`~tuckaway.init_empty_weights`, or with real weights, which are then quantized where
            no ``weights_location`` is given.
        quantization_config: a :class:`~tuckaway.QuantizationConfig`, accelerate's ``BnbQuantizationConfig``,
            transformers' ``BitsAndBytesConfig`` or a format's name; none of them is changed. ``None``: what the
            checkpoint's own ``config.json`` says, or the default (nf4, nested).
        weights_location: a safetensors file, an index of shards, a folder, a ``pytorch_model.bin`` or a Hub id. An
            already quantized checkpoint, bitsandbytes' own included, keeps its format.
        device_map: ``None`` (everything on the GPU, or on the CPU where there is none), ``"auto"``, ``"balanced"``,
            ``"balanced_low_0"``, ``"sequential"``, ``"cpu"``, a dict of module names to a GPU's number, ``"cpu"`` or
            ``"disk"``, or a :class:`~tuckaway.Plan`, whose slots, format and other settings are used too. Blocks on
            ``"cpu"`` and ``"disk"`` are paged onto the executing device for their turn.
        no_split_module_classes: class names of modules that must lie on one device, such as decoder layers. ``None``:
            those that a transformers model names itself.
        max_memory: bytes a device may take, by device (``{0: "2GB", "cpu": "16GB"}``), for the named maps.
        offload_folder: folder for what is placed on disk.
        offload_state_dict: accepted as accelerate has it; loading never holds a state dict in memory.
        bnb_quantization_config: accelerate's name for ``quantization_config``.
        main_device: device that executes. ``None``: the first GPU in the map, or the CPU when it names none.
        offload_buffers: page the buffers of offloaded blocks too; otherwise they stay on the executing device.
        skip_keys: keyword arguments that are not moved between devices on the way into a block.
        strict: refuse a checkpoint with tensors the model has no place for.
        allow_pickle: read ``pytorch_model.bin`` files (always with ``weights_only``). ``TUCKAWAY_ALLOW_PICKLE=0`` in
            the environment refuses them all.
        verify_checksums: compare what is read with the checksums that tuckaway writes into its checkpoints.
        non_finite: ``"raise"`` a NonFiniteError for NaN or infinity in a weight that is to be quantized, of whose block
            no scale can be made, or ``"keep"``: quantize all the same. Weights that stay floats may hold them.
        revision: branch, tag or commit of a Hub id.
        slots: blocks on the executing device at once. ``None``: what a plan says, or two, which let the next block
            come while one computes; each more, of the largest block's size, lets another one stay, or come, earlier.
        disk_cache_bytes: host memory (``"8GB"``) that a fixed part of the blocks on disk stays in once it was read.
        key_mapping: regular expressions of names in the checkpoint to what replaces them, applied in this order; as
            transformers has it. What wrappers add to all names (``module.``, ``_orig_mod.``), or a prefix that one
            side lacks (``model.``), is found without, and so are the rules that transformers has for its own models.
        conversions: :class:`~tuckaway.Merge` and :class:`~tuckaway.Split`: tensors of the checkpoint to join or cut.
        progress: show a bar; ``None``: when standard error is a terminal.

    Returns:
        The same model, with ``hf_device_map`` and ``quantization_report``.

    Raises:
        ConfigError: a config that makes no sense, or an empty model without ``weights_location``.
        CheckpointError: something is wrong with the checkpoint's files.
        MismatchError: names, shapes or dtypes of model and checkpoint differ.
        PlanError: a device map that cannot be, a model that does not fit, ``"disk"`` without ``offload_folder``.
        PagingError: the model is paged already.
        StoreError: the offload folder cannot be used.
        LoadOutOfMemoryError: memory ran out. In every one of these cases the model is as it was.

    Example:
        >>> import tempfile, tuckaway
        >>> folder = tempfile.mkdtemp()
        >>> tuckaway.save_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), folder)
        >>> with tuckaway.init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        >>> model = load_and_quantize_model(model, "nf4", weights_location=folder)
        >>> model[0].weight.format, model[1].weight.dtype  # the output head stays as it is
        ('nf4', torch.bfloat16)
    """
    given = quantization_config if quantization_config is not None else bnb_quantization_config
    if non_finite not in ("raise", "keep"):
        raise ConfigError(f"non_finite must be 'raise' or 'keep', not {non_finite!r}")
    checkpoint = _open(
        model,
        weights_location,
        revision=revision,
        allow_pickle=allow_pickle,
        verify_checksums=verify_checksums,
    )
    planned = device_map if given is None and isinstance(device_map, Plan) else None
    if planned is not None:
        given = planned.quantization_config
    elif given is None and checkpoint is not None:
        given = _own_config(checkpoint)
    unquantized = planned is not None and given is None
    config = None if unquantized else QuantizationConfig.of(given if given is not None else "nf4")
    return run(
        model,
        checkpoint,
        config,
        dtype=None if planned is None else planned.dtype,
        device_map=device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
        main_device=main_device,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        strict=strict,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
        key_mapping=key_mapping,
        conversions=conversions,
        non_finite=non_finite,
        progress=progress,
        # a pattern of ours that matches nothing is a mistake; others' configs name modules of many models
        own_config=isinstance(given, QuantizationConfig),
    )


def _own_config(checkpoint: Checkpoint) -> Any:
    """Return what a checkpoint says of its own weights; 8-bit floats are a way to store them, and say nothing."""
    given = (checkpoint.config() or {}).get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    return None if method in ("fp8", "fbgemm_fp8", "compressed-tensors") else given


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    *,
    main_device: int | str | torch.device | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
    progress: bool | None = None,
) -> nn.Module:
    """Load a checkpoint into a model as it is, unquantized, and place it over GPU, CPU and disk.

    accelerate's function of this name, with its parameters. A checkpoint that is quantized already stays quantized.

    Args:
        model: built under :func:`~tuckaway.init_empty_weights`.
        checkpoint: as ``weights_location`` of :func:`load_and_quantize_model`.
        device_map: as there.
        max_memory: as there.
        no_split_module_classes: as there.
        offload_folder: as there.
        offload_buffers: as there.
        dtype: dtype of all float tensors; ``None``: the checkpoint's stay what the model has.
        offload_state_dict: accepted; loading never holds a state dict in memory.
        skip_keys: as there.
        preload_module_classes: class names of modules that are paged whole, like ``no_split_module_classes``.
        force_hooks: move inputs to where the model is, even where all of it is on the CPU.
        strict: refuse a checkpoint with tensors the model has no place for; missing ones are always refused.
        main_device: as there.
        slots: as there.
        disk_cache_bytes: as there.
        progress: as there.

    Raises:
        TuckawayError: as :func:`load_and_quantize_model`.
    """
    source = _open(model, checkpoint, revision=None, allow_pickle=True, verify_checksums=True)
    return run(
        model,
        source,
        None,
        dtype=device_map.dtype if dtype is None and isinstance(device_map, Plan) else dtype,
        device_map=device_map,
        no_split_module_classes=with_preloaded(model, no_split_module_classes, preload_module_classes),
        max_memory=max_memory,
        offload_folder=offload_folder,
        main_device=main_device,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        strict=strict,
        hooks=True if force_hooks else None,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
        progress=progress,
    )


def _open(
    model: nn.Module,
    location: str | Path | None,
    *,
    revision: str | None,
    allow_pickle: bool,
    verify_checksums: bool,
) -> Checkpoint | None:
    if location is not None:
        return Checkpoint.open(
            location, revision=revision, allow_pickle=allow_pickle, verify_checksums=verify_checksums
        )
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise ConfigError(
            "the model is empty and weights_location is None", where=empty, hint="name a checkpoint"
        )
    return None


def run(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    config: QuantizationConfig | None,
    *,
    device_map: DeviceMap | None,
    no_split_module_classes: Sequence[str] | None,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
    main_device: int | str | torch.device | None,
    offload_buffers: bool,
    skip_keys: str | Sequence[str] | None,
    strict: bool,
    progress: bool | None,
    dtype: torch.dtype | str | None = None,
    own_config: bool = True,
    keep_in_fp32: Sequence[str] = (),
    hooks: bool | None = None,
    slots: int | None = None,
    disk_cache_bytes: int | str = 0,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[Merge | Split] = (),
    non_finite: str = "raise",
) -> nn.Module:
    """Do the whole job; ``checkpoint=None`` takes the weights that the model has. The public functions call this.

    Beyond their parameters: ``keep_in_fp32``, paths or trailing parts of paths of modules whose floats stay in fp32;
    and ``hooks``, whether inputs are moved to where a model without pages is (``None``: unless it is on the CPU).
    """
    planned = device_map if isinstance(device_map, Plan) else None
    if isinstance(device_map, Plan):
        slots = device_map.slots if slots is None else slots
        disk_cache_bytes = disk_cache_bytes or device_map.disk_cache_bytes
        no_split_module_classes = device_map.no_split_module_classes
        offload_buffers = device_map.offload_buffers
        main_device = device_map.execution_device if main_device is None else main_device
        device_map = device_map.device_map
    if no_split_module_classes is None:
        no_split_module_classes = sorted(getattr(model, "_no_split_modules", None) or ())
    paging = paging_of(model)
    if paging is not None and paging.pages:
        raise PagingError(
            "the model is paged already", hint="bring it back first: tuckaway.materialize(model)"
        )
    slots = 2 if slots is None else slots
    if slots < 1:
        raise ConfigError(f"slots must be at least 1, not {slots}")
    disk_cache_bytes = parse_bytes(disk_cache_bytes)
    wanted, reasons = choose_specs(model, config, dtype=dtype, strict=own_config)
    if keep_in_fp32:
        wanted = kept_in_fp32(wanted, keep_in_fp32)
    groups = tied_groups(model)
    notes: list[str] = []
    if checkpoint is not None:
        checkpoint, notes = renamed(
            checkpoint,
            model,
            [names for names in distinct(wanted, groups) if wanted[names[0]].persistent],
            key_mapping=key_mapping,
            conversions=conversions,
        )
        checkpoint = after_hooks(checkpoint, model)
    match = _match(model, checkpoint, wanted, groups, config, strict=strict, notes=notes)
    specs = {**wanted, **match.specs}
    placement = resolve_device_map(
        model,
        specs,
        device_map,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
        offload_buffers=offload_buffers,
        slots=slots,
        disk_cache_bytes=disk_cache_bytes,
    )
    check_devices(placement)
    if main_device is None and not isinstance(device_map, Mapping):
        main_device = executing_device(device_map, max_memory)
    executing = main_device_of(placement, main_device)
    if offload_folder is None and any(str(place) == "disk" for place in placement.values()):
        raise PlanError(
            "blocks are placed on disk and offload_folder is None",
            where=next(name for name, place in placement.items() if str(place) == "disk")
            or "the whole model",
            hint="name a folder to page from",
        )
    plan = plan_pages(
        model,
        specs,
        placement,
        execution_device=executing,
        no_split_module_classes=no_split_module_classes,
        offload_buffers=offload_buffers,
        ties=groups,
    )
    if planned is not None:
        planned.check(_weights_by_device(model, specs, placement, planned))
    check_kept(model, match)
    check_copies(match, piece_bytes=PIECE_BYTES)
    message = None
    try:
        with ExitStack() as undo:
            homes = None
            if plan.pages:
                homes = PageHomes.create(
                    plan,
                    offload_folder=offload_folder,
                    fingerprint=_fingerprint(checkpoint, _kept_on_disk(model, match, plan)),
                    disk_cache_bytes=disk_cache_bytes,
                )
                undo.callback(homes.abort)
            _carry_out(
                model, checkpoint, match, plan, homes,
                hooks=hooks, skip_keys=skip_keys, slots=slots, non_finite=non_finite, progress=progress,
            )  # fmt: skip
            undo.pop_all()
    except (MemoryError, RuntimeError, OSError) as error:
        if not _means_out_of_memory(error):
            raise
        message = str(error).partition("\n")[0]
    if message is not None:
        # out here, where that error is not its context: its traceback would keep everything loaded so far alive
        raise LoadOutOfMemoryError(
            f"memory ran out while loading: {message}",
            hint="place less on this device with max_memory or device_map",
        )
    report = quantization_report(specs, reasons, placement, ties=groups, notes=notes)
    # past the module's own __setattr__, which may refuse what it does not know
    object.__setattr__(model, "hf_device_map", dict(placement))
    object.__setattr__(model, "quantization_report", report)
    return model


def with_preloaded(
    model: nn.Module, whole: Sequence[str] | str | None, preloaded: Sequence[str] | str | None
) -> Sequence[str] | None:
    """Return the classes whose modules are paged whole, those included that accelerate would preload."""
    if not preloaded:
        return [whole] if isinstance(whole, str) else whole
    named = getattr(model, "_no_split_modules", None) if whole is None else whole
    together = [*([named] if isinstance(named, str) else named or ())]
    return [*together, *([preloaded] if isinstance(preloaded, str) else preloaded)]


def kept_in_fp32(specs: Mapping[str, TensorSpec], modules: Sequence[str]) -> dict[str, TensorSpec]:
    """Return the specs with the floats of some modules, named by a path or a trailing part of one, in fp32."""
    ends = tuple(f".{name}" for name in modules)

    def is_kept(name: str) -> bool:
        return any(f".{path}".endswith(ends) for path in ancestors(name.rpartition(".")[0]) if path)

    return {
        name: replace(spec, dtype=torch.float32)
        if spec.layout is None and spec.dtype.is_floating_point and is_kept(name)
        else spec
        for name, spec in specs.items()
    }


def _weights_by_device(
    model: nn.Module, specs: Mapping[str, TensorSpec], placement: Mapping[str, int | str], planned: Plan
) -> dict[int | str, int]:
    accounts = account(
        model,
        specs,
        placement,
        main=planned.execution_device,
        no_split_module_classes=planned.no_split_module_classes,
        offload_buffers=planned.offload_buffers,
    )
    return {device: memory.weights_bytes for device, memory in accounts.devices.items()}


def _carry_out(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    match: Match,
    plan: PagePlan,
    homes: PageHomes | None,
    *,
    non_finite: str,
    hooks: bool | None,
    slots: int,
    skip_keys: str | Sequence[str] | None,
    progress: bool | None,
) -> None:
    """Read and bind; whatever fails, nothing has happened."""
    with ExitStack() as undo:
        resident = _read(model, checkpoint, match, plan, homes, non_finite=non_finite, progress=progress)
        if homes is not None:
            homes.commit()
        if paging_of(model) is not None:
            materialize(model)  # all of it is resident: only hooks are removed
        undo.callback(restoration(model))
        bind_resident(model, match, resident)
        rebuild_buffers(model)  # those of a model that was built with include_buffers=True
        bind_kept(model, match, plan.specs, plan.resident.get)
        undo.callback(set_extra_states(model, match.extra))
        moves = plan.moved or plan.execution_device.type != "cpu" if hooks is None else hooks
        if plan.pages or moves:
            attach(model, plan, homes, slots=slots, skip_keys=skip_keys)
        # else there is nothing to bring anywhere: an ordinary model, which can be copied, pickled and moved
        undo.pop_all()


def _read(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    match: Match,
    plan: PagePlan,
    homes: PageHomes | None,
    *,
    non_finite: str,
    progress: bool | None,
) -> dict[tuple[str, ...], OnDevice]:
    """Bring every tensor to its place and return the resident ones; pages are filled where they lie."""
    resident: dict[tuple[str, ...], OnDevice] = {}
    work_device = plan.execution_device

    def home_of(feed: Feed) -> str | None:
        return homes.home_of(feed.names[0]) if homes is not None else None

    def destination_of(feed: Feed) -> Destination:
        name, home = feed.names[0], home_of(feed)
        if homes is not None and home == "cpu":
            return InPage(homes.views(name), work_device)
        if homes is not None and home == "disk":
            return OnDisk(partial(homes.write, name), work_device)
        place = resident[feed.names] = OnDevice(plan.resident[name])
        return place

    feeds = match.feeds
    if homes is not None and homes.reusable:
        feeds = tuple(feed for feed in feeds if home_of(feed) != "disk")
    if checkpoint is not None:
        ring = Ring.towards(work_device, *plan.resident.values())
        fill(
            feeds,
            destination_of,
            piece_bytes=PIECE_BYTES,
            progress=progress,
            ring=ring,
            non_finite=non_finite,
        )
    else:
        fill_from_tensors(feeds, dict(_named_state(model)), destination_of, non_finite=non_finite)
    if homes is not None:
        state = dict(_named_state(model))
        for name in match.kept:
            home = homes.home_of(name)
            if home is not None and not (home == "disk" and homes.reusable):
                homes.put(name, cast_kept(state[name], plan.specs[name]))
    return resident


def _kept_on_disk(model: nn.Module, match: Match, plan: PagePlan) -> list[torch.Tensor]:
    state = dict(_named_state(model))
    units = ((name, plan.page_of(name)) for name in match.kept)
    return [state[name] for name, unit in units if unit is not None and unit.home == "disk"]


def _match(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    wanted: Mapping[str, TensorSpec],
    groups: Sequence[Sequence[str]],
    config: QuantizationConfig | None,
    *,
    strict: bool,
    notes: Sequence[str] = (),
) -> Match:
    if checkpoint is None:
        return match_model(wanted, groups, dict(_named_state(model)))
    match = match_checkpoint(
        checkpoint,
        wanted,
        groups,
        config,
        real=[name for name, tensor in _named_state(model) if not tensor.is_meta],
        ignored=getattr(model, "_keys_to_ignore_on_load_unexpected", None) or (),
        extra=extra_states(checkpoint, model),
        strict=strict,
    )
    for note in notes:
        _log.info("%s", note)
    if match.unexpected:
        _log.warning(
            "left out %d tensors that the model has no place for: %s",
            len(match.unexpected),
            match.unexpected[:5],
        )
    return match


def _named_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _fingerprint(checkpoint: Checkpoint | None, kept: Sequence[torch.Tensor]) -> str:
    """Identify the weights: pages on disk are used again only for the very files (and values) they were made from."""
    if checkpoint is None:
        return uuid.uuid4().hex  # weights in memory have no identity that outlasts the process
    parts = []
    for path in checkpoint.files:
        with reading(path):
            status = path.stat()
        parts.append(f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}")
    parts.extend(
        f"{name}={entry.name}:{entry.offset}:{list(entry.shape)}"
        for name, entry in checkpoint.entries.items()
        if name != entry.name or type(entry) is not TensorEntry
    )
    for tensor in kept:
        parts.extend(f"{zlib.crc32(_bytes(part)):08x}" for part in components_of(tensor).values())
    return "\n".join(parts)


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _means_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, TuckawayError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # mmap
    # torch's CPU allocator raises a bare RuntimeError
    return not isinstance(error, RuntimeError) or (
        isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    )
