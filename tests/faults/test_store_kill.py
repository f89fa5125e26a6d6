"""A process killed while it fills an offload folder leaves one that the next load uses or fills anew."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import tuckaway
from heavy import count
from kills import victims
from loading import FP32, empty_net, net, tokens

KILLS = count(20, 200)
PLACES = {"": "cpu", "layers": "disk"}

SETUP = """
import shutil
from loading import empty_net
from test_store_kill import load

load(empty_net(layers=6), sys.argv[1], sys.argv[2] + "-warm")
"""
JOB = """
for _ in range(1000):
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    began()
    load(empty_net(layers=6), sys.argv[1], sys.argv[2])
    ended()
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
    inside = reused = 0
    with victims(SETUP, JOB, log, checkpoint, store, folder=Path(__file__).parent) as hit:
        for _ in range(KILLS):
            killed = hit(0.1)
            assert killed.status == -signal.SIGKILL
            inside += killed.inside
            manifest = store / "manifest.json"
            before = manifest.stat().st_ino if manifest.exists() else None
            model = load(empty_net(layers=6), checkpoint, store)
            with torch.no_grad():
                assert torch.equal(model(tokens()), expected)
            tuckaway.materialize(model)
            reused += before == manifest.stat().st_ino
            assert sorted(os.listdir(store)) == ["manifest.json", "pages.bin"]
    print(f"{KILLS} kills, {inside} inside a fill, {reused} folders used as they were")
    assert inside >= KILLS / 2  # or the kills show nothing
    shutil.rmtree(store)
