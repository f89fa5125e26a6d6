"""Threads that load models at the same time, and run them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tuckaway
from loading import empty_net, net, tokens

SEEDS = (1, 2)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs in a thread each, all at once, switching between them as often as can be."""
    ready = threading.Barrier(len(jobs), timeout=60)

    def run(job: Callable[[], Any]) -> Any:
        ready.wait()
        with torch.no_grad():
            return job()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            return [future.result(60) for future in [pool.submit(run, job) for job in jobs]]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_two_models_loaded_and_run_by_threads(tmp_path: Path, place: str) -> None:
    for seed in SEEDS:
        tuckaway.save_model(net(seed), tmp_path / str(seed))

    def load(seed: int) -> Any:
        model = empty_net()
        return tuckaway.load_checkpoint_and_dispatch(
            model, tmp_path / str(seed), {"": place}, offload_folder=tmp_path / f"offload{seed}"
        )

    with torch.no_grad():
        want = {seed: net(seed)(tokens()) for seed in SEEDS}
    models = dict(zip(SEEDS, together([lambda seed=seed: load(seed) for seed in SEEDS]), strict=True))
    jobs = [lambda seed=seed: [models[seed](tokens()) for _ in range(10)] for seed in SEEDS * 4]
    for seed, results in zip(SEEDS * 4, together(jobs), strict=True):
        assert all(torch.equal(result, want[seed]) for result in results)
