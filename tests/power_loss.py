"""What a power loss can leave of a folder: every state, from the calls of the system that changed it.

A change of a name (made, renamed, removed) is on the disk for sure once its folder was synced; before that it may have
happened or not, each by itself. A file's bytes are there once it was synced; before that those of the last sync may be.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_EXHAUSTIVE = 7  # changes that are pending at once; of more, a sample of the subsets
_Change = tuple[tuple[int, str, int | None], ...]


class Disk:
    """The disk under one folder, and every state that a power loss could have left so far.

    Args:
        root: the folder; what is in it now is taken to be synced.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[int, dict[str, int]] = {}  # inode of a folder to its names on the disk
        self.synced: dict[int, bytes] = {}
        self.pending: list[_Change] = []
        self.where: dict[int, Path] = {}  # inode of a file to where it is now, to read what was not synced
        self.states: set[tuple[tuple[str, bytes], ...]] = set()
        self.random = random.Random(0)
        self.top = os.stat(root).st_ino
        self._take(root)
        self.remember()

    def _take(self, folder: Path) -> None:
        names = self.folders.setdefault(os.stat(folder).st_ino, {})
        for name in os.listdir(folder):
            path, inode = folder / name, os.stat(folder / name).st_ino
            names[name] = inode
            if path.is_dir():
                self._take(path)
            else:
                self.synced[inode], self.where[inode] = path.read_bytes(), path

    def remember(self) -> None:
        """Write down every state that a power loss could leave now."""
        count = len(self.pending)
        if count <= _EXHAUSTIVE:
            subsets = list(itertools.product([False, True], repeat=count))
        else:
            subsets = [tuple(i < n for i in range(count)) for n in range(count + 1)]
            subsets += [tuple(self.random.random() < 0.5 for _ in range(count)) for _ in range(32)]
        for happened in subsets:
            folders = {inode: dict(names) for inode, names in self.folders.items()}
            for change, did in zip(self.pending, happened, strict=True):
                for folder, name, inode in change if did else ():
                    folders[folder].pop(name, None)
                    if inode is not None:
                        folders[folder][name] = inode
            for newest in (False, True):
                self.states.add(tuple(sorted(self._files(folders, self.top, "", newest))))

    def _files(
        self, folders: dict[int, dict[str, int]], folder: int, prefix: str, newest: bool
    ) -> Iterator[tuple[str, bytes]]:
        for name, inode in folders[folder].items():
            if inode in folders:
                yield prefix + name + "/", b""
                yield from self._files(folders, inode, prefix + name + "/", newest)
                continue
            data = self.synced.get(inode, b"")
            if newest and inode in self.where and self.where[inode].exists():
                data = self.where[inode].read_bytes()
            yield prefix + name, data

    def _inside(self, path: object) -> Path | None:
        if not isinstance(path, str | os.PathLike):
            return None
        absolute = Path(os.path.abspath(path))
        return absolute if absolute.is_relative_to(self.root) else None

    def change(self, *changes: tuple[Path, int | None]) -> None:
        """Take a call's changes of names, which happen together or not."""
        self.pending.append(tuple((os.stat(p.parent).st_ino, p.name, inode) for p, inode in changes))
        self.remember()

    def discover(self, folder: Path | None = None) -> None:
        """Take the files that were made since the last call."""
        for entry in os.scandir(folder or self.root):
            inode, path = entry.inode(), Path(entry.path)
            if entry.is_dir():
                self.discover(path)
            elif self.where.get(inode) != path:
                self.synced.pop(inode, None)  # the number of a file that is gone
                self.where[inode] = path
                self.change((path, inode))

    def sync(self, fd: int) -> None:
        """Take an ``fsync``."""
        inode = os.fstat(fd).st_ino
        if inode in self.folders:
            for change in self.pending:
                for folder, name, child in change if change[0][0] == inode else ():
                    self.folders[folder].pop(name, None)
                    if child is not None:
                        self.folders[folder][name] = child
            self.pending = [change for change in self.pending if change[0][0] != inode]
        elif inode in self.where:
            self.synced[inode] = self.where[inode].read_bytes()
        self.remember()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record what the block does below the folder."""
        real = {
            name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
        }

        def fsync(fd):
            self.discover()
            real["fsync"](fd)
            self.sync(fd)

        def renamed(source, target, **more):
            self.discover()
            inside = self._inside(source)
            inode = os.stat(source).st_ino
            real["replace"](source, target, **more)
            if inside is not None:
                target = Path(os.path.abspath(target))
                for child, path in self.where.items():
                    if path == inside or path.is_relative_to(inside):
                        self.where[child] = target / path.relative_to(inside) if path != inside else target
                self.change((inside, None), (target, inode))

        def removed(call):
            def remove(path, **more):
                self.discover()
                inside = self._inside(path)
                real[call](path, **more)
                if inside is not None and not more:
                    self.change((inside, None))

            return remove

        def mkdir(path, *rest, **more):
            real["mkdir"](path, *rest, **more)
            if (inside := self._inside(path)) is not None:
                self.folders[os.stat(inside).st_ino] = {}
                self.change((inside, os.stat(inside).st_ino))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "replace", renamed)
            patch.setattr(os, "rename", renamed)
            patch.setattr(os, "unlink", removed("unlink"))
            patch.setattr(os, "rmdir", removed("rmdir"))
            patch.setattr(os, "mkdir", mkdir)
            yield

    def crashed(self, target: Path) -> Iterator[Path]:
        """Make every state in turn below ``target``."""
        for number, state in enumerate(sorted(self.states)):
            folder = target / str(number)
            folder.mkdir(parents=True)
            for name, data in state:
                path = folder / name
                if name.endswith("/"):
                    path.mkdir(parents=True, exist_ok=True)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
            yield folder
