"""The pictures of the docs are what their scripts draw today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[1] / "docs"
DRAW = """
import sys
sys.path.insert(0, {folder!r})
import {module}
from canvas import PICTURES
for name, draw in {module}.DRAWN.items():
    committed = (PICTURES / name).read_text(encoding="utf-8")
    assert str(draw()) == committed, f"draw {{name}} again: python docs/draw/{module}.py"
    print(name)
"""


@pytest.mark.parametrize(
    "module", sorted(path.stem for path in (DOCS / "draw").glob("*.py") if path.stem != "canvas")
)
def test_drawn_again_they_are_the_same(module: str) -> None:
    script = DRAW.format(folder=str(DOCS / "draw"), module=module)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_every_picture_is_well_formed_named_and_shown(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert (root.findtext("{http://www.w3.org/2000/svg}title") or "").strip()
    pages = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
    assert any(f"pictures/{path.name}" in page for page in pages)
