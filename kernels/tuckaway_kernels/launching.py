"""How every kernel of the package is launched: on the right device, and quickly.

Triton's own ``kernel[grid](...)`` looks at every argument in Python to find the compiled kernel, 85 us a launch on the
slow host of an H100. `Launch` fixes everything but the tensors once, so that what is left to look at is their dtypes
and addresses; the compiled kernel is then called as Triton itself calls it. It serves CUDA GPUs. Elsewhere (Triton's
interpreter, ROCm, XPU), under a profiler's launch hooks, and at the first call, Triton's own way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch

from tuckaway_kernels.backend import interpreting
from tuckaway_kernels.reciprocal import reciprocal_table

Grid = tuple[int, int, int]

_INT32: Final = 1 << 31

STREAM: Final = 3
FIRST_ADDRESS: Final = 9
"""Where the arguments of a compiled kernel's ``run`` have these."""


@cache
def has_ptx() -> bool:
    """Tell whether kernels may contain inline PTX: on NVIDIA GPUs, not in the interpreter, not on ROCm or XPU.

    A build of torch for CUDA may be on a machine without one.
    """
    return torch.version.cuda is not None and torch.cuda.is_available() and not interpreting()


@cache
def overlaps(device: torch.device) -> bool:
    """Tell whether a launch may begin before the one before it has ended: on NVIDIA GPUs from Hopper on."""
    return has_ptx() and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def kernel_reciprocal_table(device: torch.device) -> torch.Tensor:
    """Return the table that kernels without PTX take the reciprocal from; with PTX, one byte never read."""
    if has_ptx():
        return torch.zeros(1, dtype=torch.int8, device=device)
    return reciprocal_table(device)


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; on devices that do not say, 1."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def launch_hooks() -> tuple[list[Any], list[Any]] | None:
    """Return the hooks that profilers enter, or None if this Triton's kernels must not be called directly.

    The arguments of ``CompiledKernel.run`` are the same from Triton 3.6 to 3.9; a later one takes Triton's own way
    until it was looked at.
    """
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not has_ptx() or not (3, 6) <= version <= (3, 9):
        return None
    runtime = triton.knobs.runtime
    chains = runtime.launch_enter_hook, runtime.launch_exit_hook
    if not all(isinstance(getattr(chain, "calls", None), list) for chain in chains):
        return None
    return chains[0].calls, chains[1].calls


_Ready = tuple[Callable[..., None], Any, Any]
"""``run``, the function's handle and the packed metadata of a compiled kernel."""

_READY: dict[tuple[Any, ...], _Ready] = {}
"""By kernel, device, and everything Triton specializes on. A handful of entries a kernel; nothing of a tensor."""


def _speciality(value: int) -> int:
    """What Triton compiles into a kernel about an integer: that it is 1, a multiple of 16, more than 32 bits."""
    return 1 if value == 1 else (2 if value % 16 == 0 else 0) + (4 if value >= _INT32 else 0)


class Launch:
    """One launch of a kernel, everything but its tensors fixed; callable any number of times, on any device.

    The kernel's parameters are pointers first, then integers, then constants.

    Args:
        kernel: the ``@triton.jit`` function.
        grid: programs along each of three axes.
        integers: the integer arguments.
        constants: the ``tl.constexpr`` arguments, in the order of the parameters.
        warps: 32 threads each, a program.
        stages: of Triton's software pipeline; None leaves it to Triton.
        words: which tensors the kernel reads as int32.
        overlap: let it begin before the launch before it has ended; the kernel waits for that one itself.
        aligned: copy tensors that do not begin on 16 bytes, for kernels whose result would depend on it.
        describe: makes what the kernel takes in place of its first tensor, a descriptor for the bulk copy engine.

    Example:
        >>> Launch(kernel, (4, 1, 1), (n,), {"TILE": 512}, warps=4)(x, out)  # doctest: +SKIP
    """

    __slots__ = (
        "_aligned",
        "_constants",
        "_describe",
        "_grid",
        "_integers",
        "_kernel",
        "_key",
        "_options",
        "_ready",
        "_words",
    )

    def __init__(
        self,
        kernel: Any,
        grid: Grid,
        integers: tuple[int, ...],
        constants: Mapping[str, Any],
        *,
        warps: int,
        stages: int | None = None,
        words: tuple[int, ...] = (),
        aligned: bool = False,
        overlap: bool = False,
        describe: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self._kernel = kernel
        self._grid = grid
        self._integers = integers
        self._constants = dict(constants)
        self._options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
        if overlap:
            self._options["launch_pdl"] = True
        self._words = words
        self._aligned = aligned
        self._describe = describe
        special = tuple(map(_speciality, integers))
        # a constant of another type is another constant: True is not 1 to Triton
        named = tuple((type(value), value) for value in self._constants.values())
        self._key = (kernel, special, named, warps, stages, words, overlap)
        self._ready: dict[tuple[Any, ...], tuple[_Ready, tuple[Any, ...]]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the tensors' device and its current stream."""
        index = tensors[0].get_device()
        if index >= 0 and index != torch.accelerator.current_device_index():
            with torch.accelerator.device_index(index):
                self._run(index, tensors)
        else:
            self._run(index, tensors)

    def _run(self, index: int, tensors: tuple[torch.Tensor, ...]) -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        together = 0
        for pointer in pointers:
            together |= pointer
        # a tensor that is elsewhere makes a key of its own, and Triton says what is wrong with it
        key = (*[tensor.dtype for tensor in tensors], *[tensor.get_device() for tensor in tensors])
        if together & 15:
            if self._aligned:
                self._run(index, tuple(t if t.data_ptr() % 16 == 0 else t.clone() for t in tensors))
                return
            key = (*key, tuple(pointer % 16 == 0 for pointer in pointers))
        found = self._ready.get(key)
        if found is None:
            self._compile(key, index, tensors)
            return
        (run, function, metadata), rest = found
        hooks = launch_hooks()
        if hooks is None or hooks[0] or hooks[1]:
            self._triton(tensors)
            return
        first = pointers[0] if self._describe is None else self._describe(tensors[0])
        stream = torch._C._cuda_getCurrentRawStream(index)
        run(*self._grid, stream, function, metadata, None, None, None, first, *pointers[1:], *rest)

    def compiled_for(self, tensors: Sequence[torch.Tensor]) -> tuple[Callable[..., None], list[Any]] | None:
        """Return what was compiled for these tensors, and its arguments.

        None: nothing yet, or for other addresses, or a descriptor has to be made for every launch.

        In the arguments the stream is at `STREAM`, the tensors' addresses from `FIRST_ADDRESS` on.
        """
        ready = self._ready.get((*[t.dtype for t in tensors], *[t.get_device() for t in tensors]))
        pointers = [tensor.data_ptr() for tensor in tensors]
        if ready is None or self._describe is not None or any(pointer & 15 for pointer in pointers):
            return None
        (run, function, metadata), rest = ready
        return run, [*self._grid, 0, function, metadata, None, None, None, *pointers, *rest]

    def _compile(self, key: tuple[Any, ...], index: int, tensors: tuple[torch.Tensor, ...]) -> None:
        """Launch through Triton, unless another `Launch` met the same kernel, and remember what it compiled."""
        whole = (*self._key, index, *key)
        rest = (*self._integers, *self._constants.values())
        ready = _READY.get(whole)
        if ready is not None:
            self._ready[key] = ready, rest
            self._run(index, tensors)
            return
        compiled = self._triton(tensors)
        if launch_hooks() is None or compiled is None:
            return
        ready = compiled.run, compiled.function, compiled.packed_metadata
        if ready[1] is not None:
            _READY[whole] = ready
            self._ready[key] = ready, rest

    def _triton(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        given: list[Any] = list(tensors)
        for i in self._words:
            given[i] = tensors[i].view(-1).view(torch.int32)
        if self._describe is not None:
            given[0] = self._describe(tensors[0])
        return self._kernel[self._grid](*given, *self._integers, **self._constants, **self._options)
