"""The code of the README and of every page of the docs runs, word for word.

But for models' names: where a page names a model on the Hub, a tiny one in a folder stands in. A block of text after
the comment ``<!-- printed -->`` is what the page's code prints.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_HUB_IDS = re.compile(r'"(HuggingFaceTB|Qwen|meta-llama|mistralai)/[\w.-]+"')
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


_PRINTED = re.compile(r"^<!-- printed -->\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> str:
    """Return the Python blocks of a page as one script, each on its own line numbers."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for found in _BLOCK.finditer(text):
        first = text.count("\n", 0, found.start(1))
        code = found[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's own call
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p).strip()], ids=lambda p: str(p.relative_to(ROOT))
)
def test_code_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = blocks(page)
    if _HUB_IDS.search(code):
        code = _HUB_IDS.sub(repr(str(request.getfixturevalue("tiny_chat"))), code)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})
    shown = capsys.readouterr().out
    for found in _PRINTED.finditer(page.read_text(encoding="utf-8")):
        assert found[1] in shown


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install -c constraints.txt -e ".[demo]" && tuckaway demo\n' in text
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in text
