"""The table of ImageNet's classes against the packages that it is made of."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import lit_fast.evaluation
from benchmarks.imagenet_names import table


@pytest.mark.skipif(
    find_spec("open_clip") is None or find_spec("timm") is None, reason="needs open_clip and timm"
)
def test_imagenet_classes_are_those_of_open_clip() -> None:
    file = Path(lit_fast.evaluation.__path__[0]) / "imagenet_classes.toml"
    assert file.read_text() == table()
