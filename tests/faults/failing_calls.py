"""Run a job again and again, each time with another call of the system failing: a process under ``shim.c``.

``python failing_calls.py SHIM FOLDER JOB once|for-good|closing STEP`` with ``LD_PRELOAD=SHIM``; prints a line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import generations
import tuckaway
from loading import FP32, Net, assert_same_bits, empty_net, net, tokens
from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import StoreError, TuckawayError

READING, WRITING, CLOSING = 1, 2, 4
LAYERS = {"": "cpu", "layers": "disk"}


class Job:
    """Something that reads or writes below ``folder``; :meth:`prepare` and :meth:`check` are not disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected = net()
        self.model: Net | None = None

    def prepare(self) -> None:
        """Bring the folder into the state that the job begins with."""

    def run(self) -> None:
        """Do the job: with a call failing."""

    def check(self, done: bool) -> None:
        """The job said that it was done, or raised: compare."""

    def values(self, model: Any) -> None:
        for (name, a), (_, b) in zip(
            sorted(model.state_dict().items()), sorted(self.expected.state_dict().items()), strict=True
        ):
            assert_same_bits(a, b), name


class Load(Job):
    """A sharded checkpoint into RAM."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tuckaway.save_model(self.expected, folder / "checkpoint", max_shard_size="60kB")
        self.model = empty_net()
        self.before = dict(self.model.named_parameters())

    def run(self) -> None:
        self.load(self.model)

    def load(self, model: Any) -> None:
        tuckaway.load_checkpoint_and_dispatch(model, self.folder / "checkpoint", "cpu")

    def check(self, done: bool) -> None:
        if done:
            self.values(self.model)
            self.model = empty_net()
            self.before = dict(self.model.named_parameters())
        else:
            after = dict(self.model.named_parameters())
            assert all(after[name] is p and p.is_meta for name, p in self.before.items())
            assert not hasattr(self.model, "hf_device_map")


class LoadPickle(Load):
    """A pickled checkpoint into RAM."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.rmtree(folder / "checkpoint")
        (folder / "checkpoint").mkdir()
        torch.save(self.expected.state_dict(), folder / "checkpoint" / "pytorch_model.bin")


class Fill(Load):
    """A checkpoint into an offload folder that is not there yet, and a forward pass out of it."""

    def load(self, model: Any) -> None:
        tuckaway.load_checkpoint_and_dispatch(
            model, self.folder / "checkpoint", LAYERS, offload_folder=self.folder / "store"
        )

    def prepare(self) -> None:
        shutil.rmtree(self.folder / "store", ignore_errors=True)

    def check(self, done: bool) -> None:
        if done:
            with torch.no_grad():
                assert torch.equal(self.model(tokens()), self.expected(tokens()))
            tuckaway.materialize(self.model)
        super().check(done)
        if not done:  # what was left, if anything was, is in nobody's way
            again = empty_net()
            self.load(again)
            tuckaway.materialize(again)
            assert sorted(os.listdir(self.folder / "store")) == ["manifest.json", "pages.bin"]
            self.values(again)


class PageIn(Fill):
    """A forward pass that reads the blocks from disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.load(self.model)

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        with torch.no_grad():
            self.found = self.model(tokens())

    def check(self, done: bool) -> None:
        if (
            not done
        ):  # the model goes on working, once the page that was asked for ahead has told of its failure
            with suppress(StoreError):
                self.run()
            self.run()
        with torch.no_grad():
            assert torch.equal(self.found, self.expected(tokens()))


class Save(Job):
    """One file over shards, or shards over one file, in turns."""

    sizes = (generations.ONE_FILE, generations.TWO_SHARDS)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.target = folder / "saved"
        self.number = 1
        generations.save(self.target, 1, self.sizes[1])

    def prepare(self) -> None:
        self.old = generations.generation_of(self.target)
        self.number += 1

    def run(self) -> None:
        generations.save(self.target, self.number, self.sizes[self.number % 2])

    def check(self, done: bool) -> None:
        found = generations.generation_of(self.target)
        assert found in ((self.number,) if done else (self.old, self.number)), (found, self.old)
        assert len(Checkpoint.open(self.target).entries) == len(generations.NAMES)
        # what could not be removed is, by the next save
        generations.save(self.target, self.number, self.sizes[self.number % 2])
        names = os.listdir(self.target)
        assert not [name for name in names if name.startswith(".")], names
        assert len(names) == 1 + 2 * (self.sizes[self.number % 2] == generations.TWO_SHARDS), names


class SaveShards(Save):
    """Shards over shards."""

    sizes = (generations.SIX_SHARDS, generations.TWO_SHARDS)

    def check(self, done: bool) -> None:
        assert generations.generation_of(self.target) in ((self.number,) if done else (self.old, self.number))
        generations.save(self.target, self.number, self.sizes[self.number % 2])
        assert len(os.listdir(self.target)) == 1 + (2 if self.number % 2 else 6)


class SaveModel(Job):
    """A model with a configuration, from its pages, over the checkpoint before it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.expected = tuckaway.load_and_quantize_model(net(), FP32)
        tuckaway.save_model(self.expected, folder / "saved")

    def run(self) -> None:
        tuckaway.save_model(self.expected, self.folder / "saved", max_shard_size="30kB")

    def check(self, done: bool) -> None:
        loaded = tuckaway.load_and_quantize_model(empty_net(), FP32, self.folder / "saved")
        self.values(loaded)
        self.run()
        assert not [n for n in os.listdir(self.folder / "saved") if n.startswith(".")]


JOBS: dict[str, Callable[[Path], Job]] = {
    kind.__name__: kind for kind in (Load, LoadPickle, Fill, PageIn, Save, SaveShards, SaveModel)
}


def cause_is_kept(error: BaseException, number: int) -> bool:
    """Whether the system's own error is this one or behind it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno == number:
            return True
        link = link.__cause__
    return False


def counts() -> tuple[int, int]:
    """Open descriptors, and threads."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    shim, folder, name, mode, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], errno.EIO
    library = ctypes.CDLL(shim)
    library.fault_last.restype = ctypes.c_char_p
    library.fault_arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
    library.fault_watch(os.fsencode(folder))
    kinds = CLOSING if mode == "closing" else READING | WRITING
    job = JOBS[name](folder)
    job.prepare()
    job.run()
    job.check(True)  # threads and libraries of a first time
    gc.collect()
    gc.freeze()  # what was imported is not gone through again after every call that fails
    refused, tolerated, wrong = 0, 0, []
    failed: dict[str, int] = {}
    for n in range(1, 5000, int(sys.argv[5])):
        job.prepare()
        gc.collect()
        before = counts()
        library.fault_arm(-n if mode == "for-good" else n, number, kinds)
        error: BaseException | None = None
        try:
            job.run()
        except BaseException as caught:
            error = caught
        last = library.fault_last().decode()
        library.fault_arm(0, 0, 0)
        if not last:
            break
        failed[last] = failed.get(last, 0) + 1
        problem = ""
        if error is None:
            tolerated += 1
        elif not isinstance(error, TuckawayError):
            problem = f"untyped {error!r}"
        elif not cause_is_kept(error, number):
            problem = f"no cause in {error!r}"
        else:
            refused += 1
        if error is not None:
            after = counts()
            if after != before:
                problem += f" descriptors, threads {before} -> {after}"
        done, error = error is None, None
        try:
            job.check(done)
        except BaseException as caught:
            problem += f" then {caught!r}"
        if problem:
            wrong.append(f"call {n} ({last}): {problem}")
    gc.unfreeze()
    print(
        json.dumps(
            {
                "refused": refused,
                "tolerated": tolerated,
                "failed": failed,
                "wrong": wrong[:8],
                "count": len(wrong),
            }
        )
    )


if __name__ == "__main__":
    main()
