"""The evaluation sets and labels that have a name here, from `known_sets.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from lit_fast.errors import UserError
from lit_fast.storage.cache import cached_file

_TABLE = Path(__file__).with_name("known_sets.toml")


@cache
def known_evaluations() -> dict[str, dict[str, Any]]:
    """Key -> task ("zero-shot", "retrieval" or "labels"), `classes` of a zero-shot set and `url` of labels."""
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def resolve_labels(spec: str) -> Path:
    """The file of labels that `spec` names: a path that exists, or one of the table's through the cache.

    Raises:
      UserError: there is no such file or name, or it cannot be downloaded.
    """
    if Path(spec).is_file():
        return Path(spec)
    known = {key: row["url"] for key, row in known_evaluations().items() if row["task"] == "labels"}
    if spec not in known:
        raise UserError(f"--labels {spec} is no file and none of the known labels: {', '.join(known)}")
    return Path(cached_file(f"--labels {spec}", known[spec], f"labels/{spec}.json"))
