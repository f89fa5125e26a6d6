"""Every byte of a small offload folder changed, and every truncation of it.

What the bytes of a component, or the zeros between two, become is found by a checksum. Behind a page's last component
lies what no component is made of, up to a multiple of 4096: there a change must not change a bit of the result.

Each change is made in the file, which is then opened as a store and read as the first touch of a process reads it. A
sample of them is met by a whole model: loaded, and run.
"""

from __future__ import annotations

import os
import random
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
from tuckaway.paging.page import PageLayout
from tuckaway.paging.state import Paging, paging_of
from tuckaway.paging.store import Store

SIZE = {"layers": 2, "width": 8, "vocabulary": 16}
STEP = 61
"""A prime: it hits every place within the 256 bytes that components are aligned to."""


class Stored:
    """An offload folder that holds two pages of bytes, which differ from one another and from zero."""

    LAYOUTS = tuple(
        PageLayout([((name, ""), (size,), torch.uint8) for name, size in sizes.items()])
        for sizes in ({"a": 300, "b": 2, "c": 1025}, {"d": 4, "e": 700})
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        pick = random.Random(0)
        with self.opened() as store:
            for number, layout in enumerate(self.LAYOUTS):
                for item in layout.items:
                    data = bytes(pick.randrange(1, 256) for _ in range(item.nbytes))
                    store.write(number, item.offset, torch.frombuffer(bytearray(data), dtype=torch.uint8))
            store.commit()
        self.starts = (0, self.LAYOUTS[0].extent)
        self.bytes = self.read()

    @contextmanager
    def opened(self) -> Iterator[Store]:
        store = Store.open_or_create(self.path, self.LAYOUTS, "the weights")
        try:
            yield store
        finally:
            store.close()

    def read(self) -> list[bytes]:
        """Both pages, each in a reader of its own that has checked nothing yet."""
        return [self.read_page(number) for number in range(2)]

    def read_page(self, number: int) -> bytes:
        layout = self.LAYOUTS[number]
        out = torch.zeros(layout.nbytes, dtype=torch.uint8)
        with self.opened() as store:
            store.read(number, out)
        return out.numpy().tobytes()

    def covered(self, position: int) -> bool:
        """Whether a byte is one that a checksum covers."""
        number = self.page_at(position)
        return position - self.starts[number] < self.LAYOUTS[number].nbytes

    def page_at(self, position: int) -> int:
        return int(position >= self.starts[1])


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "store")


@pytest.mark.heavy
def test_every_byte_of_a_store(stored: Stored) -> None:
    path, found, harmless = stored.path / "pages.bin", 0, 0
    size = path.stat().st_size
    assert size == 2 * 4096

    def is_found() -> None:
        with pytest.raises(ChecksumError, match="changed on disk"):
            stored.read_page(stored.page_at(position))

    def does_nothing() -> None:
        number = stored.page_at(position)
        assert stored.read_page(number) == stored.bytes[number]

    for position in range(0, size, 1 if HEAVY else 17):
        covered = stored.covered(position)
        changed(path, position, is_found if covered else does_nothing)
        found, harmless = found + covered, harmless + (not covered)
    print(f"{found} changes of a store found, {harmless} behind the last component without effect")
    assert found > 100
    assert harmless > 100
    assert stored.read() == stored.bytes


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["pages.bin", "manifest.json"])
def test_every_truncation_of_a_store(stored: Stored, name: str) -> None:
    path = stored.path / name

    def is_refused() -> None:
        with pytest.raises(StoreCorrupt), stored.opened():
            pass

    size = path.stat().st_size
    for left in (*range(0, size, 1 if HEAVY else 17), size - 1, size + 1, size + 4096):
        cut(path, left, is_refused)
    assert stored.read() == stored.bytes


@pytest.mark.heavy
def test_every_byte_of_a_stores_manifest(stored: Stored) -> None:
    path = stored.path / "manifest.json"

    def is_refused() -> None:
        with pytest.raises(StoreCorrupt), stored.opened():
            pass

    for position in range(0, path.stat().st_size, 1 if HEAVY else 7):
        for bit in range(8):
            changed(path, position, is_refused, bit=bit)
    assert stored.read() == stored.bytes


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


def changed(path: Path, position: int, work: Callable[[], None], *, bit: int | None = None) -> None:
    """Flip one bit of a file's byte while ``work`` runs."""
    bit = position % 8 if bit is None else bit
    fd = os.open(path, os.O_RDWR)
    try:
        sound = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([sound[0] ^ 1 << bit]), position)
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
        # the end is put back, not all of it: many systems sync a file that was emptied, which takes 5 ms each time
        with path.open("r+b") as file:
            file.truncate(len(sound))
            file.seek(nbytes)
            file.write(sound[nbytes:])


def test_bytes_of_the_pages_under_a_model(folder: Folder) -> None:
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


def test_bytes_of_the_manifest_under_a_model(folder: Folder) -> None:
    path = folder.file("manifest.json")
    for position in range(0, path.stat().st_size, STEP):
        changed(path, position, lambda: refused(folder))


@pytest.mark.parametrize("name", ["pages.bin", "manifest.json"])
def test_truncations_under_a_model(folder: Folder, name: str) -> None:
    path = folder.file(name)
    size = path.stat().st_size
    for left in (*range(0, size, 7 * STEP), size - 1, size + 1, size + 4096):
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
