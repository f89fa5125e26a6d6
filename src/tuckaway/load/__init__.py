"""Load a checkpoint into a model, quantized on the way and placed over GPU, CPU and disk.

:func:`load_and_quantize_model` and accelerate's :func:`load_checkpoint_and_dispatch` are one job: match the
checkpoint with the model, decide where everything goes, and only then read. Until the last byte is in its place the
model is not touched, so a load that fails leaves it as it was.
"""

from tuckaway.load.dispatch import cpu_offload, disk_offload, dispatch_model
from tuckaway.load.in_model import load_checkpoint_in_model
from tuckaway.load.load import load_and_quantize_model, load_checkpoint_and_dispatch
from tuckaway.load.merging import Merge, Split
from tuckaway.load.renaming import register_rules

__all__ = [
    "Merge",
    "Split",
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "load_and_quantize_model",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "register_rules",
]
