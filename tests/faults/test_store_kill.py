"""A process killed while it fills an offload folder leaves one that the next load uses or fills anew."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tuckaway
from heavy import count
from loading import FP32, empty_net, net, tokens

KILLS = count(20, 200)
PLACES = {"": "cpu", "layers": "disk"}

# Imports once, then forks a victim for every line it reads: a start of Python and torch takes longer than ten kills.
ZYGOTE = """
import os, shutil, signal, sys, torch
torch.set_num_threads(1)
import tuckaway
from loading import empty_net
from test_store_kill import load

load(empty_net(layers=6), sys.argv[1], sys.argv[2] + "-warm")
for line in sys.stdin:
    victim = os.fork()
    if victim == 0:
        for _ in range(1000):
            shutil.rmtree(sys.argv[2], ignore_errors=True)
            os.write(2, b"(")
            load(empty_net(layers=6), sys.argv[1], sys.argv[2])
            os.write(2, b")")
        os._exit(0)
    print(victim, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]), flush=True)
"""


def load(model: torch.nn.Module, checkpoint: object, store: object) -> torch.nn.Module:
    return tuckaway.load_and_quantize_model(
        model, FP32, str(checkpoint), device_map=PLACES, offload_folder=str(store)
    )


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_fill_is_used_or_done_again(tmp_path: Path) -> None:
    checkpoint, store, log = tmp_path / "checkpoint", tmp_path / "store", tmp_path / "log"
    tuckaway.save_model(net(layers=6), checkpoint, max_shard_size="150kB")
    resident = tuckaway.load_and_quantize_model(empty_net(layers=6), FP32, checkpoint)
    with torch.no_grad():
        expected = resident(tokens())
    generator = random.Random(0)
    inside = reused = 0
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, checkpoint, store],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        ) as zygote,
    ):
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        for _ in range(KILLS):
            start = log.stat().st_size
            print("go", file=zygote.stdin, flush=True)
            victim = int(zygote.stdout.readline())
            while b"(" not in log.read_bytes()[start:] and time.sleep(0.0005) is None:
                pass
            time.sleep(generator.uniform(0, 0.1))
            os.kill(victim, signal.SIGKILL)
            assert int(zygote.stdout.readline()) == -signal.SIGKILL  # confirmed dead
            inside += log.read_bytes()[start:].endswith(b"(")
            manifest = store / "manifest.json"
            before = manifest.stat().st_ino if manifest.exists() else None
            model = load(empty_net(layers=6), checkpoint, store)
            with torch.no_grad():
                assert torch.equal(model(tokens()), expected)
            tuckaway.materialize(model)
            reused += before == manifest.stat().st_ino
            assert sorted(os.listdir(store)) == ["manifest.json", "pages.bin"]
        zygote.stdin.close()
    print(f"{KILLS} kills, {inside} inside a fill, {reused} folders used as they were")
    assert inside >= KILLS / 2  # or the kills show nothing
    shutil.rmtree(store)
