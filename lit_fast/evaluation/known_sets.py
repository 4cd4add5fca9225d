"""The evaluation sets and labels that can be named on the command line, from `known_sets.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from lit_fast.errors import UserError
from lit_fast.storage.cache import cached_file
from lit_fast.storage.files import is_file


@cache
def known_evaluations() -> dict[str, dict[str, Any]]:
    """Return the table: key -> task ("zero-shot", "retrieval" or "labels"), and `classes` or `url`."""
    return tomllib.loads((resources.files(__package__) / "known_sets.toml").read_text(encoding="utf-8"))


def resolve_labels(spec: str) -> str:
    """Return the file of labels: `spec` itself if it is a file, or the download of a key of the table.

    Raises:
      UserError: there is no such file or key, or the download failed.
    """
    if is_file(spec):
        return spec
    urls = {key: row["url"] for key, row in known_evaluations().items() if row["task"] == "labels"}
    if spec not in urls:
        raise UserError(
            f"--labels {spec} is not a file; give a JSON file or one of the known labels: {', '.join(urls)}"
        )
    return cached_file(f"--labels {spec}", urls[spec], f"labels/{spec}.json")
