"""The batches of a shard."""

from __future__ import annotations

import pytest

from lit_fast.embed.shard_writer import batch_spans


def test_batch_spans_of_a_new_shard_cover_its_rows() -> None:
    assert batch_spans(0, 20, 4, 2) == [(0, 8), (8, 8), (16, 4)]
    assert batch_spans(20, 20, 4, 2) == []


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("done", range(20))
def test_batch_spans_of_a_started_shard_keep_the_rows_of_each_device(done: int, devices: int) -> None:
    """Each device gets the same groups of 4 rows as in an uninterrupted run on one device."""
    groups = [
        (first + lo, min(4, rows - lo))
        for first, rows in batch_spans(done, 20, 4, devices)
        for lo in range(0, rows, 4)
    ]
    assert groups == batch_spans(0, 20, 4, 1)[done // 4 :]
