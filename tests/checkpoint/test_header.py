from __future__ import annotations

import contextlib
import json
import os
import random
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tuckaway.checkpoint.entry import FileIdentity
from tuckaway.checkpoint.header import DTYPES, MAX_HEADER, header_length, parse_header, read_header
from tuckaway.errors import (
    CheckpointError,
    CheckpointNotFound,
    ChecksumError,
    HeaderError,
    TruncatedError,
    UnsafePathError,
)


def build(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def read(tmp_path):
    def read(content: bytes):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return read_header(path)

    return read


def test_a_file_of_safetensors_is_read_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "m.safetensors"
    dtypes = [d for d in DTYPES.values() if d not in (torch.float8_e8m0fnu,)]
    tensors = {f"t{i}": torch.zeros(i % 3, i % 4 + 1, 2, dtype=d) for i, d in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.empty(0), "é\n": torch.ones(3, dtype=torch.bool)}
    save_file(tensors, path, metadata={"format": "pt", "é": "\u2603"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "é": "\u2603"}
    assert header.entries.keys() == tensors.keys()
    data = path.read_bytes()
    for name, entry in header.entries.items():
        assert (entry.name, entry.path, entry.dtype) == (name, path, tensors[name].dtype)
        assert entry.shape == tuple(tensors[name].shape)
        assert entry.numel == tensors[name].numel()
        assert entry.nbytes == tensors[name].nbytes
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[entry.offset : entry.offset + entry.nbytes] == raw
    assert [e.offset for e in header.entries.values()] == sorted(e.offset for e in header.entries.values())


def test_every_dtype_of_the_format_that_torch_has(read):
    for name, dtype in DTYPES.items():
        header = read(build({"x": tensor(0, 3 * dtype.itemsize, [3], name)}, b"\0" * 3 * dtype.itemsize))
        assert header.entries["x"].dtype == dtype
    for dtype in ("F4", "F6_E2M3", "f32", "", "Q8", 5, None, ["F32"], {}):
        with pytest.raises(HeaderError, match="unknown dtype"):
            read(build({"x": tensor(0, 1, [1], dtype)}, b"\0"))


def test_an_empty_file_of_tensors(read):
    assert read(build({})).entries == {}
    assert read(build({"__metadata__": {}})).metadata == {}
    assert read(build(b"{}      ")).entries == {}


VALID = {
    "__metadata__": {"a": "b"},
    "a": tensor(0, 4, [1], "F32"),
    "b": tensor(4, 10),
    "z": tensor(4, 4, [0, 7]),
}


BROKEN = [
    pytest.param(b"[]", "does not start", id="list"),
    pytest.param(b" {}", "does not start", id="space first"),
    pytest.param(b"\xef\xbb\xbf{}", "does not start", id="byte order mark"),
    pytest.param(b"", "does not start", id="nothing"),
    pytest.param(b"{", "byte 9", id="unfinished"),
    pytest.param(b"{} x", "byte 11", id="extra data"),
    pytest.param(b'{"\xff":1}', "UTF-8", id="not UTF-8"),
    pytest.param(b'{"\xed\xa0\x80":1}', "UTF-8", id="surrogate in UTF-8"),
    pytest.param(b'{"__metadata__":{"\\ud800":"x"}}', "surrogate", id="escaped half pair"),
    pytest.param(b'{"__metadata__":{"a":"\\udc00"}}', "surrogate", id="escaped half pair in a value"),
    pytest.param(b'{"a\x01":{}}', "invalid JSON", id="control character"),
    pytest.param(b'{"a":' + b"[" * 100_000, "nested too deep|invalid JSON", id="deep"),
    pytest.param(b'{"a":' * 100_000, "nested too deep|invalid JSON", id="deep objects"),
    pytest.param({"__metadata__": {"a": 1}}, "strings to strings", id="metadata value"),
    pytest.param({"__metadata__": ["a"]}, "strings to strings", id="metadata list"),
    pytest.param({"__metadata__": None}, "strings to strings", id="metadata null"),
    pytest.param({"a": 5}, "'a' is not described", id="number"),
    pytest.param({"a": None}, "'a' is not described", id="null"),
    pytest.param({"a": {"dtype": "U8", "shape": [0]}}, "'a' is not described", id="no offsets"),
    pytest.param({"a": {**tensor(0, 0), "more": 1}}, "'a' is not described", id="extra key"),
    pytest.param({"a": tensor(0, 1, 1)}, "no list of integers", id="shape number"),
    pytest.param({"a": tensor(0, 1, ["1"])}, "no list of integers", id="shape string"),
    pytest.param({"a": tensor(0, 1, [True])}, "no list of integers", id="shape bool"),
    pytest.param({"a": tensor(0, 1, [[1]])}, "no list of integers", id="shape nested"),
    pytest.param(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, "two integers", id="three offsets"
    ),
    pytest.param(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, None]}}, "two integers", id="null offset"
    ),
    pytest.param(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": {}}}, "two integers", id="object offsets"
    ),
    pytest.param(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "number -1", id="negative size"),
    pytest.param(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', "number -0", id="negative zero"),
    pytest.param(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', "number 1.0", id="float size"),
    pytest.param(b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', "number 1e0", id="exponent"),
    pytest.param(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "number NaN", id="NaN"),
    pytest.param({"a": tensor(0, 1, [10**30])}, "not allowed", id="30 digits"),
    pytest.param(b'{"a":' + b"9" * 5000 + b"}", "not allowed", id="5000 digits"),
    pytest.param({"a": tensor(0, 0, [2**62, 8, 0])}, "too big", id="overflow before a zero"),
    pytest.param({"a": tensor(0, 0, [0, 2**63])}, "too big", id="size of 64 bits"),
    pytest.param({"a": tensor(0, 8, [2**61 + 1], "F64")}, "too big", id="overflow times itemsize"),
    pytest.param({"a": tensor(0, 8, [2**32, 2**32 + 1], "F64")}, "too big", id="overflow of the product"),
    pytest.param({"a": tensor(0, 3, [4])}, "3 bytes where its shape and dtype make 4", id="size"),
    pytest.param({"a": tensor(4, 0, [4])}, "-4 bytes", id="backwards"),
    pytest.param({"a": tensor(0, 4), "b": tensor(2, 6)}, "'b' overlaps", id="overlap"),
    pytest.param({"a": tensor(0, 4), "b": tensor(0, 4)}, "overlaps", id="same bytes twice"),
    pytest.param({"a": tensor(1, 4)}, "'a' leaves a hole", id="hole at the start"),
    pytest.param({"a": tensor(0, 4), "b": tensor(5, 6)}, "'b' leaves a hole from byte", id="hole"),
    pytest.param({"a": tensor(0, 3)}, "7 bytes lie behind the last tensor", id="trailing"),
    pytest.param({}, "10 bytes lie behind", id="trailing after nothing"),
]


@pytest.mark.parametrize(("header", "message"), BROKEN)
def test_broken_headers_are_refused_with_file_and_reason(read, header, message):
    with pytest.raises(HeaderError, match=message) as caught:
        read(build(header, b"\0" * 10))
    assert "model.safetensors" in str(caught.value)
    assert "again" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}',
        b'{"__metadata__":{"k":"v","k":"w"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"é":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":5,"é":{}}'.encode(),
    ],
)
def test_names_that_occur_twice_are_refused(read, text):
    with pytest.raises(HeaderError, match=r"the name '.*' occurs twice") as caught:
        read(build(text, b"\0"))
    name = str(caught.value).split("'")[1]
    again = text.rindex(f'"{name}"'.encode())
    assert text.count(f'"{name}"'.encode()) == 2
    assert f"byte {8 + again})" in str(caught.value)


def test_the_place_of_bad_json_is_counted_in_bytes(read):
    text = '{"é":5,}'.encode()
    with pytest.raises(HeaderError, match=rf"invalid JSON: [a-z].*byte {8 + text.index(b'}')}\)"):
        read(build(text))
    with pytest.raises(HeaderError, match=r"not UTF-8.*byte 13\)"):
        read(build(b'{"a":\xff}'))


def test_numbers_of_twenty_digits_are_read_and_longer_ones_are_not(read):
    for literal, message in (
        ("9" * 20, "too big"),
        ("0" * 21, "not allowed|invalid JSON"),
        ("1" + "0" * 20, "not allowed"),
    ):
        with pytest.raises(HeaderError, match=message):
            read(
                build(b'{"a":{"dtype":"U8","shape":[' + literal.encode() + b'],"data_offsets":[0,1]}}', b"\0")
            )


def test_lengths_at_the_limits(tmp_path):
    path = tmp_path / "m.safetensors"
    assert header_length((92).to_bytes(8, "little"), 100, path) == 92
    assert header_length(MAX_HEADER.to_bytes(8, "little"), MAX_HEADER + 8, path) == MAX_HEADER
    with pytest.raises(TruncatedError, match="101 bytes expected, 100 found"):
        header_length((93).to_bytes(8, "little"), 100, path)
    with pytest.raises(HeaderError, match="byte 0"):
        header_length((MAX_HEADER + 1).to_bytes(8, "little"), 2 * MAX_HEADER, path)


def test_errors_name_the_tensor_the_byte_and_what_was_found(read):
    for header, message in (
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, r"'b' overlaps.*byte {}"),
        ({"a": tensor(0, 4), "b": tensor(6, 10)}, r"'b' leaves a hole.*byte {}"),
        (
            {"a": tensor(0, 4), "b": tensor(4, 6, [3])},
            r"'b' has 2 bytes where its shape and dtype make 3.*byte {}",
        ),
    ):
        whole = build(header, bytes(10))
        byte = len(whole) - 10 + header["b"]["data_offsets"][0]
        with pytest.raises(HeaderError, match=message.format(byte) + r"\b"):
            read(whole)
    with pytest.raises(TruncatedError, match=r"its tensors do: \d+ bytes expected"):
        read(build({"a": tensor(0, 4)}, bytes(3)))


def test_the_seal_is_believed_when_it_is_not_to_be_compared(tmp_path):
    path = tmp_path / "m.safetensors"
    metadata = {"tuckaway.checksums": "crc32", "tuckaway.crc32": "00000000 00000000", "k": "v"}
    path.write_bytes(build({"__metadata__": metadata, "a": tensor(0, 1)}, b"\0"))
    with pytest.raises(ChecksumError):
        read_header(path)
    header = read_header(path, verify=False)
    assert header.metadata == {"k": "v"}
    assert header.identity.size == path.stat().st_size


def test_the_largest_size_is_one_that_torch_can_count(read):
    assert read(build({"a": tensor(0, 0, [0, 2**63 - 1])})).entries["a"].shape == (0, 2**63 - 1)


def test_no_descriptor_stays_open(tmp_path):
    path = tmp_path / "m.safetensors"
    process = psutil.Process()
    for content in (build(VALID, bytes(10)), build({}, length=99)):
        path.write_bytes(content)
        before = process.num_fds()
        with contextlib.suppress(TruncatedError):
            read_header(path)
        assert process.num_fds() == before


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER + 1])
def test_a_header_longer_than_allowed_allocates_nothing(tmp_path, length):
    path = tmp_path / "big.safetensors"
    path.write_bytes(build({}, length=length))
    os.truncate(path, 1 << 30)  # sparse: the length alone cannot be told from the file's size
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match="more than the 100000000 allowed"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_truncated(read):
    whole = build(VALID, b"\0" * 10)
    assert len(read(whole).entries) == 3
    for size in range(len(whole)):
        with pytest.raises(TruncatedError, match=rf"bytes expected, {size} found"):
            read(whole[:size])


def test_no_file_and_no_regular_file(tmp_path):
    with pytest.raises(CheckpointNotFound):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(UnsafePathError):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UnsafePathError):
        read_header(tmp_path / "pipe.safetensors")
    with pytest.raises(UnsafePathError):
        read_header("/dev/zero")
    with pytest.raises(CheckpointError):
        read_header("a\0b")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "loop")


def test_a_disk_that_fails_is_a_checkpoint_error(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(build(VALID, b"\0" * 10))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        read_header(path)


def test_a_file_cut_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(build(VALID, b"\0" * 10))
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, v, offset: 0 if offset > 20 else preadv(fd, [v[0][:7]], offset)
    )
    with pytest.raises(TruncatedError):
        read_header(path)


def test_the_time_to_read_a_header_grows_with_its_length(tmp_path):
    """Compared with itself: eight times the tensors take some eight times the time, not 64 times."""
    paths = {number: tmp_path / f"{number}.safetensors" for number in (2_500, 20_000)}
    for number, path in paths.items():
        header = {
            f"model.layers.{i}.mlp.experts.weight": tensor(2 * i, 2 * i + 2, [1, 1], "F16")
            for i in range(number)
        }
        path.write_bytes(build(header, b"\0" * 2 * number))
        assert len(read_header(path).entries) == number
    few, many = (min(_timed(path) for _ in range(5)) for path in paths.values())
    assert many < 32 * few


def _timed(path) -> float:
    start = time.thread_time()
    read_header(path)
    return time.thread_time() - start


# ---- fuzzing: never another error than ours, never a file accepted that safetensors refuses -------------------------

counts = st.one_of(
    st.integers(0, 12), st.integers(0, 2**64), st.just(-1), st.floats(), st.none(), st.booleans()
)
values = st.recursive(
    st.one_of(counts, st.text(max_size=3), st.sampled_from(sorted(DTYPES))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
infos = st.one_of(
    st.builds(
        lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
        st.one_of(st.sampled_from(["U8", "U8", "F16", "F32", *DTYPES, "F4"]), values),
        st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(counts, max_size=3), values),
        st.one_of(st.lists(st.integers(0, 12), min_size=2, max_size=2), st.lists(counts, max_size=3), values),
    ),
    values,
)
headers = st.dictionaries(st.one_of(st.just("__metadata__"), st.text(max_size=3)), infos, max_size=3)


@st.composite
def nearly_valid(draw):
    """Tensors one behind the other, and then some bytes of the file changed, taken out or put in."""
    begin, header = 0, {}
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = begin + DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = tensor(begin, end, shape, dtype)
        begin = end
    content = bytearray(build(header, bytes(begin)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 2))] = draw(
            st.one_of(st.binary(max_size=2), st.sampled_from(NEIGHBOURS))
        )
    return bytes(content)


NEIGHBOURS = [
    b"-",
    b"0",
    b"1",
    b".",
    b"e",
    b",",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\u",
    b" ",
    b"\n",
    b":",
    b"\\ud800",
]
files_to_try = st.one_of(
    nearly_valid(),
    st.builds(lambda header, data: build(header, data), headers, st.binary(max_size=12)),
    st.builds(lambda text, data: build(text, data), st.binary(max_size=40), st.binary(max_size=4)),
    st.binary(max_size=40),
)


def compare_with_safetensors(content: bytes) -> bool:
    """Whether ours accepts it: never another error than ours, never a file accepted that safetensors refuses."""
    length = int.from_bytes(content[:8], "little")
    path, identity = Path("fuzzed.safetensors"), FileIdentity(0, 0, len(content), 0)
    refusal = None
    try:
        header = parse_header(content[8 : 8 + length], path, 8 + length, identity)
    except (HeaderError, TruncatedError) as error:
        refusal = str(error)
    if refusal is not None:
        assert "fuzzed.safetensors" in refusal
        return False
    theirs = dict(safetensors.deserialize(content))
    assert header.entries.keys() == theirs.keys()
    for name, entry in header.entries.items():
        assert DTYPES[theirs[name]["dtype"]] == entry.dtype
        assert tuple(theirs[name]["shape"]) == entry.shape
        assert bytes(theirs[name]["data"]) == content[entry.offset : entry.offset + entry.nbytes]
    return True


@settings(max_examples=400, deadline=None)
@given(content=files_to_try)
def test_any_file_is_read_as_safetensors_reads_it_or_refused(content):
    compare_with_safetensors(content)


def test_mutations_of_a_valid_file():
    # TUCKAWAY_FUZZ=1000000 takes a minute and a half; the default, two seconds
    count = int(os.environ.get("TUCKAWAY_FUZZ", "20000"))
    valid = build(VALID, bytes(10))
    generator = random.Random(0)
    accepted = 0
    for _ in range(count):
        content = bytearray(valid)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(8, len(content))
            end = at + generator.randint(0, 2)
            content[at:end] = (
                generator.choice(NEIGHBOURS) if generator.random() < 0.7 else generator.randbytes(1)
            )
        if generator.random() < 0.8:  # keep the length true, so that what lies behind it is reached
            content[:8] = (len(content) - 18).to_bytes(8, "little")
        accepted += compare_with_safetensors(bytes(content))
    assert 0 < accepted < count / 2
