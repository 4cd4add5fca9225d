"""What the benchmarks have in common: what they ran on, what a function costs, and cases in processes of their own.

`describe` names machine and versions, `measure` gives seconds with their spread and memory, `peak_memory` and
`forget_peak_memory` are for measuring memory alone, and `run_alone` runs a case in a new process, where no other
case's memory, threads or compiled programs count. `run_in_turns` runs several, whose steps alternate.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lit_fast.storage.machine import cpu_count

_TURN = "turn"


def describe(*packages: str) -> str:
    """Processor, cores, and versions of Python and the packages, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    cores = cpu_count()
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    return f"{model}, {cores} core{'s' * (cores > 1)}, Python {platform.python_version()}, {versions}"


class Cost(NamedTuple):
    """Of several calls of the same function."""

    median: float  # seconds
    lowest: float
    highest: float
    repeats: int
    memory: int  # bytes that the process held at most during the calls, beyond what it held before them

    @property
    def spread(self) -> str:
        return f"{self.lowest:.3f} - {self.highest:.3f}"


def measure(
    function: Callable[[], Any],
    repeats: int,
    *,
    before: Callable[[], Any] | None = None,
    enough: float = math.inf,
) -> Cost:
    """Time and memory of a function.

    Args:
      function: called once for warming up, then `repeats` times.
      repeats: how often.
      before: runs ahead of each call, untimed.
      enough: seconds; a first call that takes longer is the only one, and counts.
    """
    seconds: list[float] = []
    held = 0
    for call in range(1 + repeats):
        if before:
            before()
        if call < 2:
            time.sleep(0.2)  # XLA gives back what a call took a moment after its result is there
            forget_peak_memory()
            held = resident_memory()
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
        if seconds[0] > enough:
            break
    timed = seconds[1:] or seconds
    memory = max(0, peak_memory() - held)
    return Cost(statistics.median(timed), min(timed), max(timed), len(timed), memory)


def peak_memory() -> int:
    """The most bytes that this process has held resident since it began, or since `forget_peak_memory`."""
    return _status("VmHWM")


def resident_memory() -> int:
    """The bytes that this process holds resident now."""
    return _status("VmRSS")


def forget_peak_memory() -> None:
    """Let `peak_memory` start again from the memory that the process holds now (Linux, proc(5) on clear_refs).

    What was freed goes back to the system first, or it would hide what is taken next.
    """
    with suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def run_alone(
    module: str, case: dict[str, Any], *, timeout: float = 600, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -m MODULE --case JSON` in a process of its own, and read the JSON that is its last line.

    Args:
      module: as "benchmarks.loss"; given `--case` it runs that one case and prints its result as one JSON object.
      case: the arguments of the case.
      timeout: seconds after which the case counts as failed.
      environment: what is set beside this process's own, such as XLA_FLAGS.

    Returns:
      The result; {"failed": REASON} if there is none, the reason in one line.
    """
    return run_in_turns(module, [case], timeout=timeout, environments=[environment or {}])[0]


def run_in_turns(
    module: str, cases: Sequence[dict[str, Any]], *, timeout: float, environments: Sequence[dict[str, str]]
) -> list[dict[str, Any]]:
    """Run cases in processes that work by turns, so that all meet the same states of a noisy machine.

    With more than one case, a process is given `--turns`: it calls `turn` before each step, and only one process
    works at a time. They exist at the same time, so their memory adds up.

    Args:
      module: as of `run_alone`.
      cases: the arguments of each case.
      timeout: seconds of work after which a case counts as failed.
      environments: of each case, as of `run_alone`.

    Returns:
      The result of each case, as of `run_alone`.
    """
    turns = ["--turns"] if len(cases) > 1 else []
    workers: list[_Worker] = []
    try:
        waiting = []
        for case, environment in zip(cases, environments, strict=True):
            command = [sys.executable, "-m", module, "--case", json.dumps(case), *turns]
            workers.append(_Worker(command, environment, timeout))
            if workers[-1].until_turn():
                waiting.append(workers[-1])
        while waiting:
            waiting = [worker for worker in waiting if worker.step()]
        return [worker.result() for worker in workers]
    finally:
        for worker in workers:
            worker.stop()


def turn() -> None:
    """Wait until `run_in_turns` gives this process its turn."""
    print(_TURN, flush=True)
    sys.stdin.readline()


_UNFILTERED = {"JAX_TRACEBACK_FILTERING": "off"}  # the last line of a traceback is the exception


class _Worker:
    """A process that runs a case."""

    def __init__(self, command: list[str], environment: dict[str, str], timeout: float) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env=os.environ | _UNFILTERED | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._timeout = self._left = timeout
        self._last = ""
        self._stopped = False

    def until_turn(self) -> bool:
        """Wait until the process asks for its turn, or ends: False. It is stopped when its time is over."""
        assert self._process.stdout is not None
        began = time.monotonic()
        timer = threading.Timer(max(0.0, self._left), self.stop)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.strip() == _TURN:
                    return True
                self._last = line.strip() or self._last
            self._process.wait()
            return False
        finally:
            timer.cancel()
            self._left -= time.monotonic() - began

    def step(self) -> bool:
        """Give the process its turn, and wait until it asks for the next one, or ends: False."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.until_turn()

    def stop(self) -> None:
        """Kill the process if it runs."""
        if self._process.poll() is None:
            self._stopped = True
            self._process.kill()

    def result(self) -> dict[str, Any]:
        """Return what an ended process printed, or why it failed."""
        status = self._process.wait()
        if self._stopped:
            return {"failed": f"more than {self._timeout:.0f} s"}
        if status < 0:
            return {"failed": "killed, most likely for its memory" if status == -9 else "crashed"}
        if status:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["no output"]
            return {"failed": lines[-1][:200]}
        try:
            result: dict[str, Any] = json.loads(self._last)
        except ValueError:
            return {"failed": self._last[:200] or "no output"}
        return result
