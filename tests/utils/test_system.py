"""The machine that a process runs on."""

import os

from lit_fast.utils.system import cpu_count


def test_cpu_count_counts_the_cores_of_this_process():
    if hasattr(os, "sched_getaffinity"):
        assert cpu_count() == len(os.sched_getaffinity(0))


def test_cpu_count_without_affinity_counts_all_cores(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cpu_count() == os.cpu_count()
