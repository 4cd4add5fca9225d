"""Machines that share nothing but a bucket: processes with their own cache that other machines know nothing of."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lit_fast.storage.atomic import copy_files
from lit_fast.storage.files import exists, walk_files

# A lock of another machine is taken over after 3 s instead of a minute.
_RUN = """
import sys
import lit_fast.storage.holder, lit_fast.storage.lock
kernel = sys.argv[1]
lit_fast.storage.holder._kernel = lambda: kernel
lit_fast.storage.lock.TOUCH_SECONDS, lit_fast.storage.lock.ABANDONED_SECONDS = 0.5, 3.0
from lit_fast.cli.main import main
sys.argv = ["lit-fast", *sys.argv[2:]]
sys.exit(main())
"""


class Machine:
    """A machine with an empty disk.

    Attributes:
      disk: its directory, in which commands are run; the cache is in it.
    """

    def __init__(self, directory: Path, name: str, prelude: str = "") -> None:
        """Create the machine; `prelude` is run in each of its processes first."""
        self.name, self.disk, self._prelude = name, directory / name, prelude
        self.disk.mkdir(parents=True)

    def start(
        self, *words: object, environment: dict[str, str] | None = None, devices: int = 1
    ) -> subprocess.Popen[str]:
        """Start `lit-fast` with arguments."""
        own = {
            "LIT_FAST_CACHE": str(self.disk / "cache"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        return subprocess.Popen(
            [sys.executable, "-c", self._prelude + _RUN, self.name, *map(str, words)],
            cwd=self.disk,
            env=os.environ | own | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def destroy(self, process: subprocess.Popen[str]) -> None:
        """Kill a process and delete the disk."""
        process.kill()
        process.communicate()
        shutil.rmtree(self.disk, ignore_errors=True)


def wait_until_exists(location: str, *processes: subprocess.Popen[str]) -> None:
    """Wait for a file, which the processes make."""
    while not exists(location):
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def kill_at_random(machine: Machine, process: subprocess.Popen[str], location: str, seconds: float) -> None:
    """Destroy a machine at a random moment within some seconds after a file exists."""
    wait_until_exists(location, process)
    time.sleep(seconds * random.SystemRandom().random())
    machine.destroy(process)


def put(source: Path, url: str) -> None:
    """Copy a directory into a bucket."""
    copy_files(source, list(walk_files(source)), url)


def directory_of(url: str, target: Path) -> Path:
    """Copy a directory from a bucket and return the copy."""
    copy_files(url, list(walk_files(url)), target)
    return target
