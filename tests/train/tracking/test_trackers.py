"""TensorBoard, Weights & Biases and trackio: the real packages without a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from lit_fast.config import Config, LogConfig
from lit_fast.errors import UserError
from lit_fast.runs.metrics import RunCost, read_metrics
from lit_fast.train.tracking import trackers
from lit_fast.train.tracking.metrics_writer import MetricsWriter

CONFIG = Config(log=LogConfig(report_to="wandb", project="project"), seed=7)


@pytest.fixture
def wandb(monkeypatch):
    """The package, as in a new process: it reads the environment once."""
    wandb = pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    wandb.teardown()
    yield wandb
    wandb.teardown()


def records(run: Path) -> Iterator[Any]:
    """Yield the records that wandb wrote: LevelDB's log format in blocks of 32 KiB."""
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


def test_wandb_resumed_training_is_one_run(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricsWriter(tmp_path, CONFIG, 0, RunCost())
    writer.write(5, {"loss": 3.5, "bias": float("nan")})
    writer.write(10, {"loss": 3.0})
    writer.write(10, {"dev/acc1": 0.5})
    writer.close()
    writer = MetricsWriter(tmp_path, CONFIG, 10, RunCost(20.0, 0.1))
    writer.write(15, {"loss": 2.5})
    writer.close()

    started = [r.run for r in records(tmp_path) if r.WhichOneof("record_type") == "run"]
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert {(r.run_id, r.project, r.display_name) for r in started} == {(identity, "project", tmp_path.name)}
    seeds = {u.value_json for r in started for u in r.config.update if u.key == "seed"}
    assert seeds == {"7"}
    lines = history(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(5, 3.5), (10, 3.0), (15, 2.5)]
    assert lines[1]["dev/acc1"] == 0.5


@pytest.mark.parametrize("key", ["", "a" * 40])
def test_wandb_without_key_or_network_keeps_the_run_for_later(wandb, tmp_path, monkeypatch, capsys, key):
    """Nothing listens at the address; wandb gives up after a while that is shortened here."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(trackers, "_WANDB_START_SECONDS", 2.0)
    writer = MetricsWriter(tmp_path, CONFIG, 0, RunCost())
    writer.write(5, {"loss": 3.5})
    writer.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: wandb: ")]
    assert len(warnings) == 1
    assert f"the run is kept in {tmp_path / 'wandb'}, for `wandb sync`" in warnings[0]
    assert history(tmp_path) == [{"step": 5, "loss": 3.5}]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 3.5}]


def test_wandb_failure_does_not_end_the_training(wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricsWriter(tmp_path, CONFIG, 0, RunCost())
    wandb.run.finish()  # as if its process had died
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.count("warning: wandb: ") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_environment_overrides_the_config(wandb, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    for name, value in {"MODE": "offline", "PROJECT": "p", "NAME": "n", "RUN_ID": "i"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    writer = MetricsWriter(tmp_path / "run", CONFIG, 0, RunCost())
    writer.write(1, {"loss": 2.0})
    writer.close()
    (run,) = (r.run for r in records(tmp_path / "elsewhere") if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_id) == ("p", "n", "i")
    assert not (tmp_path / "run/wandb").exists()


# Two parts of a run: killed after step 10 with a checkpoint at step 5, then resumed. trackio reads its environment on
# import, so this is a process of its own.
TRACKIO = """
import sys
from lit_fast.config import Config, LogConfig
from lit_fast.runs.metrics import RunCost
from lit_fast.train.tracking.metrics_writer import MetricsWriter
config = Config(log=LogConfig(report_to="trackio", project="project"), seed=7)
for start, steps in ((0, (5, 10)), (5, (10, 15))):
    writer = MetricsWriter(sys.argv[1], config, start, RunCost())
    for step in steps:
        writer.write(step, {"loss": 20.0 - step, "dev/acc1": 0.5})
    writer.close()
from trackio.sqlite_storage import SQLiteStorage
import json
(name,) = SQLiteStorage.get_runs("project")
logs = SQLiteStorage.get_logs("project", name)
print(json.dumps([name, [[l["step"], l["loss"], l["dev/acc1"]] for l in logs if "loss" in l]]))
"""


def test_trackio_resumed_training_is_one_local_run_without_repeated_steps(tmp_path):
    pytest.importorskip("trackio")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO_")}
    environment["TRACKIO_DIR"] = str(tmp_path / "trackio")
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path / "run")],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    name, logs = json.loads(done.stdout)  # trackio itself prints nothing there
    assert name == json.loads((tmp_path / "run/trackio.json").read_text())["name"]
    assert name.startswith("run-")
    assert logs == [[5, 15.0, 0.5], [10, 10.0, 0.5], [15, 5.0, 0.5]]
    assert f"trackio: run {name}; show it with: trackio show" in done.stderr


def test_report_to_selects_the_trackers(tmp_path):
    for number, (report_to, expected) in enumerate(
        {"": [], "tensorboard": ["tensorboard"], " tensorboard,tensorboard": ["tensorboard"]}.items()
    ):
        run = tmp_path / str(number)
        writer = MetricsWriter(run, Config(log=LogConfig(report_to=report_to)), 0, RunCost())
        writer.write(1, {"loss": 2.0})
        writer.close()
        assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", *expected]


def test_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trackers.check_trackers(Config(log=LogConfig(report_to="tensorboard")))
    with pytest.raises(
        UserError, match=r'run: pip install "lit-fast\[trackio\]" or remove trackio from log.report_to'
    ):
        trackers.check_trackers(Config(log=LogConfig(report_to="tensorboard,trackio")))


def test_tensorboard_failure_does_not_end_the_training(tmp_path, capsys):
    (tmp_path / "tensorboard").touch()  # where its directory should be
    writer = MetricsWriter(tmp_path, Config(), 0, RunCost())
    writer.write(1, {"loss": 2.0})
    writer.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: tensorboard: ")
    assert warning.endswith("; continuing without it, metrics.jsonl is complete")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_tensorboard_events_hold_the_metrics_of_both_parts_of_a_run(tmp_path):
    for start_step in (0, 10):
        writer = MetricsWriter(tmp_path, Config(), start_step, RunCost())
        writer.write(start_step + 10, {"loss": 2.0, "dev/acc1": 0.5})
        writer.close()
        time.sleep(1.1)  # names of event files are in seconds
    events = [event for file in sorted(tmp_path.glob("tensorboard/events.*")) for event in read_events(file)]
    found = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert found == [(s, *v) for s in (10, 20) for v in (("loss", 2.0), ("dev/acc1", 0.5))]
    assert [e.step for e in events if e.session_log.status] == [1, 11]


def read_events(file: Path) -> Iterator[Event]:
    """Yield the events of a file: records of length, checksum, data, checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
