"""What `benchmarks.faults` breaks: the commands on a tiny dataset, in places, each run in a forked process.

A child is forked from a process that has imported everything and started no thread of JAX, so a command takes a
fraction of a second and a thousand kills are affordable.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.trainings import TINY
from tests.helpers import samples, tiny_vit_arrays, write_tar

COMMANDS = ("index", "tokenize", "embed", "train")
SECONDS = 240  # after which a command hangs
CONFIG = f"steps = 24\n{TINY}every_steps = 4\n[log]\nevery_steps = 2\n"
_TIMES = ("pairs_per_second", "seconds_per_step", "data_wait_share", "elapsed_seconds", "chip_hours", "mfu")
_GCS = """
import time
from tests.gcs import running_gcs
with running_gcs() as server:
    print(server.url, flush=True)
    time.sleep(1e9)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: exit status, negative for a signal.
      log: its output.
      seconds: that it took.
    """

    status: int
    log: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def problem(self) -> str:
        """What is wrong with the output of a command that failed or succeeded; "": nothing."""
        if "Traceback" in self.log:
            return f"traceback: {self.log.strip().splitlines()[-1][:300]}"
        if self.status == -signal.SIGALRM:
            return "the command hangs"
        if self.status < 0 and not self.killed:
            return f"the command died of signal {-self.status}"
        last = self.log.strip().splitlines()[-1:] or [""]
        if self.status > 0 and not last[0].startswith("lit-fast: error: ") and " is WRONG in " not in last[0]:
            return f"status {self.status} without a line that says why: {last[0][:300]}"
        return ""


def forked(work: Callable[[], Any], log: Path, kill_after: float | None = None) -> Ended:
    """Run `work` in a forked process, with its output in `log`, and kill it after some seconds."""
    began = time.monotonic()
    if not (child := os.fork()):
        status = 99
        try:
            os.setsid()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
            status = int(work() or 0)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if done:
            return Ended(os.waitstatus_to_exitcode(code), log.read_text(errors="replace"), seconds)
        if kill_after is not None and seconds >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.001)


def run(words: list[str], log: Path, cache: Path, kill_after: float | None = None) -> Ended:
    """Run `lit-fast` with arguments in a forked process."""

    def work() -> int:
        from lit_fast.cli.main import main

        os.environ["LIT_FAST_CACHE"] = str(cache)
        return main(words)

    return forked(work, log, kill_after)


class Case:
    """The inputs of the commands, and one stage of the dataset per command, in a local directory."""

    def __init__(self, root: Path) -> None:
        """Write tars, a tower and a configuration, and run all commands once."""
        self.root = root
        for i in range(3):
            write_tar(root / f"tars/{i}.tar", samples(40, first=40 * i))
        np.savez(root / "tiny.npz", **tiny_vit_arrays())
        (root / "c.toml").write_text(CONFIG)
        # The dataset before each command.
        for before, command in zip(("", *COMMANDS), COMMANDS, strict=False):
            if before and before != "index":
                shutil.copytree(self.stage(before), self.stage(command))
                self._run(before, self.stage(command))
            elif before:
                self._run("index", self.stage(command))
        self.whole = root / "whole"
        shutil.copytree(self.stage("train"), self.whole / "d")

    def _run(self, command: str, dataset: Path) -> None:
        done = run(self.words(command, str(dataset.parent)), self.root / "log", self.root / "cache")
        assert done.status == 0, done.log

    def stage(self, command: str) -> Path:
        """Return the directory of the dataset as it is before a command."""
        return self.root / f"before {command}" / "d"

    def words(self, command: str, place: str) -> list[str]:
        """Return the arguments of `lit-fast` with dataset and run in a place."""
        dataset, work = f"{place}/d", f"{place}/w"
        return {
            "index": ["index", f"{self.root}/tars/*.tar", "--out", dataset],
            "tokenize": ["tokenize", dataset, "--train-vocab", "285", "--name", "words", "--max-length", "12"],
            "embed": ["embed", dataset, "--tower", f"{self.root}/tiny.npz", "--preprocess", "tf-squash",
                      "--batch-size", "4", "--dtype", "float32"],
            "train": ["train", f"{self.root}/c.toml", "--workdir", work, "--dataset", dataset],
        }[command]  # fmt: skip

    def put(self, command: str, place: str) -> None:
        """Copy the dataset as it is before a command to a place; call it in a child."""
        from lit_fast.storage.atomic import copy_files
        from lit_fast.storage.files import walk_files

        source = self.stage(command)
        if source.exists():
            copy_files(source, list(walk_files(source)), f"{place}/d")


def digests(command: str, place: str, out: Path) -> None:
    """Write the digests of everything that a command has made; call it in a child."""
    from lit_fast.storage.files import read_bytes, walk_files

    if command != "train":
        # A process that is killed after its work, but before it gives its lease back, leaves it; nobody holds it.
        names = [name for name in walk_files(f"{place}/d") if Path(name).name != ".lock"]
        found = {name: _sha(read_bytes(f"{place}/d/{name}")) for name in names}
        out.write_text(json.dumps(found))
        return
    import jax

    from lit_fast.runs.checkpoint import stored_steps
    from lit_fast.runs.metrics import read_metrics
    from lit_fast.runs.run import open_run

    model = open_run(f"{place}/w")
    found = {
        jax.tree_util.keystr(path): _sha(np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    }
    lines = [
        {k: v for k, v in line.items() if k not in _TIMES}
        for line in read_metrics(f"{place}/w/metrics.jsonl")
    ]
    found["metrics"] = _sha(json.dumps([line for line in lines if len(line) > 1]).encode())
    found["step"], found["steps"] = str(model.step), str(stored_steps(f"{place}/w"))
    out.write_text(json.dumps(found))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def buckets_of(name: str) -> Iterator[str]:
    """Run a server of buckets in a process of its own; yield where trials can be put, or a prefix of it."""
    if name == "gs":
        command, environment = [sys.executable, "-c", _GCS], {}
    else:
        port = "5917"
        command, environment = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            if name == "gs":
                assert server.stdout
                url = server.stdout.readline().strip()
                environment = {
                    "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                    "STORAGE_EMULATOR_HOST": url, "FSSPEC_GS_TOKEN": "anon",
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                }  # fmt: skip
            else:
                url = f"http://127.0.0.1:{port}"
                environment = {
                    "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                    "AWS_REGION": "us-east-1",
                }  # fmt: skip
                _create_bucket(f"{url}/bucket")
            os.environ.update(environment)
            yield f"{name}://bucket"
        finally:
            server.kill()


def _create_bucket(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server of s3 buckets did not start")
