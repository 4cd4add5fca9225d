"""Lines and bar of a training on the terminal."""

from __future__ import annotations

import sys

from lit_fast.train.tracking.console import Console

VALUES = {"loss": 3.25, "pairs_per_second": 1234.5, "data_wait_share": 0.012}


def test_console_lines_are_aligned(capsys):
    console = Console(65_000, 0)
    console.log(50, VALUES)
    console.log(65_000, {"loss": float("nan"), "pairs_per_second": 1e6, "data_wait_share": 1.0})
    console.log(65_000, VALUES | {"mfu": 0.456})
    console.close()
    one, two, three = capsys.readouterr().err.splitlines()
    assert one == "step     50/65,000  loss   3.2500      1,234 pairs/s  data wait   1.2 %       ? left"
    assert len(one) == len(two)
    assert "  MFU 45.6 %  data wait   1.2 %" in three


def test_console_on_a_terminal_is_one_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    console = Console(10, 0)
    for number in range(1, 11):
        console.log(number, VALUES)
        console.advance()
    console.close()
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert all(len(line.removeprefix("\x1b[K")) < 70 for line in text.strip().split("\r"))
    assert "[########################] 10/10 steps" in text


def test_console_of_a_trained_image_tower_shows_images_per_second(capsys):
    Console(10, 0).log(1, VALUES | {"images_per_second": 617.25, "mfu": 0.5})
    assert "1,234 pairs/s        617 images/s  MFU 50.0 %  data wait" in capsys.readouterr().err
