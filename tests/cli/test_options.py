"""What the options of several commands take, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuckaway.cli.options import parse_device_map, parse_max_memory
from tuckaway.errors import ConfigError, PlanError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu=40MB", {"cpu": 40_000_000}),
        ("0=1GiB, cpu=1.5GB", {0: 2**30, "cpu": 1_500_000_000}),
        ("1=5", {1: 5}),
    ],
)
def test_max_memory_as_written(text: str, expected: dict[int | str, int]) -> None:
    assert parse_max_memory(text) == expected


@pytest.mark.parametrize("text", ["", "40MB", "cpu=", "gpu=1GB", "cpu=1GB,", "-1=1GB"])
def test_max_memory_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="DEVICE=SIZE"):
        parse_max_memory(text)


def test_size_that_is_none() -> None:
    with pytest.raises(PlanError, match="no size"):
        parse_max_memory("cpu=many")


@pytest.mark.parametrize("name", ["auto", "balanced", "balanced_low_0", "sequential", "cpu"])
def test_strategies_stay_names(name: str) -> None:
    assert parse_device_map(name).value == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disk", {"": "disk"}),
        ("model.embed_tokens=0, model.layers=cpu", {"model.embed_tokens": 0, "model.layers": "cpu"}),
        ("=cpu", {"": "cpu"}),
        ('{"a": 0, "b": "disk"}', {"a": 0, "b": "disk"}),
    ],
)
def test_device_map_as_written(text: str, expected: dict[str, int | str]) -> None:
    assert parse_device_map(text).value == expected


def test_device_map_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu", "head": 0}))
    assert parse_device_map(str(path)).value == {"": "cpu", "head": 0}


@pytest.mark.parametrize("text", ["evenly", '{"a"', '{"a": [0]}', "[]"])
def test_device_map_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="device map"):
        parse_device_map(text)
