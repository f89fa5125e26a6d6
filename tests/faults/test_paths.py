"""Nothing outside a checkpoint's folder is opened, whatever an index or a link says, by any system's rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tuckaway.checkpoint import Checkpoint
from tuckaway.errors import CheckpointError, UnsafePathError

ESCAPES = [
    "../secret.safetensors",
    "..",
    "../",
    "../../secret.safetensors",
    "sub/../../secret.safetensors",
    "./../secret.safetensors",
    "sub/../..",
    "sub/./../../secret.safetensors",
    "..//secret.safetensors",
    ".. /secret.safetensors",
    " ../secret.safetensors",
    "sub/.. /../secret.safetensors",
    "../checkpoint/../secret.safetensors",
    "....//....//secret.safetensors/../../../secret.safetensors",
    "/etc/passwd",
    "/secret.safetensors",
    "//secret.safetensors",
    "///etc/hostname",
    "//host/share/x.safetensors",
    "/./secret.safetensors",
    "/proc/self/environ",
    "/dev/zero",
    "/dev/stdin",
    "~/secret.safetensors",
    "~root/secret.safetensors",
    "~",
    "..\\secret.safetensors",
    "..\\..\\secret.safetensors",
    "sub\\..\\..\\secret.safetensors",
    ".\\..\\secret.safetensors",
    "\\secret.safetensors",
    "\\\\host\\share\\x.safetensors",
    "\\\\?\\C:\\secret.safetensors",
    "\\\\.\\PhysicalDrive0",
    "\\??\\C:\\x.safetensors",
    "C:\\secret.safetensors",
    "C:/secret.safetensors",
    "C:secret.safetensors",
    "c:..\\secret.safetensors",
    "Z:x.safetensors",
    "sub/C:/x.safetensors",
    "x.safetensors:stream",
    "x.safetensors::$DATA",
    "file:///etc/passwd",
    "http://host/x.safetensors",
    "https:x.safetensors",
    "",
    ".",
    "./",
    "./.",
    "sub/..",
    "sub/../",
    "\0",
    "x.safetensors\0",
    "x\0/../secret.safetensors",
    "x.safetensors\n",
    "\n",
    "sub/../x.safetensors",
    "sub\\..\\x.safetensors",
    "sub/..\\../secret.safetensors",
    "..%2fsecret.safetensors/../../secret.safetensors",
    "link.safetensors",
    "linked/secret.safetensors",
    "chain.safetensors",
    "loop.safetensors",
    "dangling.safetensors",
    "up/secret.safetensors",
    "hard/../../secret.safetensors",
    "%2e%2e/../../secret.safetensors",
    "\u2025/../../secret.safetensors",
    "..\u2044../../secret.safetensors",
]
INSIDE = [
    "x.safetensors",
    "./x.safetensors",
    "sub/x.safetensors",
    "sub//x.safetensors",
    "...safetensors",
    "within.safetensors",
]

OPENED: list[str] = []
_recording = False


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if _recording and event == "open":
        OPENED.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


sys.addaudithook(_record)  # for good: a hook cannot be taken out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder with links that lead out of it, and what they lead to."""
    secret, folder = tmp_path / "secret.safetensors", tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "hard").mkdir()
    save_file({"w": torch.ones(2)}, secret)
    for name in ("x.safetensors", "sub/x.safetensors", "...safetensors"):
        save_file({"w": torch.zeros(2)}, folder / name)
    (folder / "within.safetensors").symlink_to(folder / "sub" / "x.safetensors")
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "up").symlink_to("..")
    (folder / "chain.safetensors").symlink_to(folder / "link.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "dangling.safetensors").symlink_to(tmp_path / "nothing.safetensors")
    return folder


def opened_by(folder: Path, name: str) -> tuple[list[str], CheckpointError | None]:
    """Open a checkpoint whose index names a file, and return what was opened and how it was refused."""
    global _recording
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    OPENED.clear()
    _recording = True
    try:
        Checkpoint.open(folder / "model.safetensors.index.json").read("w")
    except CheckpointError as error:
        return list(OPENED), error
    finally:
        _recording = False
    return list(OPENED), None


def test_the_corpus_is_big_enough() -> None:
    assert len(set(ESCAPES)) == len(ESCAPES) >= 60


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_no_name_leads_out(folder: Path, name: str) -> None:
    opened, error = opened_by(folder, name)
    assert error is not None
    root = os.path.realpath(folder)
    outside = [path for path in opened if not os.path.realpath(path).startswith(root + os.sep)]
    assert not outside
    assert not [path for path in opened if path.endswith(".safetensors")], (
        "a file was opened before it was refused"
    )
    if name not in ("loop.safetensors",):
        assert isinstance(error, UnsafePathError) or "names the file" in str(error), error


@pytest.mark.parametrize("name", INSIDE)
def test_names_inside_are_served(folder: Path, name: str) -> None:
    opened, error = opened_by(folder, name)
    assert error is None
    assert any(path.endswith(".safetensors") for path in opened)


def test_the_hub_cache_is_served_and_no_other_repository(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert Checkpoint.open(snapshot).read("w").tolist() == [1, 1]
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.move(blobs / "0123", other / "0123")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "0123")
    with pytest.raises(UnsafePathError):
        Checkpoint.open(snapshot)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    """In a process of its own, which a hang would not end."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    script = """
        import sys
        from tuckaway.checkpoint import Checkpoint
        from tuckaway.errors import UnsafePathError
        for name in sys.argv[1:]:
            try:
                Checkpoint.open(name)
            except UnsafePathError:
                print("refused")
            except Exception as error:
                print(repr(error))
    """
    names = [str(tmp_path / f"{kind}.safetensors") for kind in ("pipe", "device")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *names], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["refused", "refused"], done
