from __future__ import annotations

import psutil
import pytest
import torch

from tuckaway.errors import PlanError
from tuckaway.plan import format_bytes, get_max_memory, parse_bytes
from tuckaway.plan import memory as module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10GB", 10**10),
        ("10gb", 10**10),
        ("1.5GiB", 3 * 2**29),
        ("500 MB", 5 * 10**8),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("12", 12),
        ("12B", 12),
        (0, 0),
        (7.9, 7),
    ],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "ten", "-1GB", -1, "1XB", None, True, float("inf"), [1]])
def test_parse_bytes_refuses(text):
    with pytest.raises(PlanError, match="is no size"):
        parse_bytes(text)


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 999, 1000, 1_210_000_000, 4 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "1.21 GB",
        "4.00 TB",
    ]


def test_budgets_are_ordered_and_read():
    assert list(get_max_memory({"disk": "1TB", "cpu": "1GB", 0: 5}).items()) == [
        (0, 5),
        ("cpu", 10**9),
        ("disk", 10**12),
    ]


def test_the_argument_is_not_changed():
    given = {"cpu": "1GB"}
    get_max_memory(given)
    assert given == {"cpu": "1GB"}


@pytest.mark.parametrize("device", ["gpu", "cuda:0", True, 1.5])
def test_unknown_devices(device):
    with pytest.raises(PlanError, match="is no device"):
        get_max_memory({device: 1})


def test_absent_accelerators_are_told(monkeypatch, caplog):
    monkeypatch.setattr(module, "accelerator_count", lambda: 1)
    get_max_memory({0: 1, 3: 1})
    assert "[3]" in caplog.text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_free_memory_without_accelerators():
    found = get_max_memory()
    assert list(found) == ["cpu"]
    assert 0 < found["cpu"] <= psutil.virtual_memory().total


def test_free_memory_of_accelerators(monkeypatch):
    monkeypatch.setattr(module, "accelerator_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda i: (100 + i, 1000))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda i: 50)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda i: 20)
    found = get_max_memory()
    assert (found[0], found[1]) == (130, 131)


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    files = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 50\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    assert module._free_ram() == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert module._free_ram() > 350
    (tmp_path / "memory.max").unlink()
    assert module._free_ram() > 350
