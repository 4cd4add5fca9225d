"""Rates of a training, and the advice where images are decoded too slowly."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import cast

import jax
import pytest

from lit_fast.runs.metrics import RunCost
from lit_fast.train.input_pipeline.images import Pixels
from lit_fast.train.tracking.throughput import ThroughputMeter


def meter(unreadable: int | None) -> ThroughputMeter:
    pixels = SimpleNamespace(unreadable=dict.fromkeys(range(unreadable or 0)))
    return ThroughputMeter(
        pairs_per_step=20,
        flops_per_step=1.0,
        devices=1,
        start_step=0,
        cost_before=RunCost(),
        started=time.monotonic(),
        images_per_step=10,
        pixels=None if unreadable is None else cast(Pixels, pixels),
    )


def test_meter_counts_images_where_they_are_decoded() -> None:
    values = meter(3).read(5)
    assert values["images_per_second"] == values["pairs_per_second"] / 2
    assert values["unreadable_images"] == 3
    assert "images_per_second" not in meter(None).read(5)


def test_advice_follows_the_share_of_time_that_waited_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast, frozen = meter(0), meter(0), meter(None)
    with slow.waiting, frozen.waiting:
        time.sleep(0.02)
    with fast.paused:  # the first batch, evaluation and checkpoints do not count
        time.sleep(0.02)
    assert slow.advice().startswith("waiting for images ")
    assert "on a CPU decoding and the towers share the cores" in slow.advice()
    assert fast.advice() == frozen.advice() == ""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "add cores or image.workers" in slow.advice()
