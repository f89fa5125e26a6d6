from __future__ import annotations

import itertools

import pytest

import fuzzing
from fuzzing import hunt


class Clock:
    """CPU time that only parsing takes: each parse the next of ``seconds``, then none."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.now = list(seconds), 0.0

    def thread_time(self) -> float:
        return self.now

    def parse(self, data: bytes) -> None:
        self.now += self.seconds.pop(0) if self.seconds else 0.0
        if data == b"bad":
            raise ValueError(data)


@pytest.mark.parametrize(
    ("seconds", "hangs"),
    [
        ([0.5], []),
        ([1.5], []),  # a hiccup of the machine
        ([1.5, 2.0, 1.2, 0.1], []),
        ([1.5, 3.0, 1.2, 2.0], ["took 1.2 s at the quickest of 3"]),
    ],
)
@pytest.mark.parametrize("data", [b"good", b"bad"])
def test_an_input_hangs_the_parser_when_it_is_slow_every_time(
    monkeypatch: pytest.MonkeyPatch, data: bytes, seconds: list[float], hangs: list[str]
) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(fuzzing, "time", clock)
    tally = hunt(lambda: data, clock.parse, (ValueError,), 1)
    assert [what for _, what in tally.wrong] == hangs
    assert tally.accepted + tally.refused == 1  # not once more for every try


def test_an_untyped_error_is_wrong_and_the_hunt_goes_on() -> None:
    data = itertools.cycle([b"good", b"bad"])
    tally = hunt(lambda: next(data), Clock([]).parse, (KeyError,), 4)
    assert (tally.accepted, tally.refused, len(tally.wrong)) == (2, 0, 2)
    assert "ValueError: b'bad'" in tally.wrong[0][1]
