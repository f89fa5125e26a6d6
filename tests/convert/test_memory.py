"""A checkpoint far bigger than the memory that may be used: a sparse file, converted under a limit of address space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GIGABYTES = float(os.environ.get("TUCKAWAY_SPARSE_GB", "3"))
LIMIT = 1_500_000_000  # bytes of address space above what the process has after its imports

CHILD = """
import json, resource, sys, time, torch
import tuckaway
source, target = sys.argv[1:]
tuckaway.quantize(torch.randn(64, 64), "nf4")  # threads, tables
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int({limit})
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
done = tuckaway.quantize_checkpoint(source, target, "nf4", max_shard_size="2GB")
print(json.dumps({{"seconds": done.seconds, "nbytes": done.nbytes, "basis": done.basis}}))
"""


def sparse_checkpoint(path: Path, nbytes: int) -> int:
    """Write a header and a few rows of values; the rest of the file is a hole, which reads as zeros."""
    content: dict[str, object] = {}
    rows = 8192
    end = 0
    count = max(1, nbytes // (4 * rows * rows))
    for number in range(count):
        size = 4 * rows * rows
        content[f"layers.{number}.up.weight"] = {
            "dtype": "F32",
            "shape": [rows, rows],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(os.urandom(2**16).translate(bytes(range(64)) * 4))  # exponents of small numbers
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS, /proc and sparse files")
def test_a_checkpoint_bigger_than_the_memory(tmp_path):
    source = tmp_path / "model.safetensors"
    nbytes = sparse_checkpoint(source, int(GIGABYTES * 1e9))
    assert nbytes > 1.9 * LIMIT
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(limit=LIMIT), str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=280 * max(1, GIGABYTES / 3),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(nbytes, result)
    assert nbytes / 9 < result["nbytes"] < nbytes / 7
