"""Every call of the system that a job makes is failed, once and for good, by a library under libc.

The error is typed and keeps the system's own as its cause; descriptors and threads are as before; the model is as it
was or done; the folder holds the old or the new, and what could not be removed goes with the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heavy import HEAVY, count

HERE = Path(__file__).parent
JOBS = ["Load", "LoadPickle", "Fill", "PageIn", "Save", "SaveShards", "SaveModel"]
CASES = [
    (job, mode)
    for job in JOBS
    for mode in ("once", "for-good", "closing")
    if (job, mode) != ("PageIn", "closing")
]
if not HEAVY:  # three seconds each, of which two are imports
    CASES = [("Fill", "once"), ("Save", "for-good")]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc builds the library that fails calls"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        path,
        HERE / "shim.c",
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return path


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("job", "mode"), CASES)
def test_every_call_that_can_fail_fails(job: str, mode: str, shim: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "failing_calls.py", shim, tmp_path, job, mode, str(count(6, 1))],
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *(p for p in sys.path if p)]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(job, mode, {k: v for k, v in result.items() if k != "wrong"})
    assert not result["wrong"], "\n".join(result["wrong"])
    assert result["failed"], "no call was failed"
