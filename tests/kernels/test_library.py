"""When a call may go past torch's dispatcher: only where nothing but its result could be missed."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tuckaway_kernels.library import eager


def test_plain_tensors_are_eager() -> None:
    x, bias = torch.ones(2, 3), torch.nn.Parameter(torch.ones(4))
    assert eager(x, None)
    assert not eager(x, bias)  # its gradient is wanted
    with torch.no_grad():
        assert eager(x, bias)
    with torch.inference_mode():
        assert eager(torch.ones(2), bias)


def test_a_gradient_is_wanted() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not eager(x, None)
    with torch.no_grad():
        assert eager(x, None)


def test_somebody_watches() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(eager(x, None))
        return x * 2

    torch.vmap(look)(torch.ones(3, 2))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    make_fx(look)(torch.ones(2))
    with FakeTensorMode():
        look(torch.ones(2))
    assert seen == [False] * 4


def test_no_plain_tensors() -> None:
    class Other(torch.Tensor):
        pass

    assert not eager(torch.ones(2).as_subclass(Other), None)
    assert not eager(torch.ones(2), torch.ones(2).as_subclass(Other))
    assert not eager(torch.ones(2, dtype=torch.complex64).conj().imag, None)
