"""The fuzz of `benchmarks.fuzz_sources` for some seconds, and that it sees what it looks for."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fuzz_inputs import MAKERS, SECRET, Input, mark
from benchmarks.fuzz_sources import FindingError, check
from tests.helpers import tar_bytes

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "words",
    [["--first", "0", "--inputs", "1000"], ["--first", str(random.randrange(10**9)), "--seconds", "6"]],
    ids=["fixed", "random"],
)
def test_fuzz_of_the_readers_finds_nothing(words: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz_sources", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    assert " 0 findings" in done.stdout


def tar_input(image: int, text: int) -> Input:
    members = [("a.jpg", mark(image).encode()), ("a.txt", mark(text).encode())]
    return Input("tar", "0.tar", {"0.tar": tar_bytes(members)}, {image})


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("format", MAKERS)
def test_check_passes_good_inputs_and_counts_their_rows(format: str, indexed: bool, tmp_path: Path) -> None:
    given, counts = MAKERS[format](random.Random(1)), Counter[str]()
    check(given, tmp_path / "run", counts, indexed=indexed)
    assert counts[f"{format} row"] >= len(given.rows) > 0


def test_check_sees_wrong_pairs_lost_rows_and_images_from_elsewhere(tmp_path: Path) -> None:
    good = tar_input(1, 1)
    wrong = {
        "has the captions": tar_input(1, 2),
        "has the label -1": replace(good, labels={1: 1}),
        "1 rows are missing": replace(good, rows={1, 2}),
        "a good input is refused": replace(good, files={"0.tar": b"\x1f\x8b"}),
        "a good input is damaged": replace(good, files={"0.tar": b"no tar"}),
        "outside the directory is read": tar_input(SECRET, SECRET),
    }
    for problem, given in wrong.items():
        with pytest.raises(FindingError, match=problem):
            check(given, tmp_path / "run", Counter(), indexed=False)
    check(good, tmp_path / "run", Counter(), indexed=True)
