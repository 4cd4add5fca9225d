"""metrics.jsonl: valid JSON, and the time of repeated steps."""

from __future__ import annotations

import json

from lit_fast.config import Config
from lit_fast.runs.metrics import RunCost, read_metrics
from lit_fast.train.tracking.metrics_writer import MetricsWriter
from lit_fast.train.tracking.receipt import read_cost


def test_metrics_writer_writes_null_for_numbers_that_are_not_finite(tmp_path):
    writer = MetricsWriter(tmp_path, Config(), 0, RunCost())
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "bias": -10.0})
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "bias": -10.0}


def test_metrics_writer_keeps_the_time_of_steps_after_the_last_checkpoint(tmp_path):
    """The run is killed after step 30 with its last checkpoint at step 20, and again before its first line."""
    writer = MetricsWriter(tmp_path, Config(), 0, RunCost())
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0, "elapsed_seconds": 10.0 * step, "chip_hours": 0.1 * step})
    writer.close()
    for _ in range(2):
        cost = read_cost(tmp_path)
        assert cost == RunCost(300.0, 3.0)
        MetricsWriter(tmp_path, Config(), 20, cost).close()
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == [10, 20]
