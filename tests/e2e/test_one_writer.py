"""Two writers of one directory: one works, the other stops with a line that says why. Real processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.train.workdir import lock_workdir
from tests.embed.contents import keys, tree
from tests.helpers import samples, write_tar

# The process stops itself when it has taken the lock.
STOPS = (
    "import os, signal, sys, lit_fast.storage.lock as module\n"
    "from lit_fast.cli.main import main\n"
    "take = module.Lock.__init__\n"
    "def take_and_stop(*args, **options):\n"
    "    take(*args, **options)\n"
    "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    "module.Lock.__init__ = take_and_stop\n"
    "sys.argv = ['lit-fast', *sys.argv[1:]]\n"
    "sys.exit(main())\n"
)


@contextmanager
def locked_by(*command: object) -> Iterator[subprocess.Popen[str]]:
    """A process of `lit-fast` that is stopped and holds its first lock."""
    words = [sys.executable, "-c", STOPS, *map(str, command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), process.stdout.read()
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out


def run(*command: object) -> int:
    return main([str(word) for word in command])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    def check(process: subprocess.Popen[str], name: str, target: object, *command: object) -> None:
        capsys.readouterr()
        assert run(*command) == 2
        *_, line = capsys.readouterr().err.splitlines()
        holder = rf"`lit-fast {name}` \(process {process.pid} on \S+, since \S+ \S+\)"
        assert re.search(rf"error: {target} is being written by {holder}; wait for it or ", line), line

    return check


@pytest.fixture
def tars(tmp_path: Path) -> tuple[Path, Path]:
    return write_tar(tmp_path / "a.tar", samples(3)), write_tar(tmp_path / "b.tar", samples(5, first=50))


@pytest.fixture
def data(trained_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_run.parent / "d", tmp_path / "d")
    return tmp_path / "d"


def features(path: Path) -> Path:
    for name, array in (("img_emb", np.ones((3, 4), "f2")), ("text_emb", np.ones((3, 4), "f2"))):
        (path / name).mkdir(parents=True)
        np.save(path / name / f"{name}_0.npy", array)
    return path


def test_index_and_index_into_one_directory(tars, tmp_path, refused):
    out = tmp_path / "out"
    importing = ("import-features", features(tmp_path / "f"), "--out", out, "--tower", "t", "--format")
    with locked_by("index", tars[0], "--out", out) as first:
        refused(first, "index", out, "index", tars[1], "--out", out)
        refused(first, "index", out, *importing, "clip-retrieval")
        finish(first)
    assert len(keys(open_dataset(out))) == 3
    assert os.listdir(out / "index") == ["00000.array_record"]
    assert sorted(os.listdir(out)) == ["captions", "dataset.json", "index"]


def test_index_after_a_killed_one_works_at_once(tars, tmp_path):
    out = tmp_path / "out"
    with locked_by("index", tars[0], "--out", out) as first:
        first.kill()
        first.wait()
        assert run("index", tars[1], "--out", out) == 0
    assert run("index", tars[1], "--out", tmp_path / "alone") == 0
    assert tree(out) == tree(tmp_path / "alone")


def test_append_and_other_writers_of_a_dataset(tars, data, tiny_vit, refused):
    append = ("index", tars[1], "--out", data, "--append")
    with locked_by(*append) as first:
        refused(first, "index", data, *append)
        refused(first, "index", data, "tokenize", data, "--train-vocab", 284, "--name", "new")
        refused(first, "index", data, "embed", data, "--tower", tiny_vit, "--name", "new")
        finish(first)
    assert open_dataset(data).rows == 29


def test_tokenize_and_other_writers(tars, data, refused):
    command = ("tokenize", data, "--train-vocab", 284, "--name", "new")
    with locked_by(*command) as first:
        refused(first, "tokenize", data / "tokens" / "new", *command)
        refused(first, "tokenize", data, "index", tars[1], "--out", data, "--append")
        assert run("tokenize", data, "--train-vocab", 283, "--name", "other") == 0
        finish(first)
    assert run(*command) == 0
    assert sorted(os.listdir(data / "tokens" / "new")) == sorted(os.listdir(data / "tokens" / "words"))


def test_embed_and_other_writers(tars, data, tiny_vit, refused):
    command = ("embed", data, "--tower", tiny_vit, "--name", "new")
    with locked_by(*command) as first:
        refused(first, "embed", f"shard 0 of {data}/features/new", *command)
        refused(first, "embed", data, "index", tars[1], "--out", data, "--append")
        finish(first)
    assert not (data / "features" / "new" / "partial").exists()
    assert run("index", tars[1], "--out", data, "--append") == 0


def test_import_features_and_import_features(tmp_path, refused):
    out = tmp_path / "out"
    command = ("import-features", features(tmp_path / "f"), "--out", out, "--tower", "t", "--format")
    with locked_by(*command, "clip-retrieval") as first:
        refused(first, "import-features", out, *command, "clip-retrieval")
        finish(first)
    assert not list(out.rglob("*lock*"))


def test_train_and_train_in_one_directory(data, trained_run, tmp_path, refused):
    command = ("train", trained_run.parent / "c.toml", "--dataset", data, "--workdir", tmp_path / "run")
    with locked_by(*command) as first:
        refused(first, "train", f"workdir {tmp_path}/run", *command)
        first.kill()
        first.wait()
        lock_workdir(tmp_path / "run").release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_export_and_export_into_one_directory(trained_run, tmp_path, refused):
    command = ("export", trained_run, "--out", tmp_path / "new" / "out")
    with locked_by(*command) as first:
        refused(first, "export", f"--out {tmp_path}/new/out", *command)
        finish(first)
    assert os.listdir(tmp_path / "new") == ["out"]
    assert run(*command) == 2
