"""The page of the docs says what is quantized now."""

from __future__ import annotations

import pytest

from zoo.table import PAGE, models, row

MODELS = [(name, build) for section, name, build in models() if not section.startswith("timm")]


def test_every_model_has_a_line() -> None:
    page = PAGE.read_text()
    assert [name for _, name, _ in models() if f"\n| {name} | " not in page] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "build"), MODELS[::6] + MODELS[39:45], ids=lambda value: str(value)[:20])
def test_a_line_is_what_is_chosen(name: str, build: object) -> None:
    assert f"\n{row(name, build)}\n" in PAGE.read_text()  # type: ignore[arg-type]
