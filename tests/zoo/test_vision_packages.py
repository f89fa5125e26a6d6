"""Models of timm and torchvision, one test a model and format."""

from __future__ import annotations

from pathlib import Path

import pytest

import tuckaway
from zoo.harness import CONFIGS, check_model, one_thread
from zoo.vision_packages import NAMES, build, missing, picture

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "everything is there")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_model(name: str, format: str, tmp_path: Path) -> None:
    with one_thread():
        report = check_model(lambda: build(name), lambda _: picture(), tuckaway.save_model, format, tmp_path)
    assert report.quantized or format == "int8"
