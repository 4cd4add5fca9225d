"""Lines about long work."""

import time

import pytest

from lit_fast.utils.progress import report_elapsed


def test_report_elapsed_prints_while_the_work_lasts_and_not_after(capsys):
    with report_elapsed("compiling", every=0.02):
        time.sleep(0.15)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert set(lines) == {"compiling: 0s so far"}
    time.sleep(0.05)
    assert not capsys.readouterr().err


def test_report_elapsed_is_silent_for_short_work_and_passes_errors_on(capsys):
    with pytest.raises(ValueError, match="no"), report_elapsed("compiling", every=5):
        raise ValueError("no")
    assert not capsys.readouterr().err
