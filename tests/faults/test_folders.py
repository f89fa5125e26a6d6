"""Folders that may not be written to, and tensors whose names would be paths."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import tuckaway
from loading import net, refused
from tuckaway.errors import StoreError
from tuckaway.paging.page import PageLayout
from tuckaway.paging.store import Store

NOBODY = 65534


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away the right to write to a folder; root, who has every right, becomes somebody else meanwhile."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    gc.collect()  # what other tests left is finalized by who may remove its files
    gc.disable()
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        gc.enable()
        folder.chmod(0o755)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter, as those of ``tmp_path`` are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of folders are others there")
def test_a_folder_that_may_not_be_written_to(folder: Path) -> None:
    tuckaway.save_model(net(), folder)
    store = folder / "offload"
    for writes in (
        lambda path: tuckaway.save_model(net(1), path),
        lambda path: offload(path).close(),
    ):
        writes(folder / "warm")  # everything is imported: what somebody else may not read
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with read_only(folder):
        for path in (folder, folder / "new"):
            with pytest.raises(StoreError, match=r"ermission denied") as caught:
                tuckaway.save_model(net(1), path)
            assert isinstance(caught.value.__cause__, PermissionError)
        model = net(2)
        with refused(StoreError, "ermission denied", model):
            tuckaway.load_checkpoint_and_dispatch(model, folder, {"": "disk"}, offload_folder=store)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not store.exists()


def offload(path: Path) -> Store:
    """Write a store of tensors whose names lead everywhere, and return it."""
    layout = PageLayout(
        [((name, ""), (3,), torch.float32) for name in ("../out", "/etc/out", "a/b", "w", "W", "..", "C:\\x")]
    )
    store = Store.open_or_create(path, [layout], "model")
    for number, item in enumerate(layout.items):
        store.write(0, item.offset, torch.full((3,), float(number)))
    store.commit()
    return store


def test_names_of_tensors_are_never_paths(tmp_path: Path) -> None:
    store = offload(tmp_path / "offload")
    page = torch.empty(store.layouts[0].nbytes, dtype=torch.uint8)
    store.read(0, page)
    for number, item in enumerate(store.layouts[0].items):
        assert item.view(page).tolist() == [number] * 3
    store.close()
    assert os.listdir(tmp_path) == ["offload"]
    assert sorted(os.listdir(tmp_path / "offload")) == ["manifest.json", "pages.bin"]


def test_modules_whose_names_are_paths_and_differ_by_case(tmp_path: Path) -> None:
    def model() -> nn.Module:
        parts = nn.ModuleDict({"w": nn.Linear(2, 2), "W": nn.Linear(2, 2), "a/b": nn.Linear(2, 2)})
        return nn.Sequential(nn.Identity(), parts)

    source = model()
    tuckaway.save_model(source, tmp_path / "saved")
    paged = tuckaway.load_checkpoint_and_dispatch(
        model(), tmp_path / "saved", {"": "disk"}, offload_folder=tmp_path / "offload"
    )
    tuckaway.save_model(paged, tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["again", "offload", "saved"]
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
