"""Fixtures of the embedding stage's tests."""

from __future__ import annotations

import pytest

from tests.embed.contents import patch_shard_rows


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 1024 rows, so that a small dataset has several."""
    patch_shard_rows(monkeypatch)
