"""A disk of three megabytes, really full: a typed error before the first byte or in the middle, never a signal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import os, sys, torch, tuckaway
    from torch import nn
    from pathlib import Path
    from tuckaway import files
    from tuckaway.checkpoint import Checkpoint, CheckpointWriter
    from tuckaway.errors import StoreFull

    disk = Path(sys.argv[1])
    shape = os.statvfs(disk)
    assert shape.f_blocks * shape.f_frsize == 3 * 2**20, "not the small disk"

    def full(work):
        before = sorted(os.listdir(disk))
        try:
            work()
        except StoreFull as error:
            assert "free" in str(error), error
        else:
            raise SystemExit(f"{work.__name__}: there was room")
        assert sorted(os.listdir(disk)) == before, (before, os.listdir(disk))
        assert len(os.listdir("/proc/self/fd")) == descriptors

    big = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)])  # 4 MiB
    small = nn.Linear(64, 64)
    descriptors = len(os.listdir("/proc/self/fd"))

    def save():
        tuckaway.save_model(big, disk / "new")

    def save_shards():
        tuckaway.save_model(big, disk / "new", max_shard_size="1MB")

    def fill():
        tuckaway.load_and_quantize_model(big, tuckaway.QuantizationConfig(skip_modules=["0", "1", "2", "3"],
            dtype=torch.float32), device_map={"": "disk"}, offload_folder=disk / "store")

    def convert():
        config = tuckaway.QuantizationConfig(format="int8", only_modules=["0"], dtype=torch.float32)
        tuckaway.quantize_checkpoint(sys.argv[2], disk / "converted", config)

    tuckaway.save_model(big, sys.argv[2])
    full(save)
    full(save_shards)
    full(fill)
    full(convert)

    tuckaway.save_model(small, disk / "kept")  # what is there stays, whole
    kept = Checkpoint.open(disk / "kept").read("weight")

    def save_over():
        tuckaway.save_model(big, disk / "kept")

    full(save_over)
    assert torch.equal(Checkpoint.open(disk / "kept").read("weight"), kept)

    def grow():  # where the size is not known, the disk fills in the middle of a write
        with files.AtomicFile(disk / "growing") as file:
            for _ in range(100):
                file.write(bytes(100_000))

    full(grow)

    def race():  # somebody else takes the room between the plan and the pages
        with CheckpointWriter(disk / "raced", max_shard_size="1MB") as writer:
            writer.plan([(str(i), torch.float32, (200_000,)) for i in range(2)])
            (disk / "hog").write_bytes(bytes(900_000))
            for i in range(2):
                writer.write(str(i), torch.zeros(200_000))
            writer.commit()

    race()  # its room was taken by the plan: the hog comes second
    print("done")
"""


@pytest.mark.skipif(
    sys.platform != "linux"
    or not hasattr(os, "geteuid")
    or os.geteuid() != 0
    or shutil.which("unshare") is None,
    reason="mounting a small disk needs root and unshare",
)
def test_every_writer_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=3m tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this container may not make mount namespaces")
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            mount,
            "sh",
            disk,
            sys.executable,
            textwrap.dedent(SCRIPT),
            tmp_path / "source",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "permission denied" in done.stderr:
        pytest.skip("this container may not mount")
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
