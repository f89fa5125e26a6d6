"""Processes that are hit by a signal at a random moment of what they do: :func:`victims`.

Python and torch are started once. That process forks a victim for every hit, which takes a millisecond where a start
takes seconds, so that a test can afford hundreds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Hit", "victims"]

_ZYGOTE = """
import os, signal, sys, torch
torch.set_num_threads(1)

def began():
    os.write(2, b"(")

def ended():
    os.write(2, b")")

{setup}

for line in sys.stdin:
    words = line.split()
    victim = os.fork()
    if victim == 0:
{job}
        os._exit(0)
    print(victim, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Hit:
    """What became of a victim.

    Args:
        status: what it ended with; the negative number of a signal that ended it.
        inside: it was hit between ``began()`` and ``ended()``.
        said: lines it printed.
    """

    status: int
    inside: bool
    said: tuple[str, ...]


@contextmanager
def victims(
    setup: str, job: str, log: Path, *arguments: object, folder: Path | None = None
) -> Iterator[Callable[..., Hit]]:
    """Yield ``hit(seconds, *words, number=SIGKILL)``: do the job with these words, and be hit within that time.

    The moment is drawn evenly from the seconds that follow the job's first ``began()``. When ``hit`` returns, the
    victim is dead.

    Args:
        setup: source that the first process runs once: imports, definitions.
        job: source that a victim runs; ``words`` are its words, ``began()`` and ``ended()`` enclose what is to be hit.
        log: file for what goes to standard error.
        arguments: ``sys.argv`` from 1 on.
        folder: where ``setup`` finds modules, beside the paths of this process.
    """
    source = _ZYGOTE.format(setup=textwrap.dedent(setup), job=textwrap.indent(textwrap.dedent(job), " " * 8))
    paths = [*([] if folder is None else [str(folder)]), *(path for path in sys.path if path)]
    generator = random.Random(0)
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-c", source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        ) as zygote,
    ):
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        into, out = zygote.stdin, zygote.stdout

        def hit(seconds: float, *words: object, number: int = signal.SIGKILL) -> Hit:
            start = log.stat().st_size
            print(*words, file=into, flush=True)
            victim = int(out.readline() or _died(log))
            while b"(" not in log.read_bytes()[start:] and time.sleep(0.0005) is None:
                pass
            time.sleep(generator.uniform(0, seconds))
            os.kill(victim, number)
            said = []
            while not (line := out.readline() or _died(log)).startswith("ended "):
                said.append(line)
            return Hit(int(line.split()[1]), log.read_bytes()[start:].endswith(b"("), tuple(said))

        yield hit
        into.close()


def _died(log: Path) -> str:
    raise AssertionError(log.read_text(errors="replace")[-2000:])
