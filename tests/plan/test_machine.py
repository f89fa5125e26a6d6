from __future__ import annotations

import pytest

from tuckaway.plan.machine import Speeds, cache_folder, device_name, known_speeds, remember_speeds


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TUCKAWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_nothing_is_known_before_it_was_measured():
    assert known_speeds() is None


def test_what_was_measured_is_known_for_this_device(folder):
    here, other = Speeds(device_name(), disk=1e9), Speeds("some other", disk=2e9)
    assert remember_speeds(here).parent == folder == cache_folder()
    remember_speeds(other)
    assert known_speeds() == here
    remember_speeds(Speeds(device_name(), disk=3e9))
    assert known_speeds().disk == 3e9


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2, "speeds": {}}', '{"version": 1, "speeds": 3}', "\xff"]
)
def test_a_file_that_makes_no_sense_is_as_good_as_none(folder, content):
    folder.mkdir()
    (folder / "speeds.json").write_text(content, encoding="latin-1")
    assert known_speeds() is None
    remember_speeds(Speeds(device_name(), bus=1.0))
    assert known_speeds().bus == 1.0


def test_fields_of_a_later_version_are_passed_over():
    assert Speeds.from_dict({"device": "x", "bus": 2.0, "warp": 9}) == Speeds("x", bus=2.0)
