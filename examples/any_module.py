"""Any module at all: one that multiplies with its own parameters by hand, and knows nothing of quantization.

    python examples/any_module.py

No module is replaced: ``self.w`` becomes a quantized tensor under the same name, and ``x @ self.w`` goes on working.
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import tuckaway


class Gated(nn.Module):
    """``y = (x @ w) * sigmoid(x @ g.T)``, with two matrices of its own."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, out) / width**0.5)
        self.g = nn.Parameter(torch.randn(out, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w) * torch.sigmoid(x @ self.g.T)


def main() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(Gated(256, 512), Gated(512, 128), nn.LayerNorm(128))
    x = torch.randn(4, 256)

    # one tensor, quantized by itself
    weight = tuckaway.quantize(original[0].w.detach(), tuckaway.QuantizationConfig(format="nf4"))
    print(f"{weight.format}: {weight.codes.nbytes:,} bytes of codes for {weight.numel():,} weights")

    # the whole model, through a checkpoint
    with tempfile.TemporaryDirectory() as folder:
        tuckaway.save_model(original, folder)
        with tuckaway.init_empty_weights():
            model = nn.Sequential(Gated(256, 512), Gated(512, 128), nn.LayerNorm(128))
        config = tuckaway.QuantizationConfig(format="nf4", compute_dtype=torch.float32)
        model = tuckaway.load_and_quantize_model(model, config, weights_location=folder)

    for name, parameter in model.named_parameters():
        print(f"{name:10} {list(parameter.shape)!s:12} {getattr(parameter, 'format', parameter.dtype)}")
    with torch.no_grad():
        expected = original(x)
        got = model(x.to(next(model.parameters()).device)).cpu()
    print(f"relative error of the output: {(got - expected).norm() / expected.norm():.4f}")


if __name__ == "__main__":
    main()
