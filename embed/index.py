"""`lit-fast index`: fixes the rows of a dataset and their order for good.

Each source file is read once, in order. The order of the files and of the rows in groups of files is
drawn from a seed, so that a shard of rows can later be read nearly sequentially.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from embed.tars import Found, expand, read_tar
from lit_fast.dataset import SHARD, Dataset, DatasetWriter, Row, open_dataset
from lit_fast.errors import UserError
from lit_fast.files import write_atomic
from lit_fast.permutation import permutation
from lit_fast.progress import Progress

GROUP_ROWS = 4 * SHARD  # a group of files closes when it has this many rows
MAX_LISTED = 100_000  # lines of left_out.jsonl

_OWN = {"index", "captions", "left_out.jsonl"}  # what a killed indexing may have left


class LeftOut:
    """What did not become a row: counts by reason, names for the report and for left_out.jsonl."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}
        self.lines: list[str] = []

    def add(self, key: str, file: Path, reason: str) -> None:
        """Count one and remember its name."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < 5:
            names.append(f"{_printable(key)} in {file.name}")
        if len(self.lines) < MAX_LISTED:
            self.lines.append(json.dumps({"key": key, "file": str(file), "reason": reason}))

    def report(self) -> str:
        """One line: counts by reason with up to five names each."""
        parts = (
            f"{n:,} {reason} ({', '.join(self.names[reason])}{', ...' if n > 5 else ''})"
            for reason, n in sorted(self.counts.items(), key=lambda item: -item[1])
        )
        return f"left out {sum(self.counts.values()):,}: {'; '.join(parts)}"


def index_dataset(sources: list[str], out: Path, *, seed: int) -> Dataset:
    """Index the tars that `sources` mean into a new dataset at `out`.

    Raises:
      UserError: nothing to read, no usable row, or `out` holds something else.
    """
    files = expand(sources)
    sizes = [_size(f) for f in files]
    if (out / "dataset.json").exists():
        return _already_indexed(out, files, sizes, seed)
    _check_out(out)
    classnames, templates = _class_names(files)
    left_out = LeftOut()
    existed = out.exists()
    writer: DatasetWriter | None = None
    damages: list[str] = []
    progress = Progress("index", len(files), "files")
    keys: set[str] = set()
    order = [int(i) for i in permutation(len(files), seed, 0)]
    for number, group in enumerate(_groups(order, files, progress, damages, left_out)):
        rows = list(_usable(group, files, keys, left_out, len(classnames)))
        for i in permutation(len(rows), seed, 1, number):
            writer = writer or DatasetWriter(out)
            writer.add(rows[i])
    progress.close()
    for line in damages:
        print(f"warning: {line}", file=sys.stderr)
    if writer is None:
        _remove_leftovers(out, existed)
        raise UserError(f"the {len(files)} sources hold no usable row{_why(left_out)}")
    if left_out.lines:
        write_atomic(out / "left_out.jsonl", ("\n".join(left_out.lines) + "\n").encode())
    else:
        (out / "left_out.jsonl").unlink(missing_ok=True)
    dataset = writer.finish(
        seed=seed,
        sources=[(str(f), size) for f, size in zip(files, sizes, strict=True)],
        classnames=classnames,
        templates=templates,
        left_out=left_out.counts,
    )
    print(
        f"indexed {dataset.rows:,} rows with {dataset.captions:,} captions"
        + (f" and {dataset.labelled:,} labels" if dataset.labelled else "")
        + f" from {len(files)} file{'s' if len(files) > 1 else ''} into {out}"
    )
    if left_out.counts:
        print(left_out.report())
    return dataset


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _already_indexed(out: Path, files: list[Path], sizes: list[int], seed: int) -> Dataset:
    dataset = open_dataset(out)
    have = dict(zip(dataset.sources, dataset.source_bytes, strict=True))
    if dataset.seed != seed or have != {str(f): size for f, size in zip(files, sizes, strict=True)}:
        raise UserError(
            f"{out} is already a dataset, of other sources or another seed; the order of a dataset is fixed "
            f"for good: choose another --out"
        )
    print(f"{out} is already indexed: {dataset.rows:,} rows with {dataset.captions:,} captions")
    return dataset


def _check_out(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    others = [p.name for p in out.iterdir() if p.name not in _OWN and not p.name.endswith(".tmp")]
    if others:
        raise UserError(
            f"{out} holds other files ({sorted(others)[0]}); choose an empty or new directory as --out"
        )


def _remove_leftovers(out: Path, existed: bool) -> None:
    """A dataset without rows leaves nothing behind, not even what a killed indexing had left."""
    for name in ("index", "captions"):
        shutil.rmtree(out / name, ignore_errors=True)
    if not existed and out.exists():
        out.rmdir()


def _why(left_out: LeftOut) -> str:
    return f"; {left_out.report()}" if left_out.counts else ""


def _class_names(files: list[Path]) -> tuple[list[str], list[str]]:
    """CLIP_benchmark's class names and prompt templates, if all sources have the same; else nothing."""
    found = {
        (_lines_near(folder, "classnames.txt"), _lines_near(folder, "zeroshot_classification_templates.txt"))
        for folder in {f.parent for f in files}
    }
    if len(found) > 1:
        print("warning: the sources have different class names, so none are stored", file=sys.stderr)
        return [], []
    classnames, templates = found.pop()
    return list(classnames), list(templates)


def _near(folder: Path, name: str) -> Path | None:
    return next((d / name for d in (folder, folder.parent) if (d / name).is_file()), None)


def _lines_near(folder: Path, name: str) -> tuple[str, ...]:
    """The non-empty lines of a file beside the tars or one level up."""
    path = _near(folder, name)
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _groups(
    order: list[int], files: list[Path], progress: Progress, damages: list[str], left_out: LeftOut
) -> Iterator[list[tuple[int, Found]]]:
    """Read the files in `order`; yields groups of `(file number, what it holds)`."""
    group: list[tuple[int, Found]] = []
    rows = total = 0
    for number in order:
        folder = files[number].parent
        retrieval = _lines_near(folder, "dataset_type.txt") == ("retrieval",)
        found = read_tar(files[number], lines=retrieval)
        if found.damage:
            damages.append(found.damage)
            left_out.add("the rest", files[number], "file damaged or cut off")
        group.append((number, found))
        rows, total = rows + len(found.rows), total + len(found.rows)
        progress.advance(1, f"{total:,} rows")
        if rows >= GROUP_ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _usable(
    group: list[tuple[int, Found]], files: list[Path], keys: set[str], left_out: LeftOut, classes: int
) -> Iterator[Row]:
    for number, found in group:
        for key, reason in found.left_out:
            left_out.add(key, files[number], reason)
        for key, offset, size, captions, label in found.rows:
            if key in keys:
                left_out.add(key, files[number], "duplicate key")
            elif classes and label >= classes:
                left_out.add(key, files[number], f"label outside the {classes} class names")
            else:
                keys.add(key)
                yield Row(key, number, offset, size, captions, label)


def _printable(key: str) -> str:
    return key if key.isprintable() else ascii(key)
