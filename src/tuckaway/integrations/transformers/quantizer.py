"""What transformers' ``from_pretrained`` and ``save_pretrained`` ask of a quantizer: :class:`TuckawayQuantizer`.

Only methods that all of transformers 5 has are overridden, and converters are made with keywords only: one file serves
5.0 to the newest. What is quantized is chosen as :func:`tuckaway.load_and_quantize_model` chooses it, so expert stacks,
``Conv1D`` and hand-written parameters are as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from tuckaway.checkpoint import read_header
from tuckaway.config import QuantizationConfig
from tuckaway.errors import PlanError
from tuckaway.integrations.transformers.config import (
    METHOD,
    BitsAndBytesOrTuckawayConfig,
    TuckawayConfig,
)
from tuckaway.integrations.transformers.tensors import flat_state_dict
from tuckaway.paging import materialize
from tuckaway.plan import choose_specs
from tuckaway.tensor import QuantizedTensor, TensorSpec

__all__ = ["TuckawayQuantizer", "register"]


def register() -> None:
    """Enter the config and the quantizer in transformers' tables; once or often."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TuckawayConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = TuckawayQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = BitsAndBytesOrTuckawayConfig


class TuckawayQuantizer(HfQuantizer):
    """Quantizes what transformers loads, reads what was saved, and saves it again.

    Args:
        quantization_config: a :class:`TuckawayConfig`.
        **kwargs: ``pre_quantized``, whether the checkpoint is quantized.
    """

    requires_calibration = False

    def __init__(self, quantization_config: TuckawayConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config: QuantizationConfig = quantization_config.quantization_config()
        self.specs: dict[str, TensorSpec] = {}

    @classmethod
    def adopt(cls, model: Any, config: QuantizationConfig) -> None:
        """Make a model that tuckaway's own loader quantized look as if transformers had."""
        quantizer = cls(TuckawayConfig(config), pre_quantized=True)
        model.is_quantized = True
        model.quantization_method = METHOD
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)

    # Before anything is read

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what transformers' own loader cannot do with quantized weights.

        Raises:
            PlanError: a part of the model is placed on disk.
        """
        places = device_map.items() if isinstance(device_map, Mapping) else [("the whole model", device_map)]
        for name, place in places:
            if str(place) == "disk":
                raise PlanError(
                    "transformers' own loader cannot keep quantized weights on disk",
                    where=name or "the whole model",
                    hint="call tuckaway.from_pretrained(...) instead of AutoModel....from_pretrained(...): it takes "
                    "the same arguments and pages from disk",
                )

    def update_device_map(self, device_map: Any) -> Any:
        """Place everything on the accelerator, where there is one, if nothing is said."""
        if device_map is None and torch.accelerator.is_available():
            return {"": torch.accelerator.current_device_index()}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Let the config's dtype, if it names one, come before the argument's or the checkpoint's."""
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # a name that matches nothing is an error where the user wrote it, and no more than a warning in a saved config
        dtype = kwargs.get("dtype") or next((p.dtype for p in model.parameters()), None)
        self.specs, _ = choose_specs(model, self.config, dtype=dtype, strict=not self.pre_quantized)
        if self.pre_quantized:
            self._expect_codes(model, kwargs.get("checkpoint_files"))
        return model

    def _expect_codes(self, model: Any, files: Sequence[str] | None) -> None:
        """Give parameters the dtype that their codes are stored in: before 5.4 transformers would cast them."""
        stored = {
            name: entry
            for file in files or ()
            if str(file).endswith(".safetensors")
            for name, entry in read_header(Path(file)).entries.items()
        }
        for name, spec in self.specs.items():
            scales = (f"{name}.absmax", f"{name}.SCB", f"{name.removesuffix('weight')}SCB")
            if spec.layout is None or name not in stored or not any(key in stored for key in scales):
                continue
            path, _, leaf = name.rpartition(".")
            empty = torch.empty(spec.shape, dtype=stored[name].dtype, device="meta")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is quantized when it is loaded."""
        spec = self.specs.get(param_name)
        return spec is not None and spec.layout is not None

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes of a weight in its final form, with its share of the scales."""
        spec = self.specs.get(param_name)
        if spec is None or spec.layout is None:
            return float(param.element_size())
        return spec.nbytes / max(param.numel(), 1)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave room on every accelerator for the largest weight before it is quantized."""
        if self.pre_quantized:
            return max_memory
        plain = [spec.dtype.itemsize * _numel(spec) for spec in self.specs.values() if spec.layout]
        spare = max(plain, default=0)
        return {
            device: size if device in ("cpu", "disk") else max(int(size) - spare, 0)
            for device, size in max_memory.items()
        }

    # While tensors are read

    def get_quantize_ops(self) -> Any:
        """Return what quantizes a parameter."""
        from tuckaway.integrations.transformers.operations import Quantize

        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """Return what gathers the tensors of quantized parameters in a saved checkpoint."""
        from tuckaway.integrations.transformers.operations import deserializers

        if not self.pre_quantized:
            return []
        return deserializers(self, [name for name, spec in self.specs.items() if spec.layout is not None])

    # Afterwards

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        forget_conversions(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Every model can be saved."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what ``save_pretrained`` writes."""
        return flat_state_dict(model), {}

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The model can be compiled."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        materialize(model)
        done: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, QuantizedTensor):
                    if id(parameter) not in done:
                        done[id(parameter)] = nn.Parameter(parameter.dequantize(dtype))
                    module._parameters[name] = done[id(parameter)]
        return model


def forget_conversions(model: Any) -> None:
    """Keep ``save_pretrained`` from undoing the conversions that quantized weights came through.

    transformers saves what it split and merged while loading the way it found it. Codes cannot be split as weights can,
    so quantized parameters keep the model's own names; renamings are undone as for any model.
    """
    from transformers.core_model_loading import WeightConverter

    quantized = [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    kept = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or ()
        if not (isinstance(conversion, WeightConverter) and _reaches(conversion, quantized))
    ]
    model._weight_conversions = kept


def _reaches(conversion: Any, names: list[str]) -> bool:
    patterns = [re.escape(target).replace(r"\*", ".*") for target in conversion.target_patterns]
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def _numel(spec: TensorSpec) -> int:
    return spec.layout.numel if spec.layout is not None else 0
