from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tuckaway.checkpoint import Checkpoint, Request, read_header, stream
from tuckaway.errors import CheckpointError, CheckpointNotFound, TruncatedError

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def tensors() -> dict[str, torch.Tensor]:
    """Odd sizes of one-byte dtypes, so that what lies behind them is aligned to nothing."""
    made = {f"u8.{n}": torch.arange(n, dtype=torch.uint8) for n in (1, 3, 64, 65, 1000)}
    made |= {f"f32.{n}": torch.randn(n, 3) for n in (1, 2, 100)}
    made |= {f"bf16.{n}": torch.randn(n).bfloat16() for n in (1, 7)}
    made |= {"flags": torch.tensor([True, False, True]), "f64": torch.randn(5, dtype=torch.float64)}
    made |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "i64": torch.arange(9)}
    return made


@pytest.fixture
def checkpoint(tmp_path):
    """Two shards, in the second one of which the tensors lie in no aligned order."""
    every = tensors()
    names = list(every)
    save_file({name: every[name] for name in names[::2]}, tmp_path / "1.safetensors")
    write_unaligned({name: every[name] for name in names[1::2]}, tmp_path / "2.safetensors")
    weight_map = {name: f"{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {weight_map}}}'.replace("'", '"')
    )
    return Checkpoint.open(tmp_path)


def write_unaligned(state: dict[str, torch.Tensor], path: Path) -> None:
    from tuckaway.checkpoint import CheckpointWriter

    folder = path.parent / "writing"
    with CheckpointWriter(folder) as writer:
        writer.plan([(name, tensor.dtype, tensor.shape) for name, tensor in state.items()])
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.commit()[0].rename(path)
    folder.rmdir()


def collect(pieces) -> dict[str, torch.Tensor]:
    """Put pieces together, checking that they follow one another."""
    parts: dict[str, list[torch.Tensor]] = {}
    entries, finished = {}, set()
    for piece in pieces:
        entry = piece.entry
        got = parts.setdefault(entry.name, [])
        assert entry.name not in finished
        assert piece.start == sum(part.numel() for part in got)
        assert piece.tensor.dtype == entry.dtype
        assert piece.tensor.dim() == 1
        assert piece.tensor.is_contiguous()
        got.append(piece.tensor.clone())
        entries[entry.name] = entry
        if piece.last:
            finished.add(entry.name)
    assert finished == parts.keys()
    return {name: torch.cat(got).reshape(entries[name].shape) for name, got in parts.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def expected(checkpoint):
    return load_file(checkpoint.files[0]) | load_file(checkpoint.files[1])


@pytest.mark.parametrize("piece_bytes", [1, 3, 64, 100, 1000, 4096, 1 << 24])
def test_pieces_make_the_tensors_that_safetensors_reads(checkpoint, expected, piece_bytes):
    assert_same(collect(checkpoint.stream(piece_bytes=piece_bytes)), expected)
    for piece in checkpoint.stream(piece_bytes=piece_bytes):
        assert piece.tensor.nbytes <= max(piece_bytes, piece.tensor.dtype.itemsize)


def test_reading_one_by_one(checkpoint, expected):
    assert_same({name: checkpoint.read(name) for name in expected}, expected)


@pytest.mark.parametrize("align", [1, 2, 64, 4096])
@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
def test_pieces_start_and_end_where_they_may(checkpoint, expected, align, piece_bytes):
    requests = [Request(entry, align) for entry in checkpoint.entries.values()]
    pieces = []
    for piece in stream(requests, piece_bytes=piece_bytes):
        assert piece.start % align == 0
        assert piece.last or len(piece.tensor) % align == 0
        assert piece.tensor.nbytes <= max(piece_bytes, align * piece.tensor.dtype.itemsize)
        pieces.append(piece.entry.name)
    assert set(pieces) == expected.keys()
    assert_same(collect(stream(requests, piece_bytes=piece_bytes)), expected)


def test_whole_tensors_come_in_one_piece(checkpoint, expected):
    requests = [Request(entry, whole=len(entry.name) % 2 == 0) for entry in checkpoint.entries.values()]
    for piece in stream(requests, piece_bytes=10):
        if len(piece.entry.name) % 2 == 0:
            assert (piece.start, piece.last, piece.tensor.numel()) == (0, True, piece.entry.numel)
    assert_same(collect(stream(requests, piece_bytes=10)), expected)


def test_files_are_read_in_their_order_whatever_is_asked(checkpoint):
    requests = [Request(entry) for entry in checkpoint.entries.values()]
    order = [(p.entry.path, p.entry.offset, p.start) for p in stream(requests[::-1], piece_bytes=50)]
    assert order == sorted(order)
    assert order == [(p.entry.path, p.entry.offset, p.start) for p in stream(requests, piece_bytes=50)]


def test_some_tensors_only_and_one_twice(checkpoint, expected):
    some = ["f32.2", "u8.1000", "empty"]
    assert_same(collect(checkpoint.stream(some)), {name: expected[name] for name in some})
    entry = checkpoint.entries["i64"]
    assert [p.tensor.tolist() for p in stream([Request(entry), Request(entry)])] == [list(range(9))] * 2
    assert list(stream([])) == []


def test_pieces_stay_valid_until_the_next_is_asked_for(checkpoint, expected):
    for piece in checkpoint.stream(piece_bytes=100):
        before = piece.tensor.clone()
        threading.Event().wait(0.002)  # the next read is done by then
        assert torch.equal(piece.tensor, before)
        flat = expected[piece.entry.name].reshape(-1)
        assert torch.equal(piece.tensor, flat[piece.start : piece.start + len(before)])


def test_a_default_device_is_of_no_concern(checkpoint, expected):
    with torch.device("meta"):
        found = collect(checkpoint.stream(piece_bytes=64))
        single = checkpoint.read("i64")
    assert_same(found, expected)
    assert not single.is_meta


def test_arguments_are_checked_at_once(checkpoint):
    with pytest.raises(ValueError, match="piece_bytes"):
        stream([], piece_bytes=0)
    with pytest.raises(ValueError, match=r"align .*'i64'"):
        stream([Request(checkpoint.entries["i64"], align=0)])


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_left():
    gc.collect()
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    yield
    gc.collect()
    assert (process.num_fds(), threading.active_count()) == before


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("after", [0, 1, 2, 7])
def test_closing_early_ends_the_thread_and_closes_the_file(checkpoint, after):
    pieces = checkpoint.stream(piece_bytes=64)
    for _ in range(after):
        next(pieces)
    pieces.close()


@pytest.mark.usefixtures("nothing_left")
def test_an_error_of_the_caller_ends_the_thread(checkpoint):
    def use():
        for piece in checkpoint.stream(piece_bytes=64):
            raise KeyboardInterrupt(piece.entry.name)

    with pytest.raises(KeyboardInterrupt):
        use()


def test_short_reads_are_continued(checkpoint, expected, monkeypatch):
    preadv = os.preadv

    def short(fd, views, offset):
        got = 0
        for view in views:
            got += preadv(fd, [view[: 7 - got]], offset + got) if got < 7 else 0
            if got >= 7:
                break
        return got

    monkeypatch.setattr(os, "preadv", short)
    assert_same(collect(checkpoint.stream(piece_bytes=300)), expected)


def test_where_there_is_no_preadv(checkpoint, expected, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "readv")
    assert_same(collect(checkpoint.stream(piece_bytes=300)), expected)


@pytest.mark.usefixtures("nothing_left")
def test_a_read_that_fails_surfaces_at_the_caller(checkpoint, expected, monkeypatch):
    preadv, count, fail_at = os.preadv, 0, 0

    def failing(fd, views, offset):
        nonlocal count
        count += 1
        if count == fail_at:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    list(checkpoint.stream(piece_bytes=200))
    for fail_at in range(1, count + 1):  # noqa: B007  (the failing call reads it)
        count = 0
        with pytest.raises(CheckpointError, match=r"cannot read '.*': Input/output error .*, byte \d+"):
            list(checkpoint.stream(piece_bytes=200))
    assert fail_at > 10
    count = -100
    assert_same(collect(checkpoint.stream(piece_bytes=200)), expected)


@pytest.mark.usefixtures("nothing_left")
def test_a_file_cut_after_opening(checkpoint):
    path = checkpoint.files[1]
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(TruncatedError, match=rf"{size} bytes expected, {size - 1} found"):
        list(checkpoint.stream())
    with pytest.raises(TruncatedError):
        checkpoint.read("u8.3")


@pytest.mark.usefixtures("nothing_left")
def test_a_file_cut_while_it_is_read(checkpoint):
    def use():
        for piece in checkpoint.stream(piece_bytes=16):
            if piece.entry.path == checkpoint.files[1]:
                os.truncate(piece.entry.path, piece.entry.offset + 1)

    with pytest.raises(TruncatedError, match=r"the file ends inside '.*': \d+ bytes expected, \d+ found"):
        use()


@pytest.mark.usefixtures("nothing_left")
def test_a_file_replaced_or_rewritten_after_opening(checkpoint):
    path = checkpoint.files[0]
    content = path.read_bytes()
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)
    with pytest.raises(CheckpointError, match="changed after the checkpoint was opened"):
        list(checkpoint.stream())
    checkpoint = Checkpoint.open(checkpoint.directory)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="open the checkpoint again"):
        checkpoint.read("u8.1")
    path.unlink()
    with pytest.raises(CheckpointNotFound):
        list(checkpoint.stream())


def test_a_file_written_to_while_it_is_read_is_found_at_its_end(checkpoint):
    def use():
        for piece in checkpoint.stream(piece_bytes=16):
            os.utime(piece.entry.path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed"):
        use()


MEASURE = """
import re, sys, torch
from tuckaway.checkpoint import Checkpoint

def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(kib) for kib in re.findall(r"Private_\\w+: +(\\d+) kB", file.read())) * 1024

checkpoint = Checkpoint.open(sys.argv[1])
list(checkpoint.stream(["small"]))
before, most, mapped = private(), 0, False
for piece in checkpoint.stream(piece_bytes=4 * 2**20):
    most = max(most, private() - before)
    mapped |= "model.safetensors" in open("/proc/self/maps").read()
print(most, mapped)
"""


@LINUX
def test_memory_in_use_is_a_few_pieces_and_nothing_is_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"big": torch.zeros(96 * 2**20, dtype=torch.uint8), "small": torch.zeros(10)}, path)
    shown = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True
    ).stdout
    most, mapped = shown.split()
    assert mapped == "False"
    assert int(most) < 12 * 2**20  # two pieces of 4 MiB, and a thread's stack


def test_gaps_are_read_over_and_pieces_filled(tmp_path, monkeypatch):
    mib = 2**20
    tensors = {f"{n}": torch.arange(7 * mib // 4, dtype=torch.int32) + n for n in range(3)}
    tensors |= {f"{n}.small": torch.full((100,), n, dtype=torch.uint8) for n in range(3)}
    tensors["far"] = torch.zeros(100_000, dtype=torch.uint8)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    entries = read_header(path).entries
    wanted = ["0", "1", "2", "0.small", "2.small"]  # what lies between is not asked for
    reads = []
    preadv = os.preadv

    def noted(fd, views, offset):
        reads.append(sum(map(len, views)))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", noted)
    requests = [Request(entries[name], align=1000) for name in wanted]
    found = {name: [] for name in wanted}
    for piece in stream(requests, piece_bytes=12 * mib):
        assert piece.start % 1000 == 0
        assert piece.tensor.nbytes <= 12 * mib
        found[piece.entry.name].append(piece.tensor.clone())
    assert all(torch.equal(torch.cat(pieces), tensors[name]) for name, pieces in found.items())
    assert len(reads) == 2  # 21 MiB and the small ones, in pieces of 12
