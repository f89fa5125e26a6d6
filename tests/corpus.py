"""English prose that every CPython carries: its language reference and the docstrings of its standard library.

For measuring perplexity without a data set. The text is fixed for one Python build and differs between builds: compare
figures of one text only.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

_FENCES = re.compile(r"[*`|]")
_CODE = re.compile(r"[{}<>=_\\\[\]]|\(\)|::")
_WORD = re.compile(r"[A-Za-z]{2,}")
_NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages"}


def prose(characters: int) -> str:
    """Return at least ``characters`` characters of prose, a paragraph a line."""
    lines: dict[str, None] = {}  # a set that keeps the order: chapters repeat one another
    size = 0
    for document in _documents():
        for paragraph in re.split(r"\n\s*\n", document):
            line = " ".join(_FENCES.sub("", paragraph).split())
            if line not in lines and _is_prose(line):
                lines[line] = None
                size += len(line) + 1
                if size >= characters:
                    return "\n".join(lines) + "\n"
    raise ValueError(f"this Python carries {size} characters of prose, fewer than {characters}")


def _documents() -> Iterator[str]:
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(library).parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield ast.get_docstring(node) or ""


def _is_prose(line: str) -> bool:
    """Sentences: a dozen words, letters for the most part, hardly a sign of code, an end like a sentence's."""
    words = _WORD.findall(line)
    return (
        len(words) >= 12
        and line.endswith((".", "!", "?", ":", ")"))
        and sum(map(len, words)) > 0.7 * len(line)
        and len(_CODE.findall(line)) <= 0.04 * len(words)
    )
