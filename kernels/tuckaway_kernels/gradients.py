"""What the gradients of the products share."""

from __future__ import annotations

import torch


def bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of ``grad`` [..., N] over its leading dimensions, accumulated in fp32, as ``[N]`` of ``dtype``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(dtype)
