"""What the lines of a `metrics.jsonl` say about the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.runs.metrics import (
    Best,
    RunCost,
    best,
    curve,
    evaluations,
    mean_speed,
    metric_names,
    read_metrics,
    run_cost,
)

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 5.0, "elapsed_seconds": 36.0, "chip_hours": 0.04},
    {"step": 10, "loss": None, "elapsed_seconds": 72.0, "chip_hours": 0.08},
    {"step": 10, "dev/acc1": 0.5, "dev/acc5": 0.75},
    {"step": 20, "loss": 3.0, "elapsed_seconds": 108.0, "chip_hours": 0.12},
    {"step": 20, "dev/acc1": 0.5, "dev/acc5": 0.7},
]


def test_curves_against_steps_and_hours() -> None:
    assert curve(LINES, "loss") == [(1, 5.0), (20, 3.0)]
    assert curve(LINES, "loss", hours=True) == [(0.01, 5.0), (0.03, 3.0)]
    assert curve(LINES, "dev/acc5", hours=True) == [(0.02, 0.75), (0.03, 0.7)]  # when its step was done
    assert metric_names(LINES) == ["loss", "elapsed_seconds", "chip_hours", "dev/acc1", "dev/acc5"]


def test_final_and_best_evaluation() -> None:
    assert [e["step"] for e in evaluations(LINES)] == [10, 20]
    assert evaluations(LINES)[-1]["figures"] == {"dev/acc1": 0.5, "dev/acc5": 0.7}
    assert best(LINES) == {"dev/acc1": Best(0.5, 10), "dev/acc5": Best(0.75, 10)}


def test_run_cost_is_the_highest_recorded() -> None:
    assert run_cost([]) == RunCost(0.0, 0.0)
    assert run_cost([*LINES, {"elapsed_seconds": 100.0, "chip_hours": 9.0}]) == RunCost(108.0, 0.12)
    assert run_cost([*LINES, {"elapsed_seconds": 110.0, "chip_hours": 0.13}]) == RunCost(110.0, 0.13)


intervals = st.lists(
    st.tuples(st.integers(1, 50), st.floats(1e-3, 10), st.floats(0, 1), st.booleans()),
    min_size=1,
    max_size=20,
)


@given(intervals, st.integers(1, 1000))
def test_mean_speed_is_all_pairs_over_all_seconds(
    parts: list[tuple[int, float, float, bool]], pairs: int
) -> None:
    lines: list[dict[str, Any]] = []
    step, steps, seconds, waited = 0, 0, 0.0, 0.0
    for count, each, share, restarted in parts:
        if restarted:  # steps whose line was lost: nobody knows how long they took
            step += 3
            lines.append({"step": step, "elapsed_seconds": 1.0, "chip_hours": 1.0})
        step, steps = step + count, steps + count
        seconds, waited = seconds + count * each, waited + count * each * share
        lines.append(
            {
                "step": step,
                "seconds_per_step": each,
                "pairs_per_second": pairs / each,
                "data_wait_share": share,
            }
        )
        lines.append({"step": step, "dev/acc1": 0.5})
    assert mean_speed(lines) == pytest.approx(
        {
            "seconds_per_step": seconds / steps,
            "pairs_per_second": pairs * steps / seconds,
            "data_wait_share": waited / seconds,
        }
    )
    assert mean_speed([]) == {}


@pytest.mark.parametrize(
    "bad", ["[1]", "{}", '{"step": "1"}', '{"step": true}', "[" * 10**5, '{"step": 3', "\0"]
)
def test_read_metrics_ends_at_the_first_incomplete_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in LINES) + bad + "\n" + json.dumps(LINES[0]) + "\n"
    )
    assert read_metrics(path) == LINES
