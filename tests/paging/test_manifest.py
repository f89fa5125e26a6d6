"""Every rule of a manifest, broken; and every byte of one, flipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuckaway.checkpoint.header import MAX_HEADER
from tuckaway.checkpoint.seal import INDEX_PLACEHOLDER, sealed_index
from tuckaway.errors import StoreCorrupt, StoreStale
from tuckaway.paging.manifest import Manifest, parse_manifest, read_manifest

WHERE = Path("folder/manifest.json")
PRINT = "0123456789abcdef" * 4
SOUND = Manifest(PRINT, 5 * 4096, (0, 4096, 4096), 4096, ((1,), (), (0, 2**32 - 1, 7, 8)))


def resealed(**change: Any) -> bytes:
    """A manifest with other content whose checksum is right; ``None`` takes a key away."""
    content = {**json.loads(SOUND.text()), **change, **INDEX_PLACEHOLDER}
    return sealed_index(
        json.dumps({key: value for key, value in content.items() if value is not None}).encode()
    )


@pytest.mark.parametrize("manifest", [SOUND, Manifest("once-" + PRINT, 0, (), 8 * 2**20, ())])
def test_what_is_written_is_read(manifest):
    assert parse_manifest(manifest.text(), WHERE) == manifest


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -1}',
        b'{"a": 1.0}',
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": 1, "a": 1}',
        SOUND.text() + b"{}",
        SOUND.text()[:-1] + b', "version": 3}',
    ],
    ids=range(17),
)
def test_what_is_no_strict_json_is_corrupt(text):
    with pytest.raises(StoreCorrupt) as caught:
        parse_manifest(text, WHERE)
    assert str(WHERE) in str(caught.value.where)
    assert ("remove the offload folder" in str(caught.value.hint)) == (b"tuckaway" in text)


@pytest.mark.parametrize(
    "change",
    [
        {"version": None},
        {"version": "3"},
        {"version": True},
        {"fingerprint": None},
        {"fingerprint": 3},
        {"fingerprint": PRINT.upper()},
        {"fingerprint": PRINT + "\n"},
        {"more": 1},
        {"checksum": "md5"},
        {"checksum": []},
        {"nbytes": 5 * 4096 + 1},
        {"nbytes": 2**63},
        {"nbytes": "x"},
        {"nbytes": [1]},
        {"nbytes": True},
        {"nbytes": 4096},
        {"cell": 0},
        {"cell": 100},
        {"cell": 2 * 4096},
        {"cell": {}},
        {"starts": {}},
        {"starts": []},
        {"starts": [0, 4096]},
        {"starts": [4096, 4096, 4096]},
        {"starts": [0, 8192, 4096]},
        {"starts": [0, 4096, 4097]},
        {"starts": [0, 4096, False]},
        {"checksums": {}},
        {"checksums": [[1], []]},
        {"checksums": [[1], [], 4]},
        {"checksums": [[1], [], [1, 2, 3]]},
        {"checksums": [[1], [2], [1, 2, 3, 4]]},
        {"checksums": [[1], [], [1, 2, 3, 2**32]]},
        {"checksums": [[1], [], [1, 2, 3, "4"]]},
        {"checksums": [[1], [], [1, 2, 3, True]]},
    ],
    ids=str,
)
def test_what_cannot_be_is_corrupt_though_its_checksum_is_right(change):
    with pytest.raises(StoreCorrupt, match="manifest") as caught:
        parse_manifest(resealed(**change), WHERE)
    assert caught.value.where == str(WHERE)
    assert "remove the offload folder" in str(caught.value.hint)


@pytest.mark.parametrize("version", [0, 1, 2, 4, 2**60])
@pytest.mark.parametrize("sealed", [True, False])
def test_another_version_is_refused(version, sealed):
    text = resealed(version=version)
    if not sealed:
        content = json.loads(text)
        text = json.dumps({key: content[key] for key in content if key not in INDEX_PLACEHOLDER}).encode()
    with pytest.raises(StoreStale, match=f"in format {version} instead of 3"):
        parse_manifest(text, WHERE)


def test_a_manifest_without_its_checksum_is_corrupt():
    content = json.loads(SOUND.text())
    for keys in (["tuckaway.checksums"], ["tuckaway.crc32"], list(INDEX_PLACEHOLDER)):
        text = json.dumps({key: value for key, value in content.items() if key not in keys}).encode()
        with pytest.raises(StoreCorrupt, match="checksum"):
            parse_manifest(text, WHERE)


def test_somebody_elses_is_not_called_damaged():
    for text in (b"{}", b'{"name": "web app"}', resealed(about="pages"), resealed(about=None)):
        with pytest.raises(StoreStale, match="none of tuckaway's"):
            parse_manifest(text, WHERE)


def test_every_change_of_every_byte_and_every_truncation_is_noticed():
    sound = SOUND.text()
    for position in range(len(sound)):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << bit
            with pytest.raises(StoreCorrupt):
                parse_manifest(bytes(damaged), WHERE)
        with pytest.raises(StoreCorrupt):
            parse_manifest(sound[:position], WHERE)
    for behind in (b" ", b"\n", b"\0", b"}"):
        with pytest.raises(StoreCorrupt):
            parse_manifest(sound + behind, WHERE)


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    assert read_manifest(tmp_path) is None
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MAX_HEADER + 1)
    with pytest.raises(StoreCorrupt, match=f"more than the {MAX_HEADER} allowed"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(SOUND.text())
    assert read_manifest(tmp_path) == SOUND
