"""The folder of a writer that is killed, or whose machine loses power, holds one generation, whole."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

import generations
from generations import ONE_FILE, SIX_SHARDS, TWO_SHARDS, generation_of
from heavy import count
from kills import victims
from tuckaway.checkpoint import Checkpoint

KILLS = count(20, 200)

SETUP = """
import random
from pathlib import Path
import generations
"""
JOB = """
folder, generation, *sizes = words
for number in range(int(generation), int(generation) + 1000):
    size = random.choice(sizes)
    began()
    generations.save(Path(folder), number, size)
    ended()
"""


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sizes", [[ONE_FILE], [TWO_SHARDS, SIX_SHARDS, ONE_FILE]], ids=["single", "sharded"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_writer_leaves_the_old_or_the_new_checkpoint(tmp_path, sizes):
    folder, log = tmp_path / "folder", tmp_path / "log"
    generations.save(folder, 0, TWO_SHARDS)
    inside = advanced = known = 0
    with victims(SETUP, JOB, log) as hit:
        for _ in range(KILLS):
            killed = hit(0.06, folder, known + 1, *sizes)
            assert killed.status == -signal.SIGKILL
            inside += killed.inside
            found = generation_of(folder)
            assert found is not None
            assert found >= known
            advanced += found > known
            known = found
            assert len(Checkpoint.open(folder).entries) == len(generations.NAMES)
    print(f"{KILLS} kills, {inside} inside a save, {advanced} after another generation was there")
    assert inside >= KILLS / 2  # or the kills show nothing
    assert advanced >= KILLS / 10
    paths = generations.save(folder, known + 1, SIX_SHARDS)
    assert generation_of(folder) == known + 1
    assert sorted(os.listdir(folder)) == sorted(
        [*(path.name for path in paths), "model.safetensors.index.json"]
    )


class Disk:
    """What of a folder survives a power loss, from the calls that changed it.

    Names and bytes are on the disk for sure once synced. Before that, every change of a name may have happened or not,
    by itself, and bytes may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[int, bytes] = {}  # inode to its bytes when last synced
        self.names = {name: os.stat(folder / name).st_ino for name in os.listdir(folder)}
        for name, inode in self.names.items():
            self.files[inode] = (folder / name).read_bytes()
        self.pending: list[dict[str, int | None]] = []  # changes of names since the folder was synced
        self.states: set[tuple[tuple[str, bytes], ...]] = set()
        self.remember()

    def remember(self) -> None:
        """Write down every state that a power loss could leave now."""
        for happened in itertools.product([False, True], repeat=len(self.pending)):
            names = dict(self.names)
            for change, did in zip(self.pending, happened, strict=True):
                if did:
                    names.update({name: inode for name, inode in change.items() if inode is not None})
                    for name in [name for name, inode in change.items() if inode is None]:
                        names.pop(name, None)
            state = {name: self.files.get(inode, b"") for name, inode in names.items()}
            self.states.add(tuple(sorted((n, d) for n, d in state.items() if not n.startswith("."))))

    def change(self, change: dict[str, int | None]) -> None:
        # temps and the lock are of no interest to a reader, and would make the number of states explode
        seen = {name: inode for name, inode in change.items() if not name.startswith(".")}
        if seen:
            self.pending.append(seen)
        self.remember()

    def sync_folder(self) -> None:
        for change in self.pending:
            for name, inode in change.items():
                self.names.pop(name, None)
                if inode is not None:
                    self.names[name] = inode
        self.pending.clear()
        self.remember()

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        real_fsync, real_replace, real_unlink = os.fsync, os.replace, os.unlink

        def fsync(fd):
            real_fsync(fd)
            inode = os.fstat(fd).st_ino
            if inode == os.stat(self.folder).st_ino:
                self.sync_folder()
            else:
                size = os.fstat(fd).st_size
                self.files[inode] = os.pread(fd, size, 0)

        def replace(source, target):
            inode = os.stat(source).st_ino
            real_replace(source, target)
            self.change({Path(source).name: None, Path(target).name: inode})

        def unlink(path):
            real_unlink(path)
            self.change({Path(path).name: None})

        for name, call in {"fsync": fsync, "replace": replace, "unlink": unlink}.items():
            patch.setattr(os, name, call)


@pytest.mark.parametrize("new", [ONE_FILE, TWO_SHARDS, SIX_SHARDS])
@pytest.mark.parametrize("old", [None, ONE_FILE, TWO_SHARDS])
def test_every_state_that_a_power_loss_can_leave_is_old_or_new(tmp_path, old, new):
    folder = tmp_path / "folder"
    folder.mkdir()
    if old is not None:
        generations.save(folder, 1, old)
    disk = Disk(folder)
    with pytest.MonkeyPatch.context() as patch:
        disk.patch(patch)
        generations.save(folder, 2, new)
    found = set()
    for number, state in enumerate(sorted(disk.states)):
        crashed = tmp_path / str(number)
        crashed.mkdir()
        for name, data in state:
            (crashed / name).write_bytes(data)
        found.add(generation_of(crashed))
    assert found == {None if old is None else 1, 2}
