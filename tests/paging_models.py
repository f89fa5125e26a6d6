"""Small models, and what makes them paged, for the tests of paging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuckaway.config import QuantizationConfig
from tuckaway.paging import PageHomes, attach, plan_pages
from tuckaway.tensor import TensorSpec, quantize

VOCABULARY, WIDTH = 40, 32


class Block(nn.Module):
    """A layer that calls one child and reads the weight of the other."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        return x + self.scale * nn.functional.linear(hidden, self.down.weight, self.down.bias)


class Net(nn.Module):
    """Embedding, parameter of its own, blocks, tied head: what a language model is made of."""

    def __init__(self, blocks: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.order: list[int] | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        for index in range(len(self.blocks)) if self.order is None else self.order:
            x = self.blocks[index](x)
        return self.head(self.norm(x))


def tokens(seed: int = 0, batch: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def make(model_class: Any = Net, seed: int = 0, **options: Any) -> Any:
    """The same model for the same arguments, without gradients."""
    torch.manual_seed(seed)
    return model_class(**options).requires_grad_(False).eval()


def quantize_linears(model: nn.Module, config: QuantizationConfig | str) -> nn.Module:
    """Quantize the weights of all linear layers in blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            module.weight = nn.Parameter(quantize(module.weight.detach(), config), requires_grad=False)
    return model


def specs_of(model: nn.Module) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec.of(p) for name, p in model.named_parameters(remove_duplicate=False)}
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        specs[name] = TensorSpec.of(buffer, is_buffer=True, persistent=name in persistent)
    return specs


def page(
    model: Any,
    device_map: dict[str, Any],
    folder: Path | None = None,
    *,
    execution_device: Any = "cpu",
    fingerprint: str = "",
    offload_buffers: bool = False,
    no_split_module_classes: Any = (),
    leave: Callable[[str], bool] = lambda name: False,
    disk_cache_bytes: int = 0,
    **options: Any,
) -> Any:
    """Page a model that has its values, CPU pages included when execution is on the CPU.

    What ``leave`` says yes to is left out, and so stays where it is.
    """
    specs = {name: spec for name, spec in specs_of(model).items() if not leave(name)}
    plan = plan_pages(
        model,
        specs,
        device_map,
        execution_device=execution_device,
        no_split_module_classes=no_split_module_classes,
        offload_buffers=offload_buffers,
        page_cpu=True,
    )
    homes = PageHomes.create(
        plan, offload_folder=folder, fingerprint=fingerprint, disk_cache_bytes=disk_cache_bytes
    )
    for name in specs:
        module_path, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_path)
        tensor = getattr(module, attribute)
        if plan.page_of(name) is None:
            moved = tensor.to(plan.resident[name])
            if moved is not tensor:
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                setattr(module, attribute, moved)
        elif plan.canonical[name] == name and not (homes.reusable and homes.home_of(name) == "disk"):
            homes.put(name, tensor)
    attach(model, plan, homes, **options)
    return model


ON_CPU = {
    "disk": {"": "disk"},
    "cpu": {"": "cpu"},
    "mixed": {"": "cpu", "blocks": "disk", "blocks.1": "cpu", "blocks.3.up": "cpu"},
}
"""Device maps of :class:`Net` where the CPU executes."""

WIDE = 512
"""Width of the model that is paged to any device: pages of 4 MB in fp32, which take longer to copy than to use."""


def maps(main: Any) -> dict[str, dict[str, Any]]:
    """Return device maps with everything in RAM, on disk, and some of it everywhere, ``main`` included."""
    mixed = {"blocks": "cpu", "blocks.1": "disk", "blocks.4": main, "blocks.5": "disk", "head": "cpu"}
    return {"cpu": {"": "cpu"}, "disk": {"": "disk"}, "mixed": {"": main, **mixed}}


def wide_net(format: str | None = None, device: str = "cpu") -> Any:
    """Return :class:`Net` with eight blocks in bf16, or quantized on ``device``; unquantized it is on the CPU."""
    model = make(Net, blocks=8, width=WIDE).to(torch.bfloat16)
    if format is None:
        return model
    return quantize_linears(model.to(device), QuantizationConfig(format=format, compute_dtype=None))
