"""Fixtures of the embedding stage's tests."""

from __future__ import annotations

import pytest

import embed.extract
import embed.verify
import embed.verify_features
import lit_fast.dataset
import lit_fast.features


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 1024 rows, so that a small dataset has several."""
    for module in (lit_fast.dataset, lit_fast.features, embed.extract, embed.verify, embed.verify_features):
        monkeypatch.setattr(module, "SHARD", 1024)
