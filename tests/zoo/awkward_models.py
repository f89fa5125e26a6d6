"""Modules that somebody wrote by hand, each awkward in one way for whoever wants to load, quantize or page it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

W = 64


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class Slotted(nn.Linear):
    """Has slots, one of them for a number it needs."""

    __slots__ = ("gain",)

    def __init__(self) -> None:
        super().__init__(W, W)
        self.gain = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


class Setting(nn.Module):
    """Overrides ``__setattr__`` and refuses new attributes once it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(W, W)
        self.w = weight(W, W)
        self.built = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("built") and not name.startswith(("_", "training")):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) @ self.w


class Getting(nn.Module):
    """Overrides ``__getattr__``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(W, W)

    def __getattr__(self, name: str) -> Any:
        if name == "twin":
            return super().__getattr__("inner")
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twin(x) + self.inner(x)


class Closure(nn.Module):
    """minGPT's block: a lambda over submodules, which live in a dict that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(W, 4 * W), "act": nn.GELU(), "c_proj": nn.Linear(4 * W, W)}
        )
        m = self.mlp
        self.mlpf = lambda x: m.c_proj(m.act(m.c_fc(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlpf(x)


class NeverCalled(nn.Module):
    """Takes the weights out of modules it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)
        self.table = nn.Embedding(32, W)
        self.norm = nn.LayerNorm(W)
        self.layers = nn.ModuleList([nn.Linear(W, W) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.a.weight, self.a.bias) @ self.table.weight.t()
        x = F.layer_norm(x @ self.table.weight, (W,), self.norm.weight, self.norm.bias)
        for layer in self.layers:
            x = torch.addmm(layer.bias, x.reshape(-1, W), layer.weight.T).view_as(x)
        return x


class Functional(nn.Module):
    """Calls a submodule with some of its parameters changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = {"0.bias": torch.ones(W), "2.bias": torch.zeros(W)}
        return torch.func.functional_call(self.inner, change, (x,))


class AllParametersAtOnce(nn.Module):
    """Passes all of a submodule's own parameters to ``functional_call``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), (x,))


class Einsum(nn.Module):
    """Projects with einsum, heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q = weight(4, W, W)
        self.o = weight(4, W, W)
        self.w = weight(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.einsum("bld,hde->bhle", x, self.q)
        x = torch.einsum("bhle,hed->bld", heads, self.o)
        return torch.einsum("...i,oi->...o", x, self.w)


class FusedQKV(nn.Module):
    """Slices a fused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(W, 3 * W)
        self.out = nn.Parameter(torch.randn(W, W) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = F.linear(x, self.qkv.weight[:W], self.qkv.bias[:W])
        k, v = (F.linear(x, part) for part in self.qkv.weight[W:].chunk(2))
        scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(W), -1)
        return scores @ v @ self.out[:, : W // 2] @ self.out[: W // 2]


class Operators(nn.Module):
    """All ways of multiplying with a hand-written weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, W)
        return (
            x @ self.w
            + torch.matmul(x, self.w.t())
            + (self.w @ rows.t()).t().reshape_as(x)
            + torch.mm(rows, self.w).reshape_as(x)
            + torch.tensordot(x, self.w, dims=1)
            + (x.unsqueeze(-2) * self.w).sum(-1)
            + torch.inner(x, self.w)
            + torch.bmm(x, self.w.expand(len(x), W, W))
            + torch.stack([self.w.mv(row) for row in rows]).reshape_as(x)
            + x * self.w.mean(0)
        )


class Tied(nn.Module):
    """Ties by assignment, with a transposed use of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)
        self.b.weight = self.a.weight
        self.c = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) @ self.c


class SharedModule(nn.Module):
    """One module under three names, one of them in a list (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(W, W)
        self.two = self.one
        self.layers = nn.ModuleList([self.one, nn.Linear(W, W), self.one])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) + self.two(x)
        return x


class Lists(nn.Module):
    """Parameters in lists and dicts, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([weight(W, W) for _ in range(3)])
        self.named = nn.ParameterDict(
            {"up": weight(W, 2 * W), "down": weight(2 * W, W), "bias": torch.zeros(W)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.ws:
            x = torch.tanh(x @ w)
        return x @ self.named["up"] @ self.named.down + self.named["bias"]


class Recurrent(nn.Module):
    """An LSTM, a GRU, cells: left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(W, W)
        self.lstm = nn.LSTM(W, W, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(2 * W, W, batch_first=True)
        self.cell = nn.LSTMCell(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.gru(self.lstm(self.inp(x))[0])
        return self.cell(x[:, -1])[0]


class Bilinear(nn.Module):
    """Three-dimensional, but no stack."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(W, W, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bilinear(x, x.flip(1))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, which reads its projection's weight and never calls it, and a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(W, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(W, 4, kdim=2 * W, vdim=2 * W, add_bias_kv=True, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(W, 4, 2 * W, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerDecoderLayer(W, 4, 2 * W, batch_first=True, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mha(x, x, x, need_weights=False)[0]
        memory = torch.cat([x, x], -1)
        x = x + self.cross(x, memory, memory)[0]
        return self.decoder(self.layer(x), x)


class Convolutions(nn.Module):
    """1-D, 2-D and 3-D, grouped, dilated, depthwise, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(W, W, 8, padding=4)
        self.grouped = nn.Conv1d(W, W, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv1d(W, W, 3, padding=1, groups=W)
        self.up = nn.ConvTranspose1d(W, W, 2, stride=2)
        self.two = nn.Conv2d(1, 32, 3, padding=1)
        self.two_b = nn.Conv2d(32, 32, 4, padding_mode="reflect", padding=2)
        self.three = nn.Conv3d(1, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.depthwise(self.grouped(self.one(x.transpose(1, 2)))))
        y = self.two_b(self.two(x.unsqueeze(1)))
        return x.sum() + y.mean(1) + self.three(x[:, None, None]).mean()


class Experts(nn.Module):
    """Stacks ``[experts, out, in]``, one expert at a time, all at once by index, and by ``grouped_mm``."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.gate = nn.Linear(W, 8, bias=False)
        self.up = weight(8, 2 * W, W)
        self.down = weight(8, W, 2 * W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, W)
        chosen = self.gate(rows).argmax(-1)
        if self.way == "eager":
            out = torch.zeros_like(rows)
            for e in chosen.unique():
                at = chosen == e
                out[at] = F.linear(torch.relu(F.linear(rows[at], self.up[e])), self.down[e])
        elif self.way == "batched_mm":
            out = torch.relu(torch.bmm(self.up[chosen], rows.unsqueeze(-1)))
            out = torch.bmm(self.down[chosen], out).squeeze(-1)
        else:
            order = chosen.argsort()
            ends = torch.bincount(chosen, minlength=8).cumsum(0).to(torch.int32)
            up = F.grouped_mm(rows[order], self.up.transpose(-2, -1), offs=ends)
            down = F.grouped_mm(torch.relu(up), self.down.transpose(-2, -1), offs=ends)
            out = torch.empty_like(rows).index_copy_(0, order, down)
        return out.view_as(x)


class Buffers(nn.Module):
    """Complex and integer buffers, persistent or not, one that the forward writes to, one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(W, W)
        angles = torch.outer(torch.arange(32.0), 1.0 / 10000 ** (torch.arange(0, W, 2) / W))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.register_buffer("stored", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("mask", torch.ones(32, 32, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        z = torch.view_as_complex(self.w(x).view(*x.shape[:-1], -1, 2)) * self.rotation[: x.shape[1]]
        x = torch.view_as_real(z).flatten(-2) + self.stored.real.sum()
        return x.masked_fill(~self.mask[: x.shape[1], :1], 0.5)


class OddParameters(nn.Module):
    """0-d, empty, integer and one-element parameters, None for one, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, W))
        self.order = nn.Parameter(torch.arange(W).flip(0), requires_grad=False)
        self.one = nn.Parameter(torch.ones(1, 1))
        self.register_parameter("none", None)
        self.unused = weight(W, W)
        self.w = weight(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[0], self.empty]) @ self.w
        return x[:, self.order] * self.scalar + self.one


class Codes(nn.Module):
    """Somebody else's quantization: int8 codes with float scales as parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-127, 127, (W, W), dtype=torch.int8), requires_grad=False)
        self.register_buffer("packed", torch.randint(0, 255, (W, W // 2), dtype=torch.uint8))
        self.scale = nn.Parameter(torch.rand(W, 1) / 127)
        self.w = nn.Linear(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(x) @ (self.codes * self.scale) + self.packed.float().mean()


class Symmetric(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def parametrized() -> nn.Module:
    """Weights that are computed: normalized, symmetric, of low rank."""
    first = parametrizations.weight_norm(nn.Linear(W, W))
    second = nn.Linear(W, W)
    parametrize.register_parametrization(second, "weight", Symmetric())
    return nn.Sequential(
        first, nn.ReLU(), second, nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 32, 8))
    )


class LowRank(nn.Linear):
    """Adds an adapter to its weight in the forward; thin ones are left alone."""

    def __init__(self) -> None:
        super().__init__(W, W)
        self.a, self.b = weight(W, 4), weight(4, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.a @ self.b, self.bias)


class Property(nn.Module):
    """Shows its weight through a property and changes its layout on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = weight(2 * W, W)

    @property
    def matrix(self) -> torch.Tensor:
        return self.raw.view(2, W, W)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            x @ self.matrix
            + x @ self.raw.reshape(W, 2 * W)[:, :W]
            + x @ self.raw.flatten()[: W * W].view(W, W)
        )


class Weightless(nn.Module):
    """Holds tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(W, W)
        self.positions = torch.arange(512.0).sin()
        self.table = {"bias": torch.linspace(0, 1, W)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(x) + self.positions[: x.shape[1], None] + self.table["bias"]


class LookedUp(nn.Module):
    """Indexes matrices by numbers, lists and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(W, W)
        self.stack = weight(4, W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = self.w[torch.tensor([[1, 5], [9, 63]])].sum(1)
        x = x + self.w[3] + self.w[-1] + picked[:, None] + self.w[[4, 7]].sum(0) + self.w[..., 0]
        x = (
            x
            + torch.index_select(self.w, 0, torch.tensor([2]))[0]
            + self.w.gather(0, torch.zeros(1, W).long())
        )
        return x @ self.stack[1] + x @ self.stack[torch.tensor(2)] + x @ self.stack[1:3].mean(0)


class Checkpointed(nn.Module):
    """Recomputes in the backward, and runs under autocast within."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return self.b(x.float())


class Hooked(nn.Module):
    """Registers hooks of its own that change inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(W, W)
        self.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.inner.register_forward_hook(lambda module, args, output: output + module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class ExtraState(nn.Module):
    """Keeps more than tensors in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(W, W)
        self.scale = torch.rand(()).item()

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.scale = float(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(x) * self.scale


class Looped(nn.Module):
    """One block that runs many times, and blocks that run in another order than they were made, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(W, W) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in (3, 1, 1, 0, 3):
            x = torch.tanh(self.blocks[index](x))
        return x


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(W, W)
        self.children_too = nn.ModuleList([nn.Linear(W, W)])

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        x = self.children_too[0](torch.tanh(self.w(x)))
        return self(x, depth - 1) if depth else x


def sequence() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 16, W, generator=torch.Generator().manual_seed(5)),)


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Slotted, Setting, Getting, Closure, NeverCalled, Functional, AllParametersAtOnce, Einsum, FusedQKV, Operators,
        Tied, SharedModule, Lists, Recurrent, Bilinear, Attention, Convolutions, Buffers, OddParameters, Codes, LowRank,
        Property, Weightless, LookedUp, Checkpointed, Hooked, Looped, Recursive, ExtraState,
    )
} | {
    "Parametrized": parametrized,
    "ExpertsEager": lambda: Experts("eager"),
    "ExpertsBatched": lambda: Experts("batched_mm"),
    "ExpertsGrouped": lambda: Experts("grouped_mm"),
}  # fmt: skip
