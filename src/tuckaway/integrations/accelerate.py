"""``Accelerator.save_model`` of quantized models: :func:`adapt`.

accelerate looks for tensors that share memory by the address of their storage, of which a quantized weight has none,
and would hand the weights to safetensors, which takes plain tensors only. Models without any go its own way.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from tuckaway.save import save_model
from tuckaway.tensor import QuantizedTensor

__all__ = ["adapt"]


def adapt() -> None:
    """Teach accelerate to save quantized weights; once or often."""
    from accelerate.accelerator import Accelerator

    from tuckaway.integrations.wrapping import wrap

    wrap(Accelerator, "save_model", _saved_by_tuckaway)


def _saved_by_tuckaway(original: Any) -> Any:
    @functools.wraps(original)
    def save(
        self: Any,
        model: nn.Module,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        if not any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters()):
            original(self, model, save_directory, max_shard_size, safe_serialization)
            return
        if self.is_main_process:
            save_model(self.unwrap_model(model), save_directory, max_shard_size, safe_serialization)
        self.wait_for_everyone()

    return save
