"""Helpers of the embedding stage's tests: contents of datasets and directories, small shards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import lit_fast.embed.importers.import_features
import lit_fast.embed.index
import lit_fast.embed.share.push
import lit_fast.embed.verify.dataset  # noqa: F401  (loads all modules that have SHARD)
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


def patch_shard_rows(patch: pytest.MonkeyPatch, rows: int = 1024) -> None:
    """Set the rows of a shard in all modules; by default a shard is one block."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lit_fast.") and hasattr(module, "SHARD"):
            patch.setattr(module, "SHARD", rows)
    patch.setattr("lit_fast.data.shards._BLOCKS", rows // 1024)
