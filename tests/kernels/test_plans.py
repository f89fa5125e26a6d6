"""Plans with kernels that only note how they are called, or that add up on the CPU: what is launched, on what."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tuckaway_kernels.launching as launching
import tuckaway_kernels.plans as plans
from tuckaway_kernels.bound import BoundProduct
from tuckaway_kernels.launching import Launch
from tuckaway_kernels.plans import OUT, SETTLED, Plan, Room, X

GIVEN = SETTLED


class Adding:
    """A kernel of three tensors of 4 fp32: the last becomes the sum of the others; by tensors, or by addresses."""

    function = 1
    packed_metadata = (4, 1)

    def __init__(self) -> None:
        self.compiled = 0
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Adding]:
        def launch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *_: Any, **__: Any) -> Adding:
            self.compiled += 1
            out.view(4).copy_(a.view(4) + b.view(4))
            return self

        return launch

    def run(self, *arguments: Any) -> None:
        self.direct.append(arguments)
        a, b, out = ((ctypes.c_float * 4).from_address(p) for p in arguments[9:12])
        for i in range(4):
            out[i] = a[i] + b[i]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that the CPU's tensors (device -1) lie on a GPU; the list's entry says which is current."""
    current = [-1]
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return current


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch, device: list[int]) -> tuple[list[Any], list[Any]]:
    """Pretend that compiled kernels can be called; give the profilers' hooks."""
    found: tuple[list[Any], list[Any]] = [], []
    for module in (launching, plans):
        monkeypatch.setattr(module, "launch_hooks", lambda: found)
    return found


def plan_of(kernel: Adding, **options: Any) -> Plan:
    """``x + given`` to room 1, that plus itself to room 0, and their sum to the output: three times ``x + given``."""
    add = Launch(kernel, (1, 1, 1), (5,), {"TILE": 4}, warps=1, **options)
    rooms = Room((4,), torch.float32), Room((4,), torch.float32)
    return Plan(((add, (X, GIVEN, ~1)), (add, (~1, ~1, ~0)), (add, (~0, ~1, OUT))), rooms)


def test_a_plan_runs_on_what_it_is_given() -> None:
    kernel, out = Adding(), torch.full((4,), torch.nan)
    plan_of(kernel).run(torch.arange(4.0), out, torch.ones(4))
    assert torch.equal(out, 3 * torch.arange(1.0, 5.0))


def test_a_bound_plan_calls_what_was_compiled(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, given = Adding(), torch.ones(4)
    bound = plan_of(kernel).bind((1, 4), torch.float32, given)
    kept = []
    for i in range(3):
        x = torch.arange(4.0).view(1, 4) + i
        result = bound(x)
        assert torch.equal(result, 3 * (x + 1))
        kept.append((result, 3 * (x + 1)))
    assert all(torch.equal(result, expected) for result, expected in kept)  # each has memory of its own
    # the first way through compiles once, its other two launches are calls already
    assert (kernel.compiled, len(kernel.direct)) == (1, 2 + 3 + 3)
    first, second, third = kernel.direct[-3:]
    assert all(call[:9] == (1, 1, 1, 77, 1, (4, 1), None, None, None) for call in (first, second, third))
    assert first[9:11] == (x.data_ptr(), given.data_ptr())
    assert first[12:] == (5, 4)
    assert second[9] == second[10] == first[11]
    assert abs(second[11] - first[11]) == 256  # the next room in the same allocation
    assert third[9:12] == (second[11], first[11], result.data_ptr())


def test_a_bound_plan_takes_the_whole_way_where_it_must(
    hooks: tuple[list[Any], list[Any]], device: list[int]
) -> None:
    kernel, given, room = Adding(), torch.ones(4), torch.arange(9.0)
    bound = plan_of(kernel).bind((4,), torch.float32, given)
    expected = 3 * (room[:4] + 1)
    assert torch.equal(bound(room[:4]), expected)
    assert torch.equal(
        bound(room[1:5]), 3 * (room[1:5] + 1)
    )  # compiled for addresses that are multiples of 16
    before = kernel.compiled
    hooks[1].append(print)
    assert torch.equal(bound(room[:4]), expected)
    assert kernel.compiled == before + 3
    hooks[1].clear()
    device[0] = 1
    assert torch.equal(bound(room[:4]), expected)
    device[0] = -1
    assert torch.equal(bound(room[:4]), expected)
    assert kernel.compiled == before + 3


def test_a_plan_whose_first_input_was_unaligned_is_bound_by_the_next(
    hooks: tuple[list[Any], list[Any]],
) -> None:
    kernel, room = Adding(), torch.arange(9.0)
    bound = plan_of(kernel).bind((4,), torch.float32, torch.ones(4))
    for x in (room[1:5], room[:4], room[:4], room[1:5]):
        assert torch.equal(bound(x), 3 * (x + 1))
    assert len(kernel.direct) > 0


def test_without_a_gpu_nothing_is_called_by_address(device: list[int]) -> None:
    kernel, x = Adding(), torch.arange(4.0)
    bound = plan_of(kernel).bind((4,), torch.float32, torch.ones(4))
    for _ in range(2):
        assert torch.equal(bound(x), 3 * (x + 1))
    assert kernel.direct == []


def test_rooms_of_zeros_are_zeros_and_not_bound() -> None:
    kernel, out = Adding(), torch.full((4,), torch.nan)
    add = Launch(kernel, (1, 1, 1), (5,), {"TILE": 4}, warps=1)
    plan = Plan(((add, (X, ~0, OUT)),), (Room((4,), torch.float32, zeros=True),))
    plan.run(torch.arange(4.0), out)
    assert torch.equal(out, torch.arange(4.0))
    with pytest.raises(ValueError, match="zeros"):
        plan.bind((4,), torch.float32, out)


# A product that is bound to its matrix


class Bench:
    """A bound product of 4 x 4 whose plan is `plan_of`'s, and what it was asked for."""

    def __init__(self) -> None:
        self.kernel = Adding()
        self.asked: list[tuple[int, torch.dtype, bool]] = []
        self.codes = torch.ones(4)
        self.product = BoundProduct(self.codes, 4, 4, self.plan_for)

    def plan_for(
        self, device: torch.device, m: int, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> tuple[Plan, tuple[torch.Tensor, ...]] | None:
        self.asked.append((m, dtype, bias is not None))
        return (plan_of(self.kernel), (self.codes,)) if m == 1 else None


def test_a_plan_is_asked_for_once_a_shape(hooks: tuple[list[Any], list[Any]]) -> None:
    bench = Bench()
    with torch.no_grad():
        for _ in range(3):
            result = bench.product(torch.zeros(1, 1, 4), None)
            assert result is not None
            assert result.shape == (1, 1, 4)
            assert bench.product(torch.zeros(2, 4), None) is None
    assert bench.asked == [(1, torch.float32, False), (2, torch.float32, False)]


def test_what_the_op_must_do_is_left_to_it(hooks: tuple[list[Any], list[Any]]) -> None:
    bench = Bench()
    x, bias = torch.zeros(1, 4), torch.zeros(4)
    assert bench.product(x.clone().requires_grad_(), None) is None
    assert bench.product(x, bias.clone().requires_grad_()) is None
    with torch.no_grad():
        assert bench.product(x.clone().requires_grad_(), None) is not None
        assert bench.product(torch.zeros(1, 5), None) is None
        assert bench.product(x, torch.zeros(5)) is None
        assert bench.product(torch.zeros(0, 4), None) is None
        assert bench.product(torch.zeros(1, 8)[:, ::2], None) is None
    assert [m for m, _, _ in bench.asked] == [1]


def test_codes_that_moved_are_not_multiplied_where_they_were(hooks: tuple[list[Any], list[Any]]) -> None:
    bench = Bench()
    x = torch.zeros(1, 4)
    assert bench.product(x, None) is not None
    bench.codes.data = torch.ones(4)
    assert bench.product(x, None) is None
