"""The kernels of tuckaway: quantize, decode, and multiply by quantized weights.

Importing this package registers the ops under ``torch.ops.tuckaway``. Each has a reference in plain torch, which serves
any device, and a Triton kernel for the devices Triton serves; Triton is imported at the first launch, not before.
"""

from __future__ import annotations

import tuckaway_kernels.dequantize_4bit.launch
import tuckaway_kernels.dequantize_int8.launch
import tuckaway_kernels.embedding.launch
import tuckaway_kernels.grouped_linear.launch
import tuckaway_kernels.linear_4bit.launch
import tuckaway_kernels.linear_int8.launch
import tuckaway_kernels.nested_scales.launch
import tuckaway_kernels.quantize_4bit.launch
import tuckaway_kernels.quantize_int8.launch  # noqa: F401
