"""The quantized weight as torch sees it, and the final form of a model's tensors."""

from tuckaway.tensor import functions  # noqa: F401  (fills the table of calls that are caught whole)
from tuckaway.tensor.quantized import QuantizedTensor, layout_for, quantize
from tuckaway.tensor.spec import TensorSpec, components_of

__all__ = ["QuantizedTensor", "TensorSpec", "components_of", "layout_for", "quantize"]
