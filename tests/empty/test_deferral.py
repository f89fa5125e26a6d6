from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from tuckaway.empty import init_empty_weights, rebuild_buffers

N = 400  # N * N elements are deferred


def big(value: float = 1.0) -> torch.Tensor:
    return torch.full((N, N), value)


def in_place_through_views() -> torch.Tensor:
    x = torch.zeros(N, N)
    x[:, ::2] = torch.arange(N).float().unsqueeze(1)
    x[3].fill_(7)
    x.view(-1)[5:9] += 2
    return x


def many_steps() -> torch.Tensor:
    x = torch.zeros(N, N)
    for i in range(2000):
        x[i % N] += i
    return x


def long_chain() -> torch.Tensor:
    x = big()
    for i in range(1500):
        x = x + i
    return x


def argument_changed_afterwards() -> torch.Tensor:
    row = torch.ones(N)
    x = big() * row
    row.zero_()
    return x


def source_changed_afterwards() -> torch.Tensor:
    x = big()
    y = x * 2
    x.zero_()
    return y + x


def asked_in_the_middle() -> torch.Tensor:
    x = big()
    x.mul_(3)
    scale = x.sum().item()
    x.div_(scale)
    return x + x[0, 0].item()


def data_dependent_shapes() -> torch.Tensor:
    mask = torch.tril(big()).bool()
    chosen = mask.nonzero()
    if mask[0, 0]:
        chosen = chosen + 1
    return chosen


def into_a_real_tensor() -> torch.Tensor:
    small = torch.zeros(N)
    small.copy_(big()[0])
    return small


def out_argument() -> torch.Tensor:
    x = torch.empty(N, N)
    torch.add(big(), big(2), out=x)
    return x


def several_results() -> torch.Tensor:
    values, index = torch.sort(torch.arange(N * N).view(N, N).flip(1), dim=1)
    left, right = values.chunk(2, 1)
    return torch.cat([right, left, index[:, :3]], 1)


def dtypes_and_shapes() -> torch.Tensor:
    x = torch.arange(N * N).view(N, N).t().to(torch.float64).contiguous()
    return x.unsqueeze_(0).expand(2, N, N).half().float()


def numpy_in_the_middle() -> torch.Tensor:
    return torch.from_numpy(big(2).numpy() * 3) + big()


def complex_numbers() -> torch.Tensor:
    t = torch.arange(N * N).float().view(N, N)
    return torch.view_as_real(torch.polar(torch.ones_like(t), t))


def of_a_parameters_shape() -> torch.Tensor:
    p = nn.Parameter(torch.randn(N, N))
    layer = nn.Module()
    layer.p = p
    return torch.ones_like(layer.p).tril_() + layer.p.new_zeros(N)


def to_a_parameters_device() -> torch.Tensor:
    layer = nn.Linear(N, N)
    return big().to(dtype=torch.float16, device=layer.weight.device)


def numbers_and_lists_as_indices_and_values() -> torch.Tensor:
    x = big()
    x[1, :] = 0
    x[2, 3] = 2.5
    x[[4, 5]] = 3
    x[[6, 7], [8, 9]] = torch.tensor([1.5, 2.5])
    x[torch.arange(10, 20)] = True
    x[..., 50] = 7
    x[x > 6] = -1
    x[3] = x.new_tensor([0.5] * N)
    return torch.where(x > 2, x, 0.25) + x[[1, 1] * (N // 2)]


def resized() -> torch.Tensor:
    x = torch.zeros(N * N)
    x.resize_(N, N)
    return x + 1


def as_lists() -> torch.Tensor:
    return torch.tensor(big().tolist()[0])


RECIPES = [
    in_place_through_views,
    many_steps,
    long_chain,
    argument_changed_afterwards,
    source_changed_afterwards,
    asked_in_the_middle,
    data_dependent_shapes,
    into_a_real_tensor,
    out_argument,
    several_results,
    dtypes_and_shapes,
    numpy_in_the_middle,
    complex_numbers,
    of_a_parameters_shape,
    to_a_parameters_device,
    numbers_and_lists_as_indices_and_values,
    resized,
    as_lists,
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("include_buffers", [False, True])
def test_values_are_those_of_doing_it_at_once(recipe, include_buffers):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", recipe(), persistent=False)

    expected = recipe()
    with init_empty_weights(include_buffers=include_buffers):
        model = Holder()
    assert rebuild_buffers(model) == []
    assert model.b.shape == expected.shape
    assert model.b.dtype == expected.dtype
    assert model.b.stride() == expected.stride()
    assert torch.equal(model.b, expected)


def test_random_values_are_drawn_once():
    with init_empty_weights():
        x = torch.randn(N, N)
        first = x[0, 0].item()
        y = x * 1
        assert x[0, 0].item() == first
    assert x[0, 0].item() == y[0, 0].item() == first


def test_views_and_their_base_stay_one_memory():
    with init_empty_weights():
        base = torch.zeros(N, N)
        view = base[1]
        whole = base.view(-1)
    view.fill_(1)
    assert base.sum() == N
    assert whole.sum() == N


def test_tensors_in_lists_and_closures_become_real():
    with init_empty_weights():
        kept = {"a": [big(), big(2)], "b": (big(3),)}
    assert not any(t.is_meta for t in (*kept["a"], *kept["b"]))
    assert kept["b"][0].sum() == 3 * N * N


def test_gradients_are_asked_of_the_real_tensor():
    with init_empty_weights():
        x = torch.ones(N, N, requires_grad=True)
    x.sum().backward()
    assert x.grad.sum() == N * N


def test_buffers_copy_and_repeat():
    with init_empty_weights():
        inner = nn.Module()
        inner.register_buffer("b", in_place_through_views())
        twin = copy.deepcopy(inner)
    assert torch.equal(twin.b, in_place_through_views())
    assert torch.equal(inner.b, twin.b)
    assert inner.b.data_ptr() != twin.b.data_ptr()


def test_parameters_leave_no_records():
    from tuckaway.empty import records

    gc.collect()
    records.remember(iter(()))
    before = len(records._remembered)
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(N, N) for _ in range(20)])
    assert len(records._remembered) == before
    with init_empty_weights(include_buffers=True):
        other = nn.BatchNorm1d(5)
    assert len(records._remembered) > before
    del other
    gc.collect()
    records.remember(iter(()))
    assert len(records._remembered) == before
    assert model[0].weight.is_meta


def test_a_buffer_made_of_a_parameter_is_unknown():
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(N, N))
            self.register_buffer("ema", self.w.detach().clone(), persistent=False)
            self.register_buffer("scaled", self.w * torch.ones(N))

    with init_empty_weights():
        model = Teacher()
    assert model.ema.is_meta
    assert model.scaled.is_meta
    assert rebuild_buffers(model) == ["ema"]


def test_errors_are_those_of_real_tensors():
    with init_empty_weights():
        with pytest.raises(RuntimeError, match="size"):
            big() + torch.ones(3)
        with pytest.raises(IndexError):
            big()[N]
        assert big()[0, 0] == 1
