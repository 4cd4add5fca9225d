"""The benchmark of faults sees what it looks for."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.faults import Faults
from benchmarks.faults_case import Ended, forked


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path, SimpleNamespace(), random.Random(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "log", "problem"),
    [
        (0, "done", ""),
        (2, "x\nlit-fast: error: d is damaged; restore it", ""),
        (1, "d is WRONG in tokens words: 1 findings", ""),
        (-signal.SIGKILL, "half a li", ""),
        (0, "Traceback (most recent call last):\nValueError: x", "traceback: ValueError: x"),
        (2, "", "status 2 without a line"),
        (-signal.SIGSEGV, "", "died of signal 11"),
        (-signal.SIGALRM, "", "hangs"),
    ],
)
def test_problem_of_a_command_names_what_no_user_may_see(status: int, log: str, problem: str) -> None:
    found = Ended(status, log, 0.1).problem
    assert problem in found
    assert bool(problem) == bool(found)


def test_forked_reports_status_output_and_kills(tmp_path: Path) -> None:
    def work(status: int = 3) -> int:
        os.write(1, b"out")
        return status

    done = forked(work, tmp_path / "log")
    assert (done.status, done.log, done.killed) == (3, "out", False)
    done = forked(lambda: time.sleep(60), tmp_path / "log", kill_after=0.05)
    assert done.killed
    assert done.seconds < 30
    failed = forked(lambda: 1 / 0, tmp_path / "log")  # type: ignore[return-value]
    assert failed.problem == "traceback: ZeroDivisionError: division by zero"


def test_compare_finds_differing_missing_and_additional_files(faults: Faults, capsys: Any) -> None:
    wanted = {"a": "1", "b": "2"}
    assert faults.compare(wanted, {"a": "1", "b": "2"}, "here", "")
    for got in ({"a": "1"}, {"a": "1", "b": "3"}, {**wanted, ".x.tmp": "0"}):
        assert not faults.compare(wanted, got, "here", "")
    assert len(faults.findings) == 3
    assert "3 findings" in faults.table()
