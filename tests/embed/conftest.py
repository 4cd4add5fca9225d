"""Fixtures of the embedding stage's tests."""

from __future__ import annotations

import pytest

import lit_fast.data.dataset
import lit_fast.data.features
import lit_fast.embed.extract
import lit_fast.embed.shard_writer
import lit_fast.embed.verify.records
import lit_fast.embed.verify.sample


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 1024 rows, so that a small dataset has several."""
    for module in (
        lit_fast.data.dataset,
        lit_fast.data.features,
        lit_fast.embed.extract,
        lit_fast.embed.shard_writer,
        lit_fast.embed.verify.records,
        lit_fast.embed.verify.sample,
    ):
        monkeypatch.setattr(module, "SHARD", 1024)
