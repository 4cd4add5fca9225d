"""Break the commands: kills at random times, flipped bits, full disks. Prints a table of counts and all findings.

    python -m benchmarks.faults [--kinds KINDS] [--places file,gs,s3] [--commands index,...] [--seconds S]

kills: `lit-fast COMMAND` is killed with SIGKILL after a random share of the time that it takes, up to four times; then
  the same command runs to its end. All files (of train: parameters, metrics and the list of checkpoints) must have
  the bits of a run that was not killed. In buckets the disk of the machine is lost at every third kill.
flips-dataset, flips-run: one random bit of one file is inverted. `verify` or a reading command must end with a line
  that says so, or the results must be those of the intact file.
full: the command runs on a file system of a random size that is too small (tmpfs, needs root). It must end with one
  line; with more space, the same command must complete to the same bits.

Every kind runs for S seconds per command and place. A traceback, a hang or a wrong status is a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from random import Random

from benchmarks.faults_case import COMMANDS, Case, Ended, buckets_of, digests, forked, run

KILLS = 4  # in a row, at most
_COLUMNS = {
    "kills": ("trials", "kills", "same bits"),
    "flips": ("flips", "found", "harmless"),
    "full": ("trials", "refused", "completed", "same bits"),
}


class Faults:
    """Trials and what they found.

    Attributes:
      counts: by (kind, command or file, place), of the columns of the table.
      findings: one line each.
    """

    def __init__(self, scratch: Path, case: Case, random: Random) -> None:
        self.scratch, self.case, self.random = scratch, case, random
        self.counts: dict[tuple[str, str, str], Counter[str]] = {}
        self.findings: list[str] = []
        self._numbers = 0

    def trial(self) -> tuple[Path, Path, Path]:
        """Return an empty directory, and a log and a cache in it."""
        shutil.rmtree(self.scratch / "trial", ignore_errors=True)
        directory = self.scratch / "trial" / "t"
        directory.mkdir(parents=True)
        self._numbers += 1
        return directory, self.scratch / "log", self.scratch / "trial" / "cache"

    def found(self, what: str, log: str = "") -> None:
        """Record a finding."""
        self.findings.append(what)
        print(f"FINDING {what}\n{log[-3000:]}", file=sys.stderr, flush=True)

    def digests(self, command: str, place: str) -> dict[str, str]:
        """Return the digests of what a command has made; a finding if it cannot be read."""
        out = self.scratch / "digests.json"
        out.unlink(missing_ok=True)
        done = forked(lambda: digests(command, place, out), self.scratch / "log of digests")
        return json.loads(out.read_text()) if done.status == 0 else {"unreadable": done.log[-500:]}

    def check(self, done: Ended, where: str) -> bool:
        """Record what is wrong with the end of a command that was not killed."""
        if done.problem:
            self.found(f"{where}: {done.problem}", done.log)
        return not done.problem

    def compare(self, wanted: dict[str, str], got: dict[str, str], where: str, log: str) -> bool:
        """Record differing files."""
        names = sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k))
        if names:
            self.found(
                f"{where}: differing or missing: {', '.join(names[:5])}",
                f"{got.get('unreadable', '')}\n{log}",
            )
        return not names

    def kills(self, command: str, base: str, seconds: float) -> None:
        """Kill a command in a place until the time is over."""
        place_name = base.partition("://")[0] if "://" in base else "file"
        counts = self.counts.setdefault(("kills", command, place_name), Counter())
        wanted, whole = self._whole(command, base)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            directory, log, cache = self.trial()
            place = f"{base}/{self._numbers}" if base else str(directory)
            self._put(command, place)
            where = f"{command} in {place_name}, trial {self._numbers}"
            counts["trials"] += 1
            for _ in range(KILLS):
                done = run(self.case.words(command, place), log, cache, whole * self.random.random())
                counts["kills"] += done.killed
                if not done.killed:
                    break
                if "Traceback" in done.log:
                    self.found(f"{where}: a traceback before the kill", done.log)
                if base and self.random.random() < 1 / 3:
                    shutil.rmtree(cache, ignore_errors=True)
            if done.killed:
                done = run(self.case.words(command, place), log, cache)
            if self.check(done, where):
                if done.status:
                    self.found(
                        f"{where}: status {done.status}: {done.log.strip().splitlines()[-1]}", done.log
                    )
                else:
                    counts["same bits"] += self.compare(wanted, self.digests(command, place), where, done.log)

    def _whole(self, command: str, base: str) -> tuple[dict[str, str], float]:
        """Return the digests of a command that was not killed, and the seconds that it takes."""
        seconds = []
        for _ in range(3):  # the first time its programs are compiled, and a busy machine is slow at times
            directory, log, cache = self.trial()
            place = f"{base}/{self._numbers}" if base else str(directory)
            self._put(command, place)
            done = run(self.case.words(command, place), log, cache)
            assert done.status == 0, done.log
            seconds.append(done.seconds)
        return self.digests(command, place), min(seconds)

    def _put(self, command: str, place: str) -> None:
        done = forked(lambda: self.case.put(command, place), self.scratch / "log of put")
        assert done.status == 0, done.log

    def full(self, command: str, seconds: float) -> None:
        """Run a command on file systems that are too small until the time is over."""
        counts = self.counts.setdefault(("full", command, "tmpfs"), Counter())
        wanted, _ = self._whole(command, "")
        used = sum(p.stat().st_blocks * 512 for p in (self.scratch / "trial").rglob("*"))
        start = self.case.stage(command)
        first = sum(p.stat().st_blocks * 512 for p in start.rglob("*")) if start.exists() else 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            directory, log, _ = self.trial()
            disk = self.scratch / "trial"
            size = first + 8192 + int((used - first) * self.random.random())
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
            try:
                directory.mkdir()
                self._put(command, str(directory))
                where = f"{command} on a disk of {size:,} bytes"
                counts["trials"] += 1
                done = run(self.case.words(command, str(directory)), log, disk / "cache")
                if self.check(done, where):
                    counts["refused"] += bool(done.status)
                    subprocess.run(["mount", "-o", "remount,size=1G", disk], check=True)
                    done = run(self.case.words(command, str(directory)), log, disk / "cache")
                    if self.check(done, where):
                        counts["completed"] += not done.status
                        got = self.digests(command, str(directory))
                        counts["same bits"] += self.compare(wanted, got, where, done.log)
            finally:
                subprocess.run(["umount", disk], check=True)

    def flips_in_dataset(self, seconds: float) -> None:
        """Invert bits in the files of a dataset; `verify`, or else `train`, sees them."""
        wanted, _ = self._whole("train", "")
        files = sorted(
            p.relative_to(self.case.stage("train"))
            for p in self.case.stage("train").rglob("*")
            if p.is_file()
        )
        deadline = time.monotonic() + seconds
        for name in [n for _ in range(1000) for n in files]:
            if time.monotonic() > deadline:
                return
            directory, log, cache = self.trial()
            shutil.copytree(self.case.stage("train"), directory / "d")
            where, counts = self._flip(directory / "d" / name, f"dataset: {_kind(name)}")
            done = run(["verify", str(directory / "d"), "--sample", "4"], log, cache)
            if not self.check(done, where):
                continue
            if done.status:
                counts["found"] += 1
                continue
            done = run(self.case.words("train", str(directory)), log, cache)
            if self.check(done, where):
                if done.status:
                    counts["found"] += 1
                else:
                    got = self.digests("train", str(directory))
                    counts["harmless"] += self.compare(wanted, got, f"{where}, unseen by verify", done.log)

    def flips_in_run(self, seconds: float) -> None:
        """Invert bits in the files of a run that was stopped; the resumed training sees them, or ends as it would."""
        wanted, whole = self._whole("train", "")
        stopped = self.scratch / "stopped"
        while (
            not any((stopped / f"w/checkpoints/{step}").exists() for step in range(8, 24, 4))
            or (stopped / "w/checkpoints/24").exists()
        ):
            shutil.rmtree(stopped, ignore_errors=True)
            shutil.copytree(self.case.stage("train"), stopped / "d")
            words = self.case.words("train", str(stopped))
            run(
                words,
                self.scratch / "log",
                self.scratch / "cache",
                whole * (0.3 + 0.7 * self.random.random()),
            )
        files = sorted(p.relative_to(stopped) for p in (stopped / "w").rglob("*") if p.is_file())
        files = [f for f in files if f.name != ".lock"]
        deadline = time.monotonic() + seconds
        for name in [n for _ in range(1000) for n in files]:
            if time.monotonic() > deadline:
                return
            directory, log, cache = self.trial()
            shutil.copytree(stopped, directory, dirs_exist_ok=True)
            where, counts = self._flip(directory / name, f"run: {_kind(name.relative_to('w'))}")
            for words in (["info", f"{directory}/w"], ["compare", f"{directory}/w"]):
                self.check(run(words, log, cache), f"{where}, {words[0]}")
            done = run(self.case.words("train", str(directory)), log, cache)
            if self.check(done, where):
                if done.status:
                    counts["found"] += 1
                else:
                    counts["harmless"] += self.compare(
                        wanted, self.digests("train", str(directory)), where, done.log
                    )

    def _flip(self, file: Path, kind: str) -> tuple[str, Counter[str]]:
        data = bytearray(file.read_bytes())
        counts = self.counts.setdefault(("flips", kind, "file"), Counter())
        bit = self.random.randrange(8 * len(data)) if data else 0
        if data:
            data[bit // 8] ^= 1 << bit % 8
            counts["flips"] += 1
        file.write_bytes(data)
        return f"bit {bit} of {kind} {file.name}", counts

    def table(self) -> str:
        """Return the counts as Markdown, and the findings."""
        lines = []
        for kind, columns in _COLUMNS.items():
            rows = {k[1:]: c for k, c in self.counts.items() if k[0] == kind}
            if rows:
                lines += [f"| {kind} | place | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
                total = sum(rows.values(), Counter())
                for names, counts in [*rows.items(), (("all", ""), total)]:
                    lines.append(f"| {' | '.join(names)} | {' | '.join(f'{counts[c]:,}' for c in columns)} |")
                lines.append("")
        return "\n".join([*lines, f"{len(self.findings)} findings", *self.findings])


def _kind(name: Path) -> str:
    """Return the name of a file without its numbers and digests."""
    parts = ["N" if part.isdigit() else part for part in name.parts]
    return "/".join([*parts[:-1], "*" if len(parts[-1]) > 30 else parts[-1]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default="kills,full,flips-dataset,flips-run")
    parser.add_argument("--places", default="file,gs,s3")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--seconds", type=float, default=60, metavar="S")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    args = parser.parse_args()
    kinds, places, commands = (value.split(",") for value in (args.kinds, args.places, args.commands))
    scratch = Path(
        tempfile.mkdtemp(prefix="faults", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    _import_everything()
    began = time.monotonic()
    try:
        faults = Faults(scratch, Case(scratch / "case"), Random(args.seed))
        try:
            for place in places if "kills" in kinds else ():
                with nullcontext("") if place == "file" else buckets_of(place) as base:
                    for command in commands:
                        faults.kills(command, base, args.seconds)
            for command in commands if "full" in kinds else ():
                faults.full(command, args.seconds)
            if "flips-dataset" in kinds:
                faults.flips_in_dataset(args.seconds)
            if "flips-run" in kinds:
                faults.flips_in_run(args.seconds)
        finally:  # also where a trial could not be set up
            print(faults.table())
            print(
                f"\nseed {args.seed}, {time.monotonic() - began:,.0f} s, Python {platform.python_version()}"
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(1 if faults.findings else 0)


def _import_everything() -> None:
    """Import what the commands import; nothing of it starts JAX's devices."""

    import lit_fast.cli.evaluate
    import lit_fast.cli.inspect
    import lit_fast.embed.cli
    import lit_fast.embed.extract
    import lit_fast.embed.index
    import lit_fast.embed.tokenize
    import lit_fast.embed.verify.dataset
    import lit_fast.report.info
    import lit_fast.runs.run
    import lit_fast.train.cli
    import lit_fast.train.loop  # noqa: F401


if __name__ == "__main__":
    main()
