from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

from tuckaway.errors import ChecksumError, StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreStale
from tuckaway.paging import store as module
from tuckaway.paging.manifest import read_manifest
from tuckaway.paging.page import EXTENT, PageLayout
from tuckaway.paging.store import Store

LAYOUTS = [
    PageLayout([(("a", ""), (100, 3), torch.float32), (("a", "scales"), (), torch.float16)]),
    PageLayout([]),
    PageLayout([(("b", ""), (EXTENT + 5,), torch.uint8), (("c", ""), (0, 4), torch.int64)]),
]


def values(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=generator) for layout in LAYOUTS
    ]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def fill(store: Store, pages: list[torch.Tensor]) -> None:
    for index, (layout, page) in enumerate(zip(store.layouts, pages, strict=True)):
        for item in layout.items:
            store.write(index, item.offset, item.view(page))


def check(store: Store, pages: list[torch.Tensor]) -> None:
    for index, (layout, page) in enumerate(zip(store.layouts, pages, strict=True)):
        out = torch.full((layout.nbytes + 3,), 77, dtype=torch.uint8)
        store.read(index, out)
        for item in layout.items:
            assert torch.equal(raw(item.view(out)), raw(item.view(page))), item
        assert out[layout.nbytes :].eq(77).all()


def committed(folder: Path, identity: str = "model") -> list[torch.Tensor]:
    store = Store.open_or_create(folder, LAYOUTS, identity)
    fill(store, values())
    store.commit()
    store.close()
    return values()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "offload"


def test_what_is_written_is_read(folder):
    store = Store.open_or_create(folder, LAYOUTS, "model")
    assert not store.reusable
    fill(store, values())
    store.commit()
    store.commit()
    assert store.reusable
    check(store, values())
    check(store, values())
    store.close()
    store.close()
    assert {p.name for p in folder.iterdir()} == {"pages.bin", "manifest.json"}
    assert (folder / "pages.bin").stat().st_size == store.nbytes == 3 * EXTENT


def test_a_committed_store_is_opened_again_as_it_is(folder):
    pages = committed(folder)
    before = (folder / "pages.bin").stat()
    store = Store.open_or_create(folder, LAYOUTS, "model")
    assert store.reusable
    check(store, pages)
    with pytest.raises(StoreError, match="cannot be written"):
        store.write(0, 0, torch.zeros(1))
    store.close()
    assert (folder / "pages.bin").stat() == before or (
        folder / "pages.bin"
    ).stat().st_mtime == before.st_mtime


def test_pieces_may_come_in_any_order(folder):
    pages = values()
    store = Store.open_or_create(folder, LAYOUTS, "model")
    for index, layout in enumerate(LAYOUTS):
        for item in reversed(layout.items):
            flat = pages[index][item.offset : item.offset + item.nbytes]
            middle = item.nbytes // 2
            store.write(index, item.offset + middle, flat[middle:])
            store.write(index, item.offset, flat[:middle])
    store.commit()
    check(store, pages)
    store.close()


def test_strided_and_typed_tensors_are_written_in_order(folder):
    store = Store.open_or_create(folder, LAYOUTS, "model")
    value = torch.arange(300, dtype=torch.float32).view(3, 100)
    fill(store, values())
    store.write(0, 0, value.t())
    item = LAYOUTS[0].items[0]
    assert torch.equal(store.read_item(0, item), value.t())
    store.abort()


def test_one_component_is_read_and_checked_alone(folder):
    pages = committed(folder)
    store = Store.open_or_create(folder, LAYOUTS, "model")
    for index, layout in enumerate(LAYOUTS):
        for item in layout.items:
            got = store.read_item(index, item)
            assert (got.shape, got.dtype) == (item.shape, item.dtype)
            assert torch.equal(raw(got), raw(item.view(pages[index])))
    store.close()


def test_writes_outside_a_component_are_refused(folder):
    store = Store.open_or_create(folder, LAYOUTS, "model")
    for offset, size in ((1199, 2), (1200, 1), (2000, 1)):
        with pytest.raises(ValueError, match="no component"):
            store.write(0, offset, torch.zeros(size, dtype=torch.uint8))
    store.abort()
    assert not folder.exists()


def test_an_incomplete_store_is_not_committed(folder):
    store = Store.open_or_create(folder, LAYOUTS, "model")
    store.write(0, 0, torch.zeros(100, 3))
    with pytest.raises(StoreError, match="'a' was not written: 0 of 2 bytes"):
        store.commit()
    store.close()
    again = Store.open_or_create(folder, LAYOUTS, "model")  # what a crash leaves is written anew
    assert not again.reusable
    again.abort()


@pytest.mark.parametrize("other", ["another model", "layouts"])
def test_a_store_of_another_model_is_left_alone(folder, other):
    committed(folder)
    layouts = LAYOUTS[:2] if other == "layouts" else LAYOUTS
    before = (folder / "pages.bin").read_bytes()
    with pytest.raises(StoreStale, match="another model"):
        Store.open_or_create(folder, layouts, "model" if other == "layouts" else other)
    assert (folder / "pages.bin").read_bytes() == before
    Store.open_or_create(folder, LAYOUTS, "model").close()


def test_a_store_without_identity_is_used_once(folder):
    committed(folder, "")
    store = Store.open_or_create(folder, LAYOUTS, "")
    assert not store.reusable
    fill(store, values(1))
    store.commit()
    store.close()
    Store.open_or_create(folder, LAYOUTS, "model").abort()


@pytest.mark.parametrize("name", ["index.json", "h.0.weight.dat"])
def test_accelerates_folders_are_refused(folder, name):
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    with pytest.raises(StoreStale, match="accelerate"):
        Store.open_or_create(folder, LAYOUTS, "model")
    assert [p.name for p in folder.iterdir()] == [name]


def test_a_foreign_manifest_is_refused(folder):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(StoreStale, match="none of tuckaway's"):
        Store.open_or_create(folder, LAYOUTS, "model")


def test_other_files_in_the_folder_stay(folder):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    committed(folder)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xff"])
def test_an_unreadable_manifest_is_an_error(folder, damage):
    committed(folder)
    (folder / "manifest.json").write_bytes(damage)
    with pytest.raises((StoreCorrupt, StoreStale), match="manifest"):
        Store.open_or_create(folder, LAYOUTS, "model")


@pytest.mark.parametrize(
    "change",
    [{"nbytes": 4 * EXTENT}, {"starts": (0, 0, EXTENT), "cell": 2 * EXTENT, "checksums": ((), (1,), (2,))}],
)
def test_a_manifest_of_other_pages_is_an_error(folder, change):
    committed(folder)
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, **change).text())
    with pytest.raises(StoreCorrupt, match="manifest describes other pages"):
        Store.open_or_create(folder, LAYOUTS, "model")


@pytest.mark.parametrize("name", ["manifest.json", "pages.bin"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_a_files_place_is_an_error_at_once(folder, name):
    committed(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(StoreCorrupt, match="not a regular file"):
        Store.open_or_create(folder, LAYOUTS, "model")


def test_a_manifest_of_another_version_is_refused_and_stays(folder):
    committed(folder)
    old = json.dumps({"about": "tuckaway pages", "version": 2, "fingerprint": "once-" + "0" * 64})
    (folder / "manifest.json").write_text(old)
    with pytest.raises(StoreStale, match="in format 2 instead of 3"):
        Store.open_or_create(folder, LAYOUTS, "model")
    assert (folder / "manifest.json").read_text() == old
    assert (folder / "pages.bin").stat().st_size == 3 * EXTENT


def test_a_short_or_missing_file_is_found_on_opening(folder):
    committed(folder)
    os.truncate(folder / "pages.bin", 3 * EXTENT - 1)
    with pytest.raises(StoreCorrupt, match="12287 bytes instead of 12288"):
        Store.open_or_create(folder, LAYOUTS, "model")
    (folder / "pages.bin").unlink()
    with pytest.raises(StoreCorrupt, match="cannot open"):
        Store.open_or_create(folder, LAYOUTS, "model")


def test_a_file_cut_while_open_is_found_on_reading(folder):
    committed(folder)
    store = Store.open_or_create(folder, LAYOUTS, "model")
    os.truncate(folder / "pages.bin", EXTENT + 10)
    with pytest.raises(StoreCorrupt, match="ends too early"):
        store.read(2, torch.zeros(2 * EXTENT, dtype=torch.uint8))
    store.close()


@pytest.mark.parametrize(("index", "byte"), [(0, 0), (0, 1199), (0, 1280), (2, EXTENT), (2, 2 * EXTENT + 4)])
def test_a_flipped_bit_is_found_at_the_first_read(folder, index, byte):
    committed(folder)
    flip(folder / "pages.bin", byte)
    store = Store.open_or_create(folder, LAYOUTS, "model")
    other = 2 - index
    store.read(other, torch.zeros(LAYOUTS[other].nbytes, dtype=torch.uint8))
    for _ in range(2):
        with pytest.raises(ChecksumError, match="changed on disk"):
            store.read(index, torch.zeros(LAYOUTS[index].nbytes, dtype=torch.uint8))
    store.close()


def test_a_file_changed_while_open_is_checked_again(folder):
    pages = committed(folder)
    store = Store.open_or_create(folder, LAYOUTS, "model")
    check(store, pages)
    flip(folder / "pages.bin", 3)
    with pytest.raises(ChecksumError, match="'a'"):
        check(store, pages)
    store.close()


def test_a_file_replaced_while_open_does_not_matter(folder):
    pages = committed(folder)
    store = Store.open_or_create(folder, LAYOUTS, "model")
    (folder / "new").write_bytes(bytes(3 * EXTENT))
    os.replace(folder / "new", folder / "pages.bin")
    check(store, pages)
    store.close()
    again = Store.open_or_create(folder, LAYOUTS, "model")
    with pytest.raises(ChecksumError):
        check(again, pages)
    again.close()


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0] ^ 4
        file.seek(byte)
        file.write(bytes([value]))


def test_large_pages_are_read_in_pieces_by_threads(folder, monkeypatch):
    monkeypatch.setattr(module, "CELL", EXTENT)
    layouts = [PageLayout([(("w", ""), (12_345,), torch.uint8)])]
    page = torch.randint(0, 256, (12_345,), dtype=torch.uint8)
    store = Store.open_or_create(folder, layouts, "model")
    store.write(0, 0, page)
    store.commit()
    out = torch.zeros(layouts[0].nbytes, dtype=torch.uint8)
    store.read(0, out)
    assert torch.equal(out[:12_345], page)
    os.truncate(folder / "pages.bin", 12_000)
    with pytest.raises(StoreCorrupt, match="ends too early"):
        store.read(0, out)
    store.close()


def test_short_reads_are_continued(folder, monkeypatch):
    pages = committed(folder)
    store = Store.open_or_create(folder, LAYOUTS, "model")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:7]], at))
    check(store, pages)
    store.close()


def test_a_failing_disk_is_a_store_error(folder, monkeypatch):
    committed(folder)
    store = Store.open_or_create(folder, LAYOUTS, "model")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        store.read(0, torch.zeros(2048, dtype=torch.uint8))
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.read(0, torch.zeros(2048, dtype=torch.uint8))


def in_another_process(folder: Path, identity: str, then: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
        import sys; sys.path[:0] = {[str(Path(__file__).parents[2] / p) for p in ("src", "kernels")]!r}
        import torch
        from tuckaway.paging.page import EXTENT, PageLayout
        from tuckaway.paging.store import Store
        layouts = [
            PageLayout([(("a", ""), (100, 3), torch.float32), (("a", "scales"), (), torch.float16)]),
            PageLayout([]),
            PageLayout([(("b", ""), (EXTENT + 5,), torch.uint8), (("c", ""), (0, 4), torch.int64)]),
        ]
        try:
            store = Store.open_or_create({str(folder)!r}, layouts, {identity!r})
            print("reusable" if store.reusable else "new")
            {then}
        except Exception as error:
            print(type(error).__name__)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_folder_that_is_written_to_is_busy(folder):
    store = Store.open_or_create(folder, LAYOUTS, "model")
    with pytest.raises(StoreBusy, match="another process"):
        Store.open_or_create(folder, LAYOUTS, "model")
    done = in_another_process(folder, "model")
    assert done.stdout.strip() == "StoreBusy", done.stderr
    fill(store, values())
    store.commit()
    check(store, values())
    store.close()


def test_a_committed_store_is_shared(folder):
    pages = committed(folder)
    first = Store.open_or_create(folder, LAYOUTS, "model")
    second = Store.open_or_create(folder, LAYOUTS, "model")
    check(first, pages)
    first.close()
    check(second, pages)
    with pytest.raises(StoreBusy, match="other weights"):
        Store.open_or_create(folder, LAYOUTS, "another model")
    second.close()


def test_what_a_killed_process_leaves_is_written_anew(folder):
    done = in_another_process(
        folder, "model", "store.write(0, 0, torch.ones(100, 3)); import os; os._exit(9)"
    )
    assert done.returncode == 9
    assert (folder / "pages.bin").exists()
    store = Store.open_or_create(folder, LAYOUTS, "model")
    assert not store.reusable
    fill(store, values())
    store.commit()
    check(store, values())
    store.close()


def test_a_full_disk_is_told_before_anything_is_written(folder, monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreFull, match="No space left"):
        Store.open_or_create(folder, LAYOUTS, "model")
    assert not folder.exists()


def test_a_full_file_system_is_told(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    ) if os.name == "posix" else None  # fmt: skip
    if done is None or done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        with pytest.raises(StoreFull):
            Store.open_or_create(mount / "x", [PageLayout([(("w", ""), (2**21,), torch.uint8)])], "model")
        assert not (mount / "x" / "pages.bin").exists()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="folder"):
        Store.open_or_create(tmp_path / "file" / "x", LAYOUTS, "model")


def test_a_store_that_is_dropped_gives_the_folder_back():
    with tempfile.TemporaryDirectory() as folder:
        committed(Path(folder))
        store = Store.open_or_create(folder, LAYOUTS, "model")
        del store
        with pytest.raises(StoreStale):
            Store.open_or_create(folder, LAYOUTS, "another")
