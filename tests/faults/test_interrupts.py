"""Ctrl-C at random moments of loads, fills, forwards, saves and conversions: KeyboardInterrupt, cleanly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import generations
import tuckaway
from heavy import count
from kills import victims
from loading import net

NUMBER = count(4, 30)  # samples beside the sweep of test_every_interrupt.py: half a second each
CLEAN, DIRTY = 40, 41

SETUP = """
import gc, random, threading, traceback
from pathlib import Path
import generations, tuckaway
from loading import FP32, empty_net, tokens

folder = Path(sys.argv[1])
PLACES = {"": "cpu", "layers": "disk"}

def load(number):
    tuckaway.load_and_quantize_model(empty_net(), FP32, folder / "checkpoint")

def fill(number):
    tuckaway.load_and_quantize_model(
        empty_net(), FP32, folder / "checkpoint", device_map=PLACES, offload_folder=folder / f"store-{number}")

def paged():
    return tuckaway.load_and_quantize_model(
        empty_net(), FP32, folder / "checkpoint", device_map=PLACES, offload_folder=folder / "store-0")

def materialize(number):
    tuckaway.materialize(paged())

model = None
def forward(number):
    global model
    model = model or paged()
    with torch.no_grad():
        for _ in range(20):
            model(tokens())

def goes_on():
    # what was interrupted in its forward computes what it did, with the slots it had
    if model is not None:
        pager = model._tuckaway_paging.pager
        with torch.no_grad():
            assert torch.equal(model(tokens()), EXPECTED)
        assert len(pager.slots.all) <= pager.slots.count
        assert not any(page.turns or page.users for page in pager.pages)
        tuckaway.materialize(model)
        with torch.no_grad():
            assert torch.equal(model(tokens()), EXPECTED)

def save_paged(number):
    global model
    model = model or paged()
    tuckaway.save_model(model, folder / f"saved-{number % 3}")

def save(number):
    generations.save(folder / "saved", number, random.choice([generations.ONE_FILE, generations.TWO_SHARDS]))

def convert(number):
    tuckaway.quantize_checkpoint(folder / "checkpoint", folder / f"converted-{number}", FP32, max_shard_size="15kB")

fill(0)
EXPECTED = paged()
with torch.no_grad():
    EXPECTED = EXPECTED(tokens())
gc.collect()  # or the files of these models would go in a victim, and hide one that stays open there
"""
# a victim works until it is interrupted, and then looks around
JOB = """
job, start = words
signal.signal(signal.SIGINT, signal.default_int_handler)
before = len(os.listdir("/proc/self/fd"))
code = 41
try:
    try:
        began()
        for number in range(int(start), int(start) + 1000):
            globals()[job](number)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        error = None
    goes_on()
    model = None
    gc.collect()
    def others():
        # without one whose start() was interrupted before it ran: Python lists it for ever, and it holds nothing
        return [t for t in threading.enumerate() if t is not threading.main_thread() and t.ident is not None]
    for thread in others():  # an interrupt may end the wait for them, not them
        thread.join(10)
    after = len(os.listdir("/proc/self/fd"))
    alive = [t.name for t in others()]
    code = 40
    # one descriptor may be lost: by an interrupt right between open(2) and the assignment of its number
    if after > before + 1 or alive:
        os.write(1, f"left: {before} -> {after} {alive}\\n".encode())
        code = 42
except BaseException:
    os.write(1, traceback.format_exc().replace("\\n", "|").encode() + b"\\n")
os._exit(code)
"""


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("job", ["load", "fill", "forward", "materialize", "save_paged", "save", "convert"])
def test_an_interrupt_at_any_moment(tmp_path: Path, job: str) -> None:
    tuckaway.save_model(net(), tmp_path / "checkpoint", max_shard_size="60kB")
    generations.save(tmp_path / "saved", 1, generations.TWO_SHARDS)
    log = tmp_path.parent / f"{tmp_path.name}.log"
    with victims(SETUP, JOB, log, tmp_path) as hit:
        for number in range(NUMBER):
            found = hit(0.08, job, 2 + number % 100, number=signal.SIGINT)
            assert found.status == CLEAN, found.said
            left = [
                str(p.relative_to(tmp_path))
                for p in tmp_path.rglob(".*")
                if not p.name.endswith(".converting")
            ]
            assert not [name for name in left if name.endswith(".tmp")], left
            assert generations.generation_of(tmp_path / "saved") is not None
