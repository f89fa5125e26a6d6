"""Private memory of the process while a checkpoint is loaded: the final weights and a bounded rest, whatever shards.

Measured from outside the loader: a thread samples ``Private_*`` of ``/proc/self/smaps_rollup``, which mapped files and
the page cache are no part of.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tuckaway

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="no /proc/self/smaps_rollup on this system"
)

WIDTH, LAYERS = 1024, 80  # 336 MB in fp32

SCRIPT = """
    import json, sys, threading, time, torch, tuckaway
    from torch import nn

    def private():
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_"))

    folder, place, store, width, layers = sys.argv[1:4] + [int(n) for n in sys.argv[4:]]
    # threads, kernels and caches that any first load makes, at a size that does not matter
    tuckaway.load_and_quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "nf4")
    with tuckaway.init_empty_weights():
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    config = tuckaway.QuantizationConfig(skip_modules=[])
    peak, done, before = [0], threading.Event(), private()

    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], private())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample)
    sampler.start()
    tuckaway.load_and_quantize_model(model, config, folder, device_map=place, offload_folder=store)
    done.set()
    sampler.join()
    print(json.dumps([peak[0] - before, private() - before, tuckaway.memory_footprint(model)]))
"""


@pytest.fixture(scope="module", params=[1, 10], ids=["one shard", "ten shards"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big")
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    tuckaway.save_model(model, path, max_shard_size=4 * WIDTH * WIDTH * LAYERS // request.param)
    assert len(list(path.glob("*.safetensors"))) == request.param
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > 300e6
    return path


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_peak_while_loading(folder: Path, place: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), folder, place, tmp_path, str(WIDTH), str(LAYERS)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, after, weights = json.loads(done.stdout)
    assert 43e6 < weights < 44e6
    resident = weights if place == "cpu" else 0
    # two buffers of 16 MiB, a piece cast to bf16 and what quantizing it takes; bigger pieces would show here
    assert peak < resident + 150e6
    assert after < resident + 100e6
