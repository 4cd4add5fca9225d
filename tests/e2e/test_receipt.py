"""Metrics, receipt, report and profile of a run that was stopped and resumed, and `lit-fast compare`."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.runs.metrics import read_metrics
from lit_fast.train.tracking.report import write_report
from lit_fast.utils.format import format_duration
from tests.synthetic import make_dataset

ROOT = Path(__file__).parents[2]
CONFIG = """
[text]
variant = "mu"
dtype = "float32"
[stream]
global_batch = 64
captions_per_image = 2
[optimizer]
name = "adam"
learning_rate = 3e-3
warmup_steps = 10
[evaluate]
every_steps = 50
[checkpoint]
every_steps = 100
[log]
every_steps = 5
"""
STEPS = 200


def strict_json(text: str) -> Any:
    """Parse standard JSON, which has no NaN and Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def stop_after(step: int, metrics: Path, stopped: threading.Event) -> None:
    while not stopped.is_set():
        if any(line["step"] >= step for line in read_metrics(metrics)):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Train a run that is stopped after some steps, copy it, and resume it to its end."""
    path = tmp_path_factory.mktemp("receipt")
    make_dataset(path / "d", 300, captions=3, invalid=(17,))
    (path / "c.toml").write_text(CONFIG)
    run = path / "<run> & co"
    # Overrides may precede the config.
    command = ["train", "--steps", str(STEPS), "--evaluate.zero_shot", str(path / "d")]
    command += [str(path / "c.toml"), "--evaluate.retrieval", str(path / "d"), "--workdir", str(run)]
    command += ["--dataset", str(path / "d"), "--profile-steps", f"{STEPS - 20}:{STEPS - 17}"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    finished = threading.Event()
    watcher = threading.Thread(target=stop_after, args=(20, run / "metrics.jsonl", finished))
    watcher.start()
    status = main(command)
    finished.set()
    watcher.join()
    assert status == 128 + signal.SIGTERM
    shutil.copytree(run, path / "stopped")
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(command)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert status == 0, err.getvalue()
    shown = SimpleNamespace(out=out.getvalue(), err=err.getvalue())
    return SimpleNamespace(path=path, run=run, stopped=path / "stopped", shown=shown)


def receipt_of(run: Path) -> dict[str, Any]:
    return strict_json((run / "receipt.json").read_text())


def test_receipt_of_a_stopped_run_counts_its_steps(case):
    receipt, lines = receipt_of(case.stopped), read_metrics(case.stopped / "metrics.jsonl")
    (saved,) = (int(p.name) for p in (case.stopped / "checkpoints").iterdir())
    assert 20 <= saved < STEPS
    assert receipt["status"] == "stopped"
    assert (receipt["steps_done"], receipt["steps"]) == (saved, STEPS)
    assert receipt["pairs_seen"] == saved * 64 * 2
    assert receipt["elapsed_seconds"] > lines[-1]["elapsed_seconds"] > 0
    assert receipt["config"]["stream.global_batch"] == 64
    assert receipt["config"]["steps"] == STEPS


def test_receipt_of_a_resumed_run_adds_up_its_parts(case):
    before, receipt = receipt_of(case.stopped), receipt_of(case.run)
    lines = read_metrics(case.run / "metrics.jsonl")
    assert (receipt["status"], receipt["steps_done"]) == ("finished", STEPS)
    assert receipt["pairs_seen"] == STEPS * 64 * 2
    (restart,) = (line for line in lines if set(line) == {"step", "elapsed_seconds", "chip_hours"})
    assert restart["step"] == before["steps_done"]
    assert restart["elapsed_seconds"] == before["elapsed_seconds"]
    elapsed = [line["elapsed_seconds"] for line in lines if "elapsed_seconds" in line]
    assert elapsed == sorted(elapsed)
    assert receipt["elapsed_seconds"] >= elapsed[-1]
    assert receipt["chip_hours"] == pytest.approx(4 * receipt["elapsed_seconds"] / 3600)  # four devices
    assert f"trained {STEPS} steps in " in case.shown.out
    shown = re.findall(r"steps in (\w+);", case.shown.out)[0]
    assert shown in {format_duration(receipt["elapsed_seconds"] + d) for d in (-1, 0, 1)}

    # The speed counts the time of steps only, so it is above the average over all time.
    assert receipt["pairs_per_second"] > receipt["pairs_seen"] / receipt["elapsed_seconds"]
    assert receipt["seconds_per_step"] * receipt["pairs_per_second"] == pytest.approx(64 * 2, rel=0.5)
    assert 0 <= receipt["data_wait_share"] <= 1
    assert "mfu" not in receipt  # a CPU's peak is not known
    assert 10**8 < receipt["peak_process_memory_bytes"] < 10**11

    figures = [line for line in lines if "d/acc1" in line]
    assert [line["step"] for line in figures] == [50, 100, 150, 200]
    assert receipt["evaluation"]["final"]["step"] == STEPS
    assert receipt["evaluation"]["final"]["figures"]["d/acc1"] == figures[-1]["d/acc1"]
    found = receipt["evaluation"]["best"]["d/text_retrieval_recall@10"]
    assert found["value"] == max(line["d/text_retrieval_recall@10"] for line in figures)
    assert {r["task"] for r in receipt["evaluation"]["results"]} == {
        "zeroshot_classification",
        "zeroshot_retrieval",
    }


def test_receipt_names_inputs_hardware_and_versions(case):
    receipt = receipt_of(case.run)
    dataset = open_dataset(case.path / "d")
    tower = json.loads((case.path / "d/features/tower/tower.json").read_text())
    tokens = json.loads((case.path / "d/tokens/words/tokens.json").read_text())
    digests = receipt["digests"]
    assert digests["dataset"] == dataset.digest
    assert digests["tower"] == tower["identity"]
    assert digests["tokens"] == tokens["identity"]
    assert re.fullmatch(r"[0-9a-f]{32}", digests["stream"])
    assert receipt["hardware"]["devices"] == 4
    memory = receipt["memory"]  # the fastest policy on a CPU fits
    assert (memory["keep"], memory["parts"], memory["bytes_by"]) == ("products", 1, "estimate")
    assert 0 < memory["bytes"] < memory["limit_bytes"]
    assert receipt["hardware"]["host_cores"] == os.cpu_count()
    assert receipt["versions"]["jax"] == jax.__version__
    libraries = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy"}
    assert set(receipt["versions"]) == {"lit_fast", "python"} | libraries


def test_receipt_names_the_commit_only_of_code_that_is_a_checkout(case, tmp_path):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    git = receipt_of(case.run)["git"]
    assert (git and git["commit"]) == (head.stdout.strip() or None)
    # The same package, untracked inside another repository, as in a .venv.
    code = "from lit_fast.train.tracking.receipt import git_revision; print(git_revision())"
    shutil.copytree(ROOT / "lit_fast", tmp_path / "lit_fast", ignore=shutil.ignore_patterns("__pycache__"))
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True)
    python = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run(["git", "init", "-q"])
    assert run(python, env=environment).stdout == "None\n"
    run(["git", "add", "lit_fast"])
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "All"])
    commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
    assert run(python, env=environment).stdout == f"{{'commit': '{commit}', 'dirty': False}}\n"
    (tmp_path / "lit_fast/errors.py").open("a").write("# changed")
    assert run(python, env=environment).stdout == f"{{'commit': '{commit}', 'dirty': True}}\n"


class Elements(HTMLParser):
    """Collects the elements of a page and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line",):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def elements(text: str) -> Elements:
    found = Elements()
    found.feed(text)
    assert found.open == []
    assert "script" not in found.tags
    assert "http" not in text
    assert "url(" not in text
    return found


def test_report_has_all_charts_and_the_final_metrics(case):
    text = (case.run / "report.html").read_text()
    found = elements(text)
    assert "".join(found.headings).startswith("<run> & co")
    for heading in (
        "Loss", "Temperature", "Bias", "Norm of the gradients", "Learning rate", "Pairs per second",
        "Share of the time that waits for data", "Positive logit", "Negative logit", "d, against steps",
        "d, against hours", "Receipt", "Configuration",
    ):  # fmt: skip
        assert heading in found.headings
    assert found.tags.count("svg") == found.headings.index("Receipt") - found.headings.index(
        "d, against steps"
    )
    final = receipt_of(case.run)["evaluation"]["final"]["figures"]["d/acc1"]
    assert f"{100 * final:.1f} %" in text
    assert f"{STEPS} of {STEPS}" in text
    assert "stopped" in (case.stopped / "report.html").read_text()


def test_report_of_very_many_lines_stays_small(case, tmp_path):
    run = tmp_path / "long"
    shutil.copytree(case.run, run, ignore=shutil.ignore_patterns("checkpoints", "profile"))
    last = json.dumps({"step": 10**9, "loss": 7.25})
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(100_000):
            line = {"step": step, "loss": 5 + step % 7, "bias": -10, "d/acc1": 0.5}
            file.write(json.dumps(line) + "\n")
        file.write(last)
    write_report(run)
    text = (run / "report.html").read_text()
    elements(text)
    assert len(text) < 200_000
    assert "7.25" in text


def test_profile_has_the_requested_steps(case):
    (file,) = case.run.glob("profile/**/*.trace.json.gz")
    assert list(case.run.glob("profile/**/*.xplane.pb"))
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name") == "train"]
    assert sorted(int(e["args"]["step_num"]) for e in steps) == list(range(STEPS - 20, STEPS - 16))
    assert f"profile of steps {STEPS - 20}:{STEPS - 17} in " in case.shown.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("9:8", "is empty"),
        ("8", "is not A:B"),
        (":", "is not A:B"),
        ("a:b", "is not A:B"),
        ("-3:5", "is not A:B"),
        ("1:5", "must be within 2:200"),
        ("190:201", "must be within 2:200"),
    ],
)
def test_profile_of_invalid_steps_is_refused(case, capsys, given, message):
    command = ["train", str(case.path / "c.toml"), "--workdir", str(case.path / "new"), "--dataset", "none"]
    assert main([*command, "--steps", "200", f"--profile-steps={given}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (case.path / "new").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--optimizer.learning_rte 3 {c} --workdir w", "did you mean optimizer.learning_rate?"),
        ("--optimizer.learning_rte {c} --workdir w", "did you mean optimizer.learning_rate?"),
        ("{c} --workdir w --stepz", "did you mean steps?"),
        ("--steps many {c} --workdir w", "steps must be a whole number, not 'many'"),
        ("--workdir w --steps=0 {c}", "steps must be at least 1"),
    ],
)
def test_overrides_before_the_config_are_checked(case, capsys, given, message):
    assert main(["train", *given.format(c=case.path / "c.toml").split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_compare_shows_differing_keys_and_results(case, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    killed = tmp_path / "killed"
    shutil.copytree(case.stopped, killed)
    (killed / "receipt.json").unlink()
    config = killed / "config.toml"
    config.write_text(config.read_text().replace("learning_rate = 0.003", "learning_rate = 0.001"))
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    out, page = tmp_path / "c.json", tmp_path / "c.html"
    runs = [str(p) for p in (case.run, case.stopped, killed)]
    assert main(["compare", *runs, "--json", str(out), "--out", str(page)]) == 0
    rows = {line[:45].split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["status"].split() == ["status", "finished", "stopped", "unfinished"]
    assert rows["optimizer.learning_rate"].split()[1:] == ["0.003", "0.003", "0.001"]
    assert "seed" not in rows
    assert rows["text.keep, in use"].split()[3:] == ["products", "products", "-"]
    receipt = receipt_of(case.run)
    final = receipt["evaluation"]["final"]["figures"]["d/acc1"]
    assert rows["d/acc1, final %"].split()[3] == f"{100 * final:.1f}"

    value = strict_json(out.read_text())
    assert value["differing"] == ["optimizer.learning_rate"]
    one, two, three = value["runs"]
    assert one["elapsed_seconds"] == receipt["elapsed_seconds"]
    assert one["best"] == receipt["evaluation"]["best"]
    assert (two["status"], two["steps_done"]) == ("stopped", receipt_of(case.stopped)["steps_done"])
    lines = read_metrics(killed / "metrics.jsonl")
    assert (three["status"], three["steps_done"]) == ("unfinished", lines[-1]["step"])
    assert 0 < three["elapsed_seconds"] < two["elapsed_seconds"]
    found = elements(page.read_text())
    assert "Loss" in found.headings
    assert "d/acc1, against hours" in found.headings

    monkeypatch.setenv("COLUMNS", "60")  # too narrow for three runs: two tables
    assert main(["compare", *runs]) == 0
    narrow = capsys.readouterr().out
    assert narrow.count("\nstatus") == 2
    assert "unfinished" in narrow
    assert max(map(len, narrow.splitlines())) <= 60


def test_compare_of_a_damaged_run_is_refused(case, capsys, tmp_path):
    def mistake(*arguments: object) -> str:
        assert main(["compare", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none does not exist" in mistake(case.run, tmp_path / "none")
    assert "is not a run" in mistake(case.path / "d")
    assert f"--out {tmp_path} is a directory" in mistake(case.run, "--out", tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for content, problem in (
        ("steps = ", "not TOML"),
        ('steps = "x"', "damaged"),
        ("", "damaged"),
        ("[steps]\na = 1", "damaged"),
        ("\0", "not TOML"),
    ):
        (copy / "config.toml").write_text(content)
        assert f"copy/config.toml is {problem}" in mistake(case.run, copy)
    (copy / "config.toml").write_text("steps = 3")
    assert main(["compare", str(copy)]) == 0  # a run without metrics
    for content in ("{", "[]", '{"status": "x", "steps_done": "x", "hardware": 3}'):
        (copy / "receipt.json").write_text(content)
        assert "copy/receipt.json is damaged" in mistake(copy)
