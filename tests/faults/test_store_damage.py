"""Every byte of a small offload folder changed, and every truncation of it, under a paged model's load and forward.

What the bytes of a component, or the zeros between two, become is found by a checksum. Behind a page's last component
lies what no component is made of, up to a multiple of 4096: there a change must not change a bit of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tuckaway
from heavy import HEAVY
from loading import FP32, Net, empty_net, net, tokens
from tuckaway.errors import ChecksumError, StoreCorrupt
from tuckaway.paging.manifest import read_manifest
from tuckaway.paging.state import Paging, paging_of

SIZE = {"layers": 2, "width": 24, "vocabulary": 16}
STEP = 1 if HEAVY else 61
"""A prime: it hits every place within the 256 bytes that components are aligned to."""


class Folder:
    """A checkpoint and a filled offload folder."""

    def __init__(self, path: Path) -> None:
        self.checkpoint, self.store = path / "checkpoint", path / "store"
        tuckaway.save_model(net(**SIZE), self.checkpoint)
        with self.loaded() as model:
            store = pages(model).homes.store
            assert store is not None
            self.layouts, self.result = store.layouts, self.forward(model)
        manifest = read_manifest(self.store)
        assert manifest is not None
        self.starts = manifest.starts

    @contextmanager
    def loaded(self) -> Iterator[Net]:
        """A model with its pages in the store, which is closed at the end."""
        model = tuckaway.load_and_quantize_model(
            empty_net(**SIZE),
            FP32,
            self.checkpoint,
            device_map={"": "cpu", "layers": "disk"},
            offload_folder=self.store,
        )
        try:
            yield model
        finally:
            pages(model).close()  # a model is garbage in a cycle, and holds its folder until it is collected

    def check(self) -> None:
        """A model that is loaded now computes what the first one did."""
        with self.loaded() as model:
            assert torch.equal(self.forward(model), self.result)

    @staticmethod
    def forward(model: Net) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens(SIZE["vocabulary"]))

    def file(self, name: str) -> Path:
        return self.store / name

    def covered(self, position: int) -> bool:
        """Whether a byte of the pages is one that a checksum covers."""
        return any(
            start <= position < start + layout.nbytes
            for start, layout in zip(self.starts, self.layouts, strict=True)
        )


def pages(model: Net) -> Paging:
    paging = paging_of(model)
    assert paging is not None
    return paging


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("damage"))


@pytest.fixture(autouse=True)
def whole_again(folder: Folder) -> Iterator[None]:
    """The folder's files are put back as they were, and serve a load."""
    before = {name: folder.file(name).read_bytes() for name in ("pages.bin", "manifest.json")}
    yield
    for name, content in before.items():
        assert folder.file(name).read_bytes() == content, "the test did not put it back"
    folder.check()


def changed(path: Path, position: int, work: Callable[[], None]) -> None:
    """Flip one bit of a file's byte while ``work`` runs."""
    fd = os.open(path, os.O_RDWR)
    try:
        sound = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([sound[0] ^ 1 << position % 8]), position)
        work()
    finally:
        os.pwrite(fd, sound, position)
        os.close(fd)


def cut(path: Path, nbytes: int, work: Callable[[], None]) -> None:
    """Cut a file, or make it longer, while ``work`` runs."""
    sound = path.read_bytes()
    try:
        os.truncate(path, nbytes)
        work()
    finally:
        path.write_bytes(sound)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_every_byte_of_the_pages(folder: Folder) -> None:
    path, found, harmless = folder.file("pages.bin"), 0, 0

    def is_found() -> None:
        with folder.loaded() as model, pytest.raises(ChecksumError, match="changed on disk"):
            folder.forward(model)

    for position in range(0, path.stat().st_size, STEP):
        covered = folder.covered(position)
        changed(path, position, is_found if covered else folder.check)
        found, harmless = found + covered, harmless + (not covered)
    print(f"{found} changes of pages found, {harmless} behind the last component without effect")
    assert found > harmless > 0


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_every_byte_of_the_manifest(folder: Folder) -> None:
    path = folder.file("manifest.json")
    for position in range(0, path.stat().st_size, 1 if HEAVY else 7):
        changed(path, position, lambda: refused(folder))


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["pages.bin", "manifest.json"])
def test_every_truncation(folder: Folder, name: str) -> None:
    path = folder.file(name)
    size = path.stat().st_size
    step = 61 if name == "pages.bin" else 1 if HEAVY else 7  # of the pages only the size is compared
    for left in (*range(0, size, step), size - 1, size + 1, size + 4096):
        cut(path, left, lambda: refused(folder))


def refused(folder: Folder) -> None:
    """The load refuses, and leaves what is there alone."""
    before = {path.name: path.read_bytes() for path in folder.store.iterdir()}
    with pytest.raises(StoreCorrupt), folder.loaded():
        pass
    assert {path.name: path.read_bytes() for path in folder.store.iterdir()} == before


@pytest.mark.parametrize("name", ["pages.bin", "manifest.json"])
def test_a_missing_file(folder: Folder, name: str, tmp_path: Path) -> None:
    """Without its manifest a store is what a crash left behind: it is filled anew. Without pages it is damaged."""
    folder.file(name).rename(tmp_path / name)
    try:
        if name == "pages.bin":
            refused(folder)
        else:
            folder.check()
    finally:
        (tmp_path / name).replace(folder.file(name))


@pytest.mark.parametrize("left", [0, 1, 4095, 4096])
def test_a_file_that_is_cut_under_a_loaded_model(folder: Folder, left: int) -> None:
    with folder.loaded() as model:

        def ends_too_early() -> None:
            with pytest.raises((StoreCorrupt, ChecksumError)):
                folder.forward(model)

        cut(folder.file("pages.bin"), left, ends_too_early)
        pages(model).pager.settle()
        assert torch.equal(folder.forward(model), folder.result)  # and serves it again once it is whole
