"""What a release needs agrees: one version everywhere, a changelog to add to, and everything in the source archive."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import tuckaway

ROOT = Path(__file__).parents[1]


def test_one_version() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == tuckaway.__version__


def test_changelog_has_room() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_source_archive_has_what_the_tests_and_the_docs_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/src", "/kernels", "/tests", "/benchmarks", "/examples", "/docs", "/*.md", "/*.cff"} <= set(
        included
    )
