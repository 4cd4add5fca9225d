"""What a dataset holds, and what a directory holds."""

from __future__ import annotations

from pathlib import Path

from lit_fast.data.dataset import Dataset


def keys(dataset: Dataset) -> list[str]:
    """Of all rows, in order."""
    return [key for block in dataset.iter_blocks() for key in block.keys]


def captions(dataset: Dataset) -> list[list[str]]:
    """Of all rows, in order."""
    return [texts for block in dataset.iter_captions() for texts in block]


def tree(path: Path | str) -> dict[str, bytes]:
    """The files below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}
