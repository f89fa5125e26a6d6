"""The notebook's code runs, cell by cell, on a CPU, with a tiny model in the place of the one it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
_MODEL = re.compile(r'^MODEL = "[^"]+"', re.MULTILINE)


def cells(path: Path) -> list[str]:
    """Return the code cells of a notebook; those that give commands to the shell or to IPython are left out."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [source for source in sources if not source.startswith(("%", "!"))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_run(
    path: Path,
    tiny_chat: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = cells(path)
    assert sum(len(_MODEL.findall(cell)) for cell in code) == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(code):
        here = _MODEL.sub(f"MODEL = {str(tiny_chat)!r}", cell)
        exec(compile(here, f"{path.name}, cell {number}", "exec"), names)
    assert capsys.readouterr().out.count("tokens/s") == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
