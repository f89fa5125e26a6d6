"""Fill a model from a checkpoint and leave it without hooks: accelerate's ``load_checkpoint_in_model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import ConfigError
from tuckaway.load.job import DeviceMap, run

__all__ = ["load_checkpoint_in_model"]


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> nn.Module:
    """Load a checkpoint into a model, as it is, and return the model.

    accelerate's function of this name, with its parameters. What stays on a device gets no hooks: inputs are not
    moved there. Blocks that the map puts on ``"disk"``, or on ``"cpu"`` beside a GPU, are paged at once, where
    accelerate leaves them to a :func:`~tuckaway.dispatch_model` that must follow.

    Args:
        model: empty or with values, which are replaced.
        checkpoint: as ``weights_location`` of :func:`~tuckaway.load_and_quantize_model`.
        device_map: as there. ``None``: where the model's first real parameter lies, or the CPU.
        offload_folder: folder for what is placed on disk.
        dtype: dtype of all float tensors; ``None``: those of the model.
        offload_state_dict: accepted; loading never holds a state dict in memory.
        offload_buffers: page the buffers of offloaded blocks too.
        keep_in_fp32_modules: modules whose floats are in fp32 whatever ``dtype`` says, by path or the end of one.
        offload_8bit_bnb: must be False: offloaded blocks are quantized by ``load_and_quantize_model``.
        strict: refuse a checkpoint with tensors the model has no place for; missing ones are always refused.
        full_state_dict: must be True: every process reads the files itself.
        broadcast_from_rank0: must be False, for the same reason.

    Raises:
        ConfigError: a parameter that must have one value has another.
        TuckawayError: as :func:`~tuckaway.load_and_quantize_model`; the model is as it was.

    Example:
        >>> import tempfile, tuckaway
        >>> folder = tempfile.mkdtemp()
        >>> tuckaway.save_model(nn.Linear(4, 4), folder)
        >>> load_checkpoint_in_model(nn.Linear(4, 4), folder, dtype="fp16").weight.dtype
        torch.float16
    """
    for name, given, wanted in (
        ("offload_8bit_bnb", offload_8bit_bnb, False),
        ("full_state_dict", full_state_dict, True),
        ("broadcast_from_rank0", broadcast_from_rank0, False),
    ):
        if given is not wanted:
            raise ConfigError(f"{name} cannot be {given!r}", hint=f"leave it {wanted}: see the documentation")
    if device_map is None:
        real = next((p for p in model.parameters() if not p.is_meta), None)
        device_map = {"": torch.device("cpu") if real is None else real.device}
    return run(
        model,
        Checkpoint.open(checkpoint),
        None,
        dtype=dtype,
        device_map=device_map,
        no_split_module_classes=None,
        max_memory=None,
        offload_folder=offload_folder,
        main_device=None,
        offload_buffers=offload_buffers,
        skip_keys=None,
        strict=strict,
        progress=None,
        keep_in_fp32=keep_in_fp32_modules or (),
        hooks=False,
    )
