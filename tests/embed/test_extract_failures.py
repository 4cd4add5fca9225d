"""A full disk, a missing permission, too little memory: one error line, and a rerun continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_fast.data.dataset import Dataset
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from tests.embed.test_extract import SMALL_SHARDS, many, tree
from tests.helpers import write_tar


@pytest.fixture
def dataset(tmp_path: Path, small_shards: None) -> Dataset:
    return many(tmp_path)


def command(dataset: Path, tower: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", SMALL_SHARDS, "embed", str(dataset), "--tower", str(tower), *more]


def stopped(done: subprocess.CompletedProcess[str], reason: str, remedy: str) -> bool:
    """Whether a command ended with one line that gives the reason and the remedy."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("lit-fast: error:")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1
    return reason in errors[0] and remedy in errors[0]


AGAIN = "fix the cause, then rerun the same command"


@pytest.fixture
def small_disk(dataset: Dataset) -> Iterator[Path]:
    """`features` of the dataset on a disk that holds a shard and a half (a vector is 64 bytes)."""
    path = Path(dataset.path) / "features"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=180k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_embed_on_a_small_disk_keeps_its_work(small_disk: Path, dataset: Dataset, tiny_vit: Path) -> None:
    line = command(dataset.path, tiny_vit, "--name", "t")
    done = subprocess.run(line, capture_output=True, text=True)
    assert stopped(done, "No space left on device", AGAIN), done.stderr
    before = sum(p.stat().st_size for p in (small_disk / "t" / "partial").iterdir())
    assert before > 10_000  # the embedded rows are kept
    done = subprocess.run(line, capture_output=True, text=True)  # still full
    assert stopped(done, "No space left on device", AGAIN), done.stderr
    assert sum(p.stat().st_size for p in (small_disk / "t" / "partial").iterdir()) >= before
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    for name in ("t", "whole"):
        embed_dataset(dataset.path, str(tiny_vit), name=name)
    assert tree(small_disk / "t") == tree(small_disk / "whole")


def test_index_on_a_full_disk_is_one_line_and_continues_later(small_disk: Path, tmp_path: Path) -> None:
    """array_record has errors of its own for it."""
    members = [
        (f"{i:04}.{kind}", os.urandom(300).hex().encode()) for i in range(2000) for kind in ("jpg", "txt")
    ]
    sources = [str(write_tar(tmp_path / "many.tar", members))]
    with pytest.raises(
        UserError, match=r"array_record cannot be written: .*No space left on device; fix the cause"
    ):
        index_dataset(sources, small_disk / "d")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    index_dataset(sources, small_disk / "d")
    index_dataset(sources, tmp_path / "whole")
    assert tree(small_disk / "d") == tree(tmp_path / "whole")


# Root may write everywhere, unless it gives that up.
OBEY = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []


@pytest.mark.parametrize("locked", ["partial", "c", "manifest", "."])
def test_embed_without_permission_is_one_line_and_continues_later(
    locked: str, dataset: Dataset, tiny_vit: Path
) -> None:
    features = Path(dataset.path) / "features" / "t"
    directory = features / locked
    directory.mkdir(parents=True)
    directory.chmod(0o555)
    if subprocess.run([*OBEY, "touch", str(directory / "x")], capture_output=True).returncode == 0:
        pytest.skip("permissions do not bind this user")
    line = [*OBEY, *command(dataset.path, tiny_vit, "--name", "t")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert stopped(done, "Permission denied", AGAIN), done.stderr
    assert str(features) in done.stderr
    directory.chmod(0o755)
    for name in ("t", "whole"):
        embed_dataset(dataset.path, str(tiny_vit), name=name)
    assert tree(features) == tree(features.parent / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_embed_with_a_signal_at_any_time_ends_in_one_line(
    number: signal.Signals, dataset: Dataset, tiny_vit: Path
) -> None:
    """While it imports, compiles, embeds or writes; the error line says that the same command continues."""
    for delay in (0.3, 1.5, 2.5):
        process = subprocess.Popen(
            command(dataset.path, tiny_vit, "--batch-size", "1"), stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode in (0, -number):  # it was faster, or had not started
            continue
        assert process.returncode == 128 + number, err
        assert "Traceback" not in err
        assert err.count("rerun the same command to continue") == 1
