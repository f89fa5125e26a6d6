"""tuckaway: load and run PyTorch models that are bigger than the memory they must run in.

A model is built empty, its checkpoint is streamed through :func:`load_and_quantize_model`, every weight is quantized
on the way, modules are placed over GPU, CPU and disk, and what does not fit is paged onto the GPU for its turn.

>>> import torch, tuckaway
>>> with tuckaway.init_empty_weights():
...     model = torch.nn.Linear(1_000_000, 1_000_000)  # 4 TB in fp32; nothing is allocated
"""

from typing import TYPE_CHECKING, Any

from tuckaway.config import QuantizationConfig
from tuckaway.convert import Conversion, quantize_checkpoint
from tuckaway.empty import init_empty_weights, init_on_device
from tuckaway.errors import *  # noqa: F403  (the tree's names are its __all__)
from tuckaway.errors import __all__ as _errors
from tuckaway.integrations.registration import register_when_imported
from tuckaway.integrations.transformers.pretrained import from_pretrained
from tuckaway.load import (
    Merge,
    Split,
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_and_quantize_model,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    register_rules,
)
from tuckaway.paging import materialize
from tuckaway.plan import Plan, get_balanced_memory, infer_auto_device_map, memory_footprint, plan
from tuckaway.save import save_model
from tuckaway.tensor import QuantizedTensor, quantize

if TYPE_CHECKING:
    from tuckaway.integrations.transformers.config import TuckawayConfig as TuckawayConfig

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "Merge",
    "Plan",
    "QuantizationConfig",
    "QuantizedTensor",
    "Split",
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "from_pretrained",
    "get_balanced_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_and_quantize_model",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "materialize",
    "memory_footprint",
    "plan",
    "quantize",
    "quantize_checkpoint",
    "save_model",
    *(name for name in _errors if name != "nearest_names"),
]

register_rules(
    "transformers.modeling_utils.PreTrainedModel",
    "tuckaway.integrations.transformers.conversions:in_model_names",
)
register_when_imported()  # transformers, whenever it comes, knows tuckaway's configs


def __getattr__(name: str) -> Any:
    # not in __all__: `from tuckaway import *` would import transformers
    if name == "TuckawayConfig":
        from tuckaway.integrations.transformers.config import TuckawayConfig

        register_when_imported()
        return TuckawayConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
