"""A conversion that is killed leaves nothing under the destination's name; the next ends where it would have."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import tuckaway
from heavy import count
from kills import victims
from loading import net
from tuckaway.convert.staging import MANIFEST

KILLS = count(10, 200)
SHARD = 15_000

JOB = """
source, target, size = words
began()
tuckaway.quantize_checkpoint(source, target, "nf4", max_shard_size=int(size))
ended()
signal.pause()  # to be killed all the same: its number must be no other's
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_every_kill_is_followed_by_the_undisturbed_result(tmp_path):
    source, log = tmp_path / "source", tmp_path / "log"
    tuckaway.save_model(net(layers=8), source, max_shard_size=200_000)
    (source / "tokenizer.json").write_text("{}")
    tuckaway.quantize_checkpoint(source, tmp_path / "first", "nf4", max_shard_size=SHARD)
    began = time.perf_counter()
    tuckaway.quantize_checkpoint(source, tmp_path / "undisturbed", "nf4", max_shard_size=SHARD)
    span = 1.2 * (time.perf_counter() - began)
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) > 6
    inside = resumed = 0
    with victims("import tuckaway", JOB, log) as hit:
        for number in range(KILLS):
            target = tmp_path / "work" / f"{number}"
            found = hit(span, source, target, SHARD)
            assert found.status == -signal.SIGKILL
            inside += found.inside
            span *= 1.05 if found.inside else 0.7  # nine in ten inside, on a busy machine too
            assert not target.exists() or contents(target) == expected
            done = tuckaway.quantize_checkpoint(source, target, "nf4", max_shard_size=SHARD)
            resumed += 0 < done.kept_shards < len(done.files)
            assert contents(target) == expected
            assert [path.name for path in target.parent.iterdir()] == [target.name]
            for path in [*target.iterdir()]:
                path.unlink()
            target.rmdir()
    print(f"{KILLS} kills, {inside} inside a conversion, {resumed} resumed behind finished shards")
    assert inside >= KILLS / 2  # or the kills show nothing
    assert resumed >= KILLS / 10  # and not all before the first shard


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Convert, and fail when the given number of shards is finished; return the folder they wait in."""
    from tuckaway.convert import convert

    write, count = convert._Job._write, iter(range(100))

    def fail(*arguments: object) -> object:
        if next(count) == after:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert._Job, "_write", fail)
        with pytest.raises(KeyboardInterrupt):
            tuckaway.quantize_checkpoint(source, target, "nf4", max_shard_size=SHARD)
    return target.with_name(f".{target.name}.converting")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tuckaway.save_model(net(), tmp_path / "source")
    return tmp_path / "source"


def test_finished_shards_are_kept(source, tmp_path, monkeypatch):
    folder = interrupted(source, tmp_path / "out", monkeypatch, 2)
    assert not (tmp_path / "out").exists()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(times) == 2
    done = tuckaway.quantize_checkpoint(source, tmp_path / "out", "nf4", max_shard_size=SHARD)
    assert done.kept_shards == 2
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}
    assert not folder.exists()


def test_a_damaged_shard_is_made_again(source, tmp_path, monkeypatch, caplog):
    folder = interrupted(source, tmp_path / "out", monkeypatch, 3)
    first, second, third = sorted(folder.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    done = tuckaway.quantize_checkpoint(source, tmp_path / "out", "nf4", max_shard_size=SHARD)
    assert done.kept_shards == 0
    assert "the bytes of 'embed.weight' changed on disk" in caplog.text
    tuckaway.quantize_checkpoint(source, tmp_path / "expected", "nf4", max_shard_size=SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("change", ["source", "config", "manifest", "manifest's shards"])
def test_shards_of_something_else_are_not_used(source, tmp_path, monkeypatch, change):
    folder = interrupted(source, tmp_path / "out", monkeypatch, 2)
    config = "nf4"
    if change == "source":
        tuckaway.save_model(net(seed=1), source)
    elif change == "config":
        config = "fp4"
    elif change == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        text = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(text.replace('"nbytes"', '"n"'))
    done = tuckaway.quantize_checkpoint(source, tmp_path / "out", config, max_shard_size=SHARD)
    assert done.kept_shards == 0
    tuckaway.quantize_checkpoint(source, tmp_path / "expected", config, max_shard_size=SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_an_error_before_the_first_shard_leaves_no_folder(source, tmp_path, monkeypatch):
    folder = interrupted(source, tmp_path / "out", monkeypatch, 0)
    assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
