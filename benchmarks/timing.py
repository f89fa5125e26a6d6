"""How long a call takes: on the GPU by CUDA graph or by events, on the host by the clock.

Without a GPU, where scripts are tried in miniature, everything is timed by the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[int], torch.Tensor]
"""``call(i)`` works on copy ``i`` of the weight."""

REPLAYS = 9


def device() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def microseconds(call: Call, calls: int) -> float:
    """Return the median GPU time of a call, of replays of a graph of ``calls`` calls."""
    for i in range(3):
        call(i)
    if not torch.cuda.is_available():
        return host_microseconds(lambda: call(0), 3)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return round(statistics.median(times[2:]), 2)


def eager_microseconds(call: Call, calls: int) -> float:
    """Return the time of a call that no graph can record, because it waits for the GPU or copies from the host."""
    for i in range(3):
        call(i)
    if not torch.cuda.is_available():
        return host_microseconds(lambda: call(0), 3)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(calls):
        call(i)
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) * 1e3 / calls, 1)


def host_microseconds(call: Callable[[], torch.Tensor], calls: int = 1000) -> float:
    """Return the time of a call until it returns, the GPU not waited for: the median of five runs."""
    for _ in range(min(calls, 20)):
        call()
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(max(calls // 5, 1)):
            call()
        times.append((time.perf_counter() - start) / max(calls // 5, 1))
    synchronize()
    return round(statistics.median(times) * 1e6, 1)
