"""Weights & Biases, the real package without a network."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_fast.config import Config, LogConfig
from lit_fast.runs.metrics import RunCost, read_metrics
from lit_fast.train.tracking.metrics_writer import MetricsWriter

wandb = pytest.importorskip("wandb")

CONFIG = Config(log=LogConfig(wandb="project"), seed=7)


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    """wandb reads the environment once per process."""
    wandb.teardown()
    yield
    wandb.teardown()


def records(run: Path) -> Iterator[Any]:
    """What wandb wrote, part after part: records of LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 2**15 - at % 2**15 < 7:  # no room for a header: the next block
                at += 2**15 - at % 2**15
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # in one piece, or the last one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                whole = b""
                yield record


def history(run: Path) -> list[dict[str, Any]]:
    """The logged figures with their steps."""
    lines = []
    for record in records(run):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            lines.append({"step": record.history.step.num} | {k: v for k, v in items.items() if k[0] != "_"})
    return lines


def test_two_parts_are_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricsWriter(tmp_path, CONFIG, 0, RunCost())
    writer.write(5, {"loss": 3.5, "bias": float("nan")})
    writer.write(10, {"loss": 3.0})
    writer.write(10, {"dev/acc1": 0.5})
    writer.close()
    writer = MetricsWriter(tmp_path, CONFIG, 10, RunCost(20.0, 0.1))
    writer.write(15, {"loss": 2.5})
    writer.close()

    begun = [r.run for r in records(tmp_path) if r.WhichOneof("record_type") == "run"]
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert {(r.run_id, r.project, r.display_name) for r in begun} == {(identity, "project", tmp_path.name)}
    seeds = {u.value_json for r in begun for u in r.config.update if u.key == "seed"}
    assert seeds == {"7"}
    lines = history(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(5, 3.5), (10, 3.0), (15, 2.5)]
    assert lines[1]["dev/acc1"] == 0.5


@pytest.mark.parametrize("key", ["", "a" * 40])
def test_without_key_or_network_it_is_kept_for_later(tmp_path, monkeypatch, capsys, key):
    """Nothing listens at the address; wandb gives up after a while that is shortened here."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("lit_fast.train.tracking.wandb._START_SECONDS", 2.0)
    writer = MetricsWriter(tmp_path, CONFIG, 0, RunCost())
    writer.write(5, {"loss": 3.5})
    writer.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: wandb: ")]
    assert len(warnings) == 1
    assert f"it is kept in {tmp_path / 'wandb'}, for `wandb sync`" in warnings[0]
    assert history(tmp_path) == [{"step": 5, "loss": 3.5}]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 3.5}]


def test_what_it_raises_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricsWriter(tmp_path, CONFIG, 0, RunCost())
    wandb.run.finish()  # as if its process had died
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.count("going on without") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
