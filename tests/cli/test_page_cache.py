"""The page cache as the kernel tells it, on real files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tuckaway.cli.page_cache import cached_share, evict
from tuckaway.errors import ConfigError

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@linux
def test_a_file_just_read_is_cached_and_one_evicted_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(os.urandom(4 * 2**20 + 5))
        os.fsync(file.fileno())
    path.read_bytes()
    assert cached_share([path]) == 1.0
    evict([path])
    assert cached_share([path]) in (0.0, 1.0)  # 1.0 on a file system in memory, which cannot drop
    path.read_bytes()
    assert cached_share([path]) == 1.0


def test_nothing_has_no_share(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_share([]) is None
    assert cached_share([tmp_path / "empty"]) is None


def test_system_that_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(ConfigError, match="--cold"):
        evict([tmp_path])
