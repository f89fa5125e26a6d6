"""The launcher with a kernel that only notes how it is called: which compiled kernel is reused, and for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tuckaway_kernels.launching as launching
from tuckaway_kernels.launching import Launch


class Compiled:
    function = 1
    packed_metadata = (4, 1)

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class Kernel:
    """Triton's part: notes what was compiled, and what was launched directly."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.compiled.append((grid, arguments, options))
            return Compiled(self.direct)

        return launch


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """Pretend that this is a GPU; give the profilers' hooks."""
    found: tuple[list[Any], list[Any]] = [], []
    monkeypatch.setattr(launching, "launch_hooks", lambda: found)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return found


def launch_of(kernel: Kernel, n: int = 8, **options: Any) -> Launch:
    return Launch(kernel, (3, 2, 1), (n, 1), {"TILE": 4, "LAST": True}, warps=2, **options)


def test_the_second_call_goes_to_the_compiled_kernel(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x, out = Kernel(), torch.zeros(8), torch.zeros(8)
    launch = launch_of(kernel, stages=3)
    launch(x, out)
    assert kernel.direct == []
    options = {"TILE": 4, "LAST": True, "num_warps": 2, "num_stages": 3}
    assert [(grid, given) for grid, _, given in kernel.compiled] == [((3, 2, 1), options)]
    launch(out, x)
    pointers = out.data_ptr(), x.data_ptr()
    assert kernel.direct == [(3, 2, 1, 77, 1, (4, 1), None, None, None, *pointers, 8, 1, 4, True)]
    assert len(kernel.compiled) == 1


def test_another_launch_of_the_same_kernel_reuses_it(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch_of(kernel, 8)(x)
    launch_of(kernel, 24)(x)  # no multiple of 16 either
    assert (len(kernel.compiled), len(kernel.direct)) == (1, 1)


@pytest.mark.parametrize("n", [1, 16, 1 << 31])
def test_integers_that_triton_compiles_in_are_kept_apart(n: int, hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch_of(kernel, 8)(x)
    launch_of(kernel, n)(x)
    assert (len(kernel.compiled), len(kernel.direct)) == (2, 0)


def test_dtypes_and_alignment_are_kept_apart(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch = launch_of(kernel)
    for tensor in (x, x[1:], x.half(), x, x[1:]):
        launch(tensor)
    assert (len(kernel.compiled), len(kernel.direct)) == (3, 2)


def test_constants_are_told_apart_by_type_too(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    for value in (True, 1, 1.0):
        Launch(kernel, (1, 1, 1), (), {"A": value}, warps=1)(x)
    assert len(kernel.compiled) == 3


def test_unaligned_tensors_are_copied_where_that_was_asked(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x = Kernel(), torch.arange(9.0)
    launch_of(kernel, aligned=True)(x[1:])
    (given,) = (arguments for _, arguments, _ in kernel.compiled)
    assert given[0].data_ptr() % 16 == 0
    assert torch.equal(given[0], x[1:])


def test_words_are_seen_as_int32(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel = Kernel()
    launch_of(kernel, words=(0,))(torch.zeros(2, 4, dtype=torch.float16), torch.zeros(3))
    (given,) = (arguments for _, arguments, _ in kernel.compiled)
    assert (given[0].dtype, given[0].shape, given[1].dtype) == (torch.int32, (4,), torch.float32)


def test_a_profilers_hook_takes_tritons_own_way(hooks: tuple[list[Any], list[Any]]) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch = launch_of(kernel)
    launch(x)
    hooks[0].append(print)
    launch(x)
    assert (len(kernel.compiled), len(kernel.direct)) == (2, 0)


def test_nothing_is_called_directly_where_ptx_is_not() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch = launch_of(kernel)
    launch(x)
    launch(x)
    assert (len(kernel.compiled), len(kernel.direct)) == (2, 0)
