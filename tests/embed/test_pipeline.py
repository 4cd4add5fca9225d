"""Running the tower on batches."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lit_fast.embed.pipeline import StallTimer, run_tower
from lit_fast.errors import UserError
from lit_fast.towers.loader import Batch


def test_run_tower_yields_every_batch_with_its_own_output() -> None:
    batches = [Batch(i, 1, np.full((2, 1, 1, 3), i, np.uint8), {}) for i in range(11)]
    stalls = StallTimer()
    outputs = list(run_tower(iter(batches), lambda images: jax.numpy.sum(images, axis=(1, 2, 3)), stalls))
    assert [batch.first for batch, _ in outputs] == list(range(11))
    assert [output.tolist() for _, output in outputs] == [[3 * i, 3 * i] for i in range(11)]
    assert stalls.images + stalls.device > 0
    assert "waiting for" in stalls.note()


def test_run_tower_without_device_memory_names_the_remedy() -> None:
    """JAX raises its own error for an array of 64 TiB; a limit on the process makes XLA hang instead."""
    batch = Batch(0, 1, np.zeros((1, 4, 4, 3), np.uint8), {})
    with pytest.raises(UserError, match="out of memory; lower --batch-size"):
        list(run_tower(iter([batch]), lambda images: jax.numpy.zeros(1 << 46, jax.numpy.uint8), StallTimer()))
