"""Mutated JSON documents, and many processes that feed them to a parser.

Half of the mutants are made from the document (a value replaced, a key doubled, a branch moved), so that they get past
the JSON parser and meet the checks behind it; the other half from its bytes. A seed makes the same mutants everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

INTERESTING = [
    *(0, 1, -1, 2, 7, 8, 15, 16, 63, 64, 255, 256, 4095, 4096),
    *(
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**19,
        10**21,
        10**400,
    ),
]
VALUES: list[Any] = [
    *INTERESTING,
    *(None, True, False, 0.0, -0.0, 1.5, 1e308, 1e-320, float("inf"), float("nan")),
    *(
        "",
        "a",
        "F32",
        "U8",
        "BF16",
        "F8_E4M3",
        "float32",
        "nf4",
        "\0",
        "\ud800",
        "../x",
        "/etc/passwd",
        "C:\\x",
        "é" * 40,
    ),
    *([], {}, [0], [0, 0], [1, 2, 3], [[]], {"a": 1}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
]
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"\0",
        b"\xff",
        b"\xc3\x28",
        b" ",
        b"\n",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"-0",
        b"1e5",
        b"1E400",
        b"0x10",
        b"00",
        b"1_0",
        b"-1",
    ),
    *(b"[" * 3000, b'{"a":' * 3000, b"9" * 25, b"9" * 5000, b"//", b"/**/", b"'"),
]


class Mutator:
    """Makes mutants of JSON documents.

    Args:
        documents: sound ones, as Python objects.
        seed: of the random numbers.
    """

    def __init__(self, documents: Sequence[Any], seed: int) -> None:
        self.texts = [json.dumps(document, separators=(",", ":")).encode() for document in documents]
        self.keys = sorted({key for document in documents for key in _keys(document)})
        self.random = random.Random(seed)

    def __call__(self) -> bytes:
        """Return the next mutant."""
        pick = self.random
        text = pick.choice(self.texts)
        if pick.random() < 0.5:
            document = json.loads(text)
            for _ in range(pick.choice((1, 1, 1, 2, 3))):
                document = self._changed(document)
            text = json.dumps(document, separators=(",", ":"), ensure_ascii=pick.random() < 0.9).encode(
                "utf-8", "surrogatepass"
            )
            if pick.random() < 0.1:
                text = self._doubled_key(text)
            if pick.random() < 0.9:
                return text
        return self._bytes(text)

    def _changed(self, document: Any) -> Any:
        """Change one place of a document, chosen evenly."""
        pick = self.random
        places = list(_places(document))
        if not places:
            return copy.deepcopy(pick.choice(VALUES))
        owner, key = pick.choice(places)
        kind = pick.randrange(8)
        value = owner[key]
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(value, int) and not isinstance(value, bool):
            owner[key] = value + pick.choice((-1, 1, 2, -8, 8, 2**32, 2**63, -value, value))
        elif kind == 2:
            other, name = pick.choice(places)
            owner[key] = copy.deepcopy(other[name])  # a branch in two places is two branches
        elif kind == 3 and isinstance(value, list):
            owner[key] = value * 2 if pick.random() < 0.5 else value[::-1]
        elif kind == 4 and isinstance(owner, dict):
            owner[pick.choice(self.keys)] = owner.pop(key)
        elif kind == 5 and isinstance(owner, dict):
            owner[str(key) + pick.choice(("\0", "x", " ", "é", "\udfff"))] = owner[key]
        else:
            owner[key] = copy.deepcopy(pick.choice(VALUES))
        return document

    def _doubled_key(self, text: bytes) -> bytes:
        end = text.rfind(b"}")
        key = self.random.choice(self.keys).encode("utf-8", "surrogatepass")
        return text[:end] + b',"' + key + b'":' + json.dumps(self.random.choice(VALUES)).encode() + text[end:]

    def _bytes(self, text: bytes) -> bytes:
        """Change one to three places of the bytes."""
        pick = self.random
        data = bytearray(text)
        for _ in range(pick.choice((1, 1, 1, 2, 3))):
            at = pick.randrange(len(data) + 1)
            kind = pick.randrange(7)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << pick.randrange(8)
            elif kind == 1:
                del data[at : at + pick.randrange(1, 9)]
            elif kind == 2:
                data[at:at] = pick.choice(TOKENS)
            elif kind == 3:
                data[at : at + 1] = bytes([pick.randrange(256)])
            elif kind == 4:
                del data[at:]
            elif kind == 5:
                start = pick.randrange(len(data) + 1)
                data[at:at] = data[start : start + pick.randrange(1, 33)]
            else:
                data[at : at + pick.randrange(4)] = str(pick.choice(INTERESTING)).encode()
        return bytes(data)


def _keys(document: Any) -> list[str]:
    found = []
    if isinstance(document, dict):
        found = [*document, *(key for value in document.values() for key in _keys(value))]
    elif isinstance(document, list):
        found = [key for value in document for key in _keys(value)]
    return found


def _places(document: Any) -> Any:
    """Every container of a document with every key of it."""
    if isinstance(document, dict | list):
        items = list(document.items()) if isinstance(document, dict) else list(enumerate(document))
        for key, value in items:
            yield document, key
            yield from _places(value)


class Tally:
    """What a process saw.

    Attributes:
        accepted, refused: how many inputs were.
        wrong: inputs with what went wrong, the first few.
    """

    def __init__(self) -> None:
        self.accepted = self.refused = 0
        self.wrong: list[tuple[bytes, str]] = []

    def add(self, other: Tally) -> None:
        """Take another process's tally in."""
        self.accepted += other.accepted
        self.refused += other.refused
        self.wrong += other.wrong


SLOW = 1.0
"""Seconds of a thread's CPU time from which on an input counts as one that hangs the parser."""


def hunt(
    mutant: Callable[[], bytes],
    parse: Callable[[bytes], None],
    errors: tuple[type[Exception], ...],
    number: int,
) -> Tally:
    """Feed ``number`` mutants to ``parse``, which may return or raise ``errors`` within a second of CPU time."""
    tally = Tally()

    def judge(data: bytes) -> None:
        try:
            parse(data)
            tally.accepted += 1
        except errors:
            tally.refused += 1
        except BaseException:
            tally.wrong.append((data, traceback.format_exc(limit=-3)))

    for _ in range(number):
        data = mutant()
        began = time.thread_time()
        judge(data)
        took = time.thread_time() - began
        if took > SLOW and (took := _quickest(parse, data)) > SLOW:
            tally.wrong.append((data, f"took {took:.1f} s at the quickest of {REPEATS}"))
        if len(tally.wrong) > 4:
            break
    return tally


REPEATS = 3


def _quickest(parse: Callable[[bytes], None], data: bytes) -> float:
    """Return the CPU seconds of the quickest of some tries, up to the first that is quick enough.

    What makes a parser hang is the input, so it is slow every time. A collection of garbage, or a host that takes the
    core away from a virtual machine (which its guest books as the thread's own time: 1.5 s, once in some millions of
    inputs), is slow once.
    """
    quickest = float("inf")
    for _ in range(REPEATS):
        began = time.thread_time()
        with contextlib.suppress(BaseException):  # it was judged already
            parse(data)
        quickest = min(quickest, time.thread_time() - began)
        if quickest <= SLOW:
            break
    return quickest


def _run(job: Callable[[int, int], Tally], seed: int, number: int, pipe: Any) -> None:
    pipe.send(job(seed, number))
    pipe.close()


def spread(
    job: Callable[[int, int], Tally], number: int, *, seed: int, processes: int | None = None
) -> Tally:
    """Run ``job(seed, number)`` in a process a core, each with a seed of its own, and add up what they saw.

    Raises:
        AssertionError: a process died.
    """
    processes = processes or min(os.cpu_count() or 1, 8)
    if number < 10_000:
        return job(seed, number)
    context = get_context("fork")  # no import again; the parsers start no threads
    total, running = Tally(), []
    for index in range(processes):
        receive, send = context.Pipe(duplex=False)
        share = number // processes + (index < number % processes)
        process = context.Process(target=_run, args=(job, seed + index, share, send))
        process.start()
        send.close()
        running.append((process, receive))
    for process, receive in running:
        try:
            total.add(receive.recv())
        except EOFError:
            total.wrong.append((b"", "a process died"))
        process.join()
        if process.exitcode != 0:
            total.wrong.append((b"", f"a process ended with {process.exitcode}"))
    return total


def assert_clean(tally: Tally, number: int, seed: int) -> None:
    """Nothing went wrong, and both answers were given often enough to mean something."""
    print(f"seed {seed}: {tally.accepted} accepted, {tally.refused} refused, {len(tally.wrong)} wrong")
    shown = "\n".join(f"{data[:2000]!r}\n{what}" for data, what in tally.wrong[:3])
    assert not tally.wrong, f"seed {seed}:\n{shown}"
    assert tally.accepted + tally.refused == number
    assert tally.accepted >= number / 200, tally.accepted
    assert tally.refused >= number / 2, tally.refused
