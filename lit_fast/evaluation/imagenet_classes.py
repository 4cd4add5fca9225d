"""ImageNet-1k's class names and prompt templates as open_clip has them, from `imagenet_classes.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any


def imagenet_names() -> dict[str, str]:
    """Return WordNet id -> name of the 1000 classes, in the order of their numbers."""
    return _table()["classes"]


def imagenet_templates() -> tuple[str, ...]:
    """Return the 80 templates; "{c}" is the class name."""
    return tuple(_table()["templates"])


@cache
def _table() -> dict[str, Any]:
    text = (resources.files(__package__) / "imagenet_classes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
