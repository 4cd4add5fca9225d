"""Fuzz of all source readers: whatever a file holds, rows are right or counted, or there is one clear line.

    python -m benchmarks.fuzz_sources [--inputs 1000000] [--seconds S] [--first SEED] [--formats tar,table]

Every seed makes one source whose images and captions carry their identity, and damages it 15 times. A finding is an
exception other than `UserError`, a process that ends, more than 10 s of CPU time, a row whose image and caption differ,
a row that is missing, a path outside the directory of the images, or a file that was written or changed elsewhere.
The readers are called directly; a part of the sources is indexed and read through `ImageReader` as well. The inputs run
in a process of their own, so that a crash inside pyarrow is seen. A finding is repeated by `--first SEED --inputs 1`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import c_long
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz_inputs import MAKERS, SECRET, Input, damage, mark, marks
from lit_fast.data.dataset import Dataset
from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.tf_examples import image_of_example
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.formats import FORMATS
from lit_fast.embed.sources.interface import Damage, Item, Layout, Sample, Skipped
from lit_fast.errors import UserError

DAMAGED = 15  # inputs per seed beside the whole one
CPU_SECONDS = 10  # for one input
WALL_SECONDS = 120  # without progress: the process hangs

# The formats by their share; an array_record file has at least 128 kB.
_SHARES = {
    "tar": 6,
    "table": 6,
    "json": 4,
    "tfrecord": 3,
    "parquet": 2,
    "folder": 1,
    "pairs": 1,
    "array_record": 1,
}


class FindingError(Exception):
    """What is wrong with the result of an input."""


class HangError(BaseException):
    """An input took too long; no handler of the readers catches it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--formats", default=",".join(_SHARES))
    args = parser.parse_args()
    found = fuzz(args.first, args.inputs, args.seconds, args.formats.split(","))
    sys.exit(1 if found else 0)


def fuzz(first: int, inputs: int, seconds: float, formats: list[str]) -> list[dict[str, Any]]:
    """Run inputs from a seed on, print a table of their number by format, and return the findings."""
    context = multiprocessing.get_context("fork")
    began, seeds = time.monotonic(), max(1, inputs // (1 + DAMAGED))
    findings: dict[tuple[str, str], dict[str, Any]] = {}
    seed = context.Value(c_long, first)
    scratch = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    log, deadline = Path(scratch) / "log.jsonl", began + seconds
    log.touch()
    try:
        while seed.value < first + seeds and time.monotonic() < deadline:
            arguments = (seed, first + seeds, deadline, formats, scratch)
            worker = context.Process(target=_work, args=arguments)
            worker.start()
            if problem := _watch(worker, seed, lambda: _read_log(log, findings)):
                with log.open("a") as file:
                    file.write(json.dumps(_finding(seed.value, -1, "", problem, "")) + "\n")
                seed.value += 1
        _read_log(log, findings)
        counts = Counter(json.loads((Path(scratch) / "counts.json").read_text() or "{}"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _report(counts, time.monotonic() - began, list(findings.values()))
    return list(findings.values())


def _watch(worker: Any, seed: Any, look: Callable[[], None]) -> str:
    """Wait for a worker and `look` meanwhile; return how it ended if that is a finding."""
    at, since = seed.value, time.monotonic()
    while worker.is_alive():
        worker.join(0.2)
        look()
        if seed.value != at:
            at, since = seed.value, time.monotonic()
        elif time.monotonic() - since > WALL_SECONDS:
            worker.kill()
            worker.join()
            return f"no progress in {WALL_SECONDS} s"
    return f"the process ended with status {worker.exitcode}" if worker.exitcode else ""


def _read_log(log: Path, findings: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Print the findings that are new, and add them to `findings`."""
    for line in log.read_text().splitlines(keepends=True):
        finding = json.loads(line) if line.endswith("\n") else {}
        key = (finding["format"], finding["problem"][:60] + finding["where"]) if finding else None
        if key and key not in findings:
            findings[key] = finding
            print(f"seed {finding['seed']}.{finding['number']} {finding['format']}: {finding['problem']}")
            print(finding["trace"], flush=True)


def _report(counts: Counter[str], seconds: float, findings: list[dict[str, Any]]) -> None:
    print("| format | inputs | indexed as well | rows | skipped | damaged | refused |")
    print("|---|---|---|---|---|---|---|")
    for format in [*_SHARES, ""]:
        names = ("input", "index", "row", "skipped", "damaged", "refused")
        values = [sum(counts[f"{f} {n}"] for f in ([format] if format else _SHARES)) for n in names]
        print(f"| {format or 'all'} | {' | '.join(f'{v:,}' for v in values)} |")
    total = sum(counts[f"{f} input"] for f in _SHARES)
    print(f"{total:,} inputs in {seconds:,.0f} s, {total / seconds:,.0f} inputs/s; {len(findings)} findings")


def _finding(seed: int, number: int, format: str, problem: str, trace: str) -> dict[str, Any]:
    where = next((line for line in reversed(trace.splitlines()) if "File" in line), "")
    return {
        "seed": seed, "number": number, "format": format, "problem": problem, "where": where, "trace": trace
    }  # fmt: skip


def _work(seed: Any, stop: int, deadline: float, formats: list[str], scratch: str) -> None:
    """Run seeds in this process; findings and counts go into files."""
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _hang)
    output = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process)
    counts_file = Path(scratch) / "counts.json"
    counts = Counter(json.loads(counts_file.read_text())) if counts_file.exists() else Counter[str]()
    with (
        (Path(scratch) / "log.jsonl").open("a") as log,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        folder = Path(scratch) / "run"
        while seed.value < stop and time.monotonic() < deadline:
            for number, given, indexed in _inputs(seed.value, formats):
                counts[f"{given.format} input"] += 1
                counts[f"{given.format} index"] += indexed
                try:
                    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                    check(given, folder, counts, indexed=indexed)
                except HangError:
                    _log(log, seed.value, number, given, f"more than {CPU_SECONDS} s", traceback.format_exc())
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                    problem = problem.replace(f"{folder}/in", "")
                    _log(log, seed.value, number, given, problem, traceback.format_exc())
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            seed.value += 1
            if seed.value % 50 == 0:
                counts_file.write_text(json.dumps(counts))
        counts_file.write_text(json.dumps(counts))


def _log(log: Any, seed: int, number: int, given: Input, problem: str, trace: str) -> None:
    log.write(json.dumps(_finding(seed, number, given.format, problem, trace[-1500:])) + "\n")
    log.flush()


def _hang(signum: int, frame: object) -> None:
    raise HangError


def _inputs(seed: int, formats: list[str]) -> Iterator[tuple[int, Input, bool]]:
    """Yield the inputs of a seed, and whether each is indexed."""
    rng = Random(seed)
    format = rng.choices(formats, [_SHARES[f] for f in formats])[0]
    whole = MAKERS[format](rng)
    yield 0, whole, format in ("parquet", "array_record") or seed % 4 == 0
    for number in range(1, 1 + DAMAGED):
        yield number, damage(Random(seed * 100 + number), whole), (seed + number) % 64 == 0


def check(given: Input, folder: Path, counts: Counter[str], *, indexed: bool) -> None:
    """Read one input; raise at a finding.

    Args:
      folder: a directory for the input and the dataset, which is emptied.
      counts: of rows, skipped entries and so on by format.
      indexed: whether to make a dataset of it, and to read its images.
    """
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "in"
    for name, data in {**given.files, "../secret.jpg": mark(SECRET).encode()}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    path = str(place / given.name) if given.name else str(place)
    try:
        items = list(FORMATS[given.format].read(path, given.options))
    except UserError as error:
        _check_message(given, error, counts)
        return
    kinds = Counter(type(item) for item in items)
    for kind, name in ((Sample, "row"), (Skipped, "skipped"), (Damage, "damaged")):
        counts[f"{given.format} {name}"] += kinds[kind]
    _check_items(given, path, items)
    if indexed:
        _check_index(given, folder, path, counts, is_empty=not kinds[Sample])


def _check_message(given: Input, error: UserError, counts: Counter[str]) -> None:
    counts[f"{given.format} refused"] += 1
    if given.truth:
        raise FindingError(f"a good input is refused: {error}")
    if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 2000:
        raise FindingError(f"not one clear line: {str(error)[:300]!r}")


def _check_items(given: Input, path: str, items: list[Item]) -> None:
    layout: Layout | None = None
    rows: set[int] = set()
    for item in items:
        if isinstance(item, Layout):
            layout = item
        elif isinstance(item, Skipped):
            if not item.reason:
                raise FindingError("skipped without a reason")
        elif isinstance(item, Damage):
            if not item.description.startswith(path) or "\n" in item.description:
                raise FindingError(f"not one clear line: {item.description[:300]!r}")
        elif isinstance(item, Sample):
            if layout is None:
                raise FindingError("a row before the layout")
            item.key.encode()
            if not all(text.strip() == text and text.encode() for text in item.captions):
                raise FindingError(f"caption {item.captions!r}")
            data = _image(given, path, layout, item)
            if data is not None:
                rows |= _check_row(given, data, item.captions, item.label)
    if given.truth:
        if damages := [item.description for item in items if isinstance(item, Damage)]:
            raise FindingError(f"a good input is damaged: {damages[0]}")
        if given.format not in ("parquet", "array_record") and (missing := given.rows - rows):
            reasons = Counter(item.reason for item in items if isinstance(item, Skipped))
            raise FindingError(f"{len(missing)} rows are missing; {dict(reasons)}")


def _image(given: Input, path: str, layout: Layout, row: Sample) -> bytes | None:
    """Return the image of a row; None if it can be read from a dataset only."""
    if layout.kind == "folder":
        root = Path(layout.images)
        location = Path(os.path.normpath(root / row.key))
        if not location.is_relative_to(root):
            raise FindingError(f"path outside the directory: {row.key!r}")
        return location.read_bytes()
    if layout.kind in ("tar", "tfrecord"):
        whole = given.files[given.name]
        if row.offset < 0 or row.size <= 0 or row.offset + row.size > len(whole):
            raise FindingError(f"image outside the file: {row.offset}, {row.size}")
        data = whole[row.offset : row.offset + row.size]
        return data if layout.kind == "tar" else image_of_example(data, layout.image)
    return None


def _check_row(given: Input, data: bytes, captions: tuple[str, ...], label: int) -> set[int]:
    """Return the identity of a row."""
    shown = marks(data)
    if SECRET in shown:
        raise FindingError("an image outside the directory is read")
    if given.truth and any(marks(text.encode()) - shown for text in captions):
        raise FindingError(f"image {shown} has the captions {captions!r}")
    if given.truth and any(given.labels.get(identity, label) != label for identity in shown):
        raise FindingError(f"image {shown} has the label {label}")
    return shown


def _check_index(given: Input, folder: Path, path: str, counts: Counter[str], *, is_empty: bool) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    try:
        dataset = index_dataset([path], folder / "out", seed=1, options=given.options)
    except UserError as error:
        if not is_empty or not given.truth:
            _check_message(given, error, counts)
        return
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and folder / "out" not in p.parents}
    if after != before:
        raise FindingError(f"files were changed: {sorted(map(str, after.keys() ^ before.keys()))}")
    rows = _check_dataset(given, dataset)
    if given.truth:
        if given.rows - rows:
            raise FindingError(
                f"{len(given.rows - rows)} rows are missing in the dataset; {dataset.left_out}"
            )
        # The same rows again, in another source.
        shutil.copytree(folder / "in", folder / "again")
        again = path.replace(str(folder / "in"), str(folder / "again"), 1)
        grown = index_dataset([path, again], folder / "out", seed=1, options=given.options, append=True)
        if _check_dataset(given, grown) != rows or grown.rows != 2 * dataset.rows:
            raise FindingError(f"{dataset.rows} rows, {grown.rows} with those of a copy; {grown.left_out}")


def _check_dataset(given: Input, dataset: Dataset) -> set[int]:
    """Check all rows; return their identities."""
    reader, rows = ImageReader(dataset), set[int]()
    texts = [captions for block in dataset.iter_captions() for captions in block]
    labels = [label for block in dataset.iter_blocks() for label in block.labels]
    for row in range(dataset.rows):
        try:
            data = reader.read(row)
        except (ImageError, UserError):
            if given.truth:
                raise
            continue
        rows |= _check_row(given, data, tuple(texts[row]), labels[row])
    return rows


if __name__ == "__main__":
    main()
