"""`lit-fast embed`: the features of one frozen tower for every row of a dataset, once.

Rows go shard by shard, in batches counted from the shard's first row, so that what shares a batch never
depends on where a run was interrupted. A finished batch goes to the shard's journal, a finished shard to
the feature array in one write; its manifest comes last.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, open_dataset
from lit_fast.data.features import (
    BFLOAT16,
    Features,
    Manifest,
    embed_command,
    features_digest,
    first_line,
    read_error,
    with_views,
)
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.images.reader import check_sources
from lit_fast.embed.journal import Journal
from lit_fast.embed.pipeline import Batch, Images, Waiting, default_dtype, read_ahead, results
from lit_fast.errors import UserError
from lit_fast.runtime import process_rank
from lit_fast.storage.files import exists, read_object, write_json
from lit_fast.towers.embed import compile_tower, default_batch_size, open_tower
from lit_fast.towers.tower import Tower
from lit_fast.utils.progress import Progress
from lit_fast.utils.signals import held_back
from lit_fast.utils.system import cpu_count


@dataclass(frozen=True)
class Job:
    """What one process has to do."""

    dataset: Dataset
    features: Features
    tower: Tower
    shards: list[int]  # this process's share, finished or not
    batch_size: int  # images per device
    workers: int
    dtype: str
    max_pixels: int

    @property
    def batch_rows(self) -> int:
        """Rows per device; what shares a device's batch must not depend on the number of devices."""
        return max(1, self.batch_size // self.features.views)


def embed_dataset(
    path: Path | str,
    tower_spec: str,
    *,
    name: str | None = None,
    preprocess: str | None = None,
    resolution: int | None = None,
    gelu: str | None = None,
    pool: str | None = None,
    reduced_decode: bool = False,
    views: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
    dtype: str | None = None,
    max_pixels: int = MAX_PIXELS,
    share: tuple[int, int] | None = None,
) -> None:
    """Embed the shards `s` of a dataset with `s % share[1] == share[0]`; goes on with what is there.

    Args:
      preprocess, resolution, gelu, pool: as `load_tower`.
      reduced_decode: decode JPEGs much larger than needed at 1/2, 1/4 or 1/8, see `Preprocess.at_least`.
      views: vectors per image, the first of the image as it is, the others of crops.
      batch_size: images per device.
      share: by default this process's place among those of the cluster.

    Raises:
      UserError: a source is missing, the name is taken by another tower, the disk is full, or no image
        could be decoded.
    """
    with held_back() as signals:
        share = share or process_rank()
        dataset = open_dataset(path)
        check_sources(dataset)
        chosen = {
            "preprocess": preprocess, "resolution": resolution, "gelu": gelu, "pool": pool,
            "reduced_decode": reduced_decode,
        }  # fmt: skip
        options = {option: value for option, value in chosen.items() if value}
        if max_pixels != MAX_PIXELS:  # decides which rows are invalid
            options["max_pixels"] = max_pixels
        tower = open_tower(tower_spec, options)
        dtype = dtype or default_dtype()
        provenance = with_views(tower.provenance(dtype), views) | {"options": options}
        job = Job(
            dataset,
            Features(dataset, checked_name(name or tower.name), provenance),
            tower,
            shards=list(range(share[0], dataset.shards, share[1])),
            batch_size=batch_size or default_batch_size(),
            workers=workers or cpu_count(),
            dtype=dtype,
            max_pixels=max_pixels,
        )
        try:
            _claim(job.features)
            manifests = job.features.manifests()
            for shard in job.shards:
                if shard in manifests:
                    _check_manifest(job, manifests[shard])
            finished = set(job.features.finished())
            todo = [s for s in job.shards if s not in finished]
            rate = _embed_shards(job, todo, signals) if todo else None
            if signals:
                return
            _remove_stale(job.features)
            _report(job, rate)
            _report_others(job)
        except OSError as error:
            where = error.filename or job.features.path
            raise UserError(f"{where}: {error.strerror}; mend that and run the same command again") from None
        except MemoryError:
            raise UserError("out of memory; lower --batch-size, --workers or --max-pixels") from None


def checked_name(name: str) -> str:
    """A name that can be that of a feature directory; raises UserError for another."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        raise UserError(f"{name!r} cannot be a directory's name; choose --name of letters, digits and ._=+-")
    return name


def _claim(features: Features) -> None:
    """Write tower.json, or check that the one there says the same."""
    file = Path(features.path, "tower.json")
    if not file.exists():
        write_json(file, features.provenance)
    there = read_object(file)  # read back: of two that begin at the same time, one finds the other's
    if there.get("identity") != features.identity:
        mine = features.provenance
        without = ("identity", "first_view", "options", "versions", "name", "source")
        other = [k for k in [*mine, "views"] if k not in without and there.get(k, 1) != mine.get(k, 1)]
        raise UserError(
            f"{features.path} holds features of another tower "
            f"(other {', '.join(dict.fromkeys(other)) or 'identity'}); choose another --name"
        )


def _check_manifest(job: Job, manifest: Manifest) -> None:
    """A finished shard, or one that was finished before the dataset grew, must be of these rows."""
    shard, keys = manifest.shard, job.dataset.shard_keys[manifest.shard]
    if manifest.rows < job.features.shard_rows(shard):
        keys = job.dataset.prefix_digest(shard, manifest.rows)
    if manifest.keys != keys or manifest.tower != job.features.identity:
        raise UserError(
            f"{job.features.manifest_path(shard)} belongs to other rows or another tower; choose another "
            f"--name or delete {job.features.path}"
        )


def _embed_shards(job: Job, shards: list[int], signals: list[int]) -> float:
    """Do the unfinished `shards`, in order, until a signal comes; images per second."""
    done = sum(map(job.features.shard_rows, set(job.shards) - set(shards)))
    total = sum(map(job.features.shard_rows, job.shards))
    array = job.features.array(create=True)
    run = compile_tower(job.tower, job.dtype)
    images = Images(job.dataset, job.tower.preprocess, job.max_pixels, job.features.views)
    rows = job.batch_rows * jax.local_device_count()
    journals: dict[int, Journal] = {}
    embedded, began, waiting = 0, time.monotonic(), Waiting()
    progress: Progress | None = None
    with ExitStack() as stack:
        spans = _spans(job, shards, rows, array, journals, stack)
        batches = stack.enter_context(closing(read_ahead(images, spans, rows, job.workers)))
        for batch, result in stack.enter_context(closing(results(batches, run, waiting))):
            shard = batch.first // SHARD
            journal = journals[shard]
            if progress is None:
                progress = Progress("embed", total, "images", start=done + journal.done)
                waiting.restart()
            new = _append(journal, batch, result.reshape(rows, -1), shard * SHARD)
            progress.advance(new, waiting.note())
            embedded += new
            if journal.done == job.features.shard_rows(shard):
                _commit(job, shard, array, journals.pop(shard))
            if signals:
                break
    if progress is not None and not signals:
        progress.close()
        if advice := waiting.advice():
            print(advice, file=sys.stderr)
    return embedded / (time.monotonic() - began)


def _spans(
    job: Job,
    shards: list[int],
    batch_rows: int,
    array: ts.TensorStore,
    journals: dict[int, Journal],
    stack: ExitStack,
) -> Iterator[tuple[int, int]]:
    """The batches to do, as (first row, rows); opens the journal of a shard when its turn has come."""
    for shard in shards:
        rows = job.features.shard_rows(shard)
        belongs = {
            "identity": job.features.identity,
            "keys": job.dataset.shard_keys[shard],
            "batch_size": job.batch_size,
            "max_pixels": job.max_pixels,
        }
        path = journal_path(job.features, shard)
        journal = stack.enter_context(Journal(path, rows, array.shape[1], belongs))
        if journal.discarded:
            print(f"note: {path} was begun with other settings; shard {shard} starts anew", file=sys.stderr)
        known = job.features.manifest(shard) if exists(job.features.manifest_path(shard)) else None
        if known is not None and known.rows >= rows:  # by another process, before the journal was ours
            journal.remove()
            continue
        if known is not None:
            _copy_known(job, known, array, journal)
        if journal.done == rows:
            _commit(job, shard, array, journal)
            continue
        journals[shard] = journal
        # Batches begin where they would if nothing were known yet, so that the new rows get the same bits.
        start = journal.done // job.batch_rows * job.batch_rows
        for lo in range(start, rows, batch_rows):
            yield shard * SHARD + lo, min(batch_rows, rows - lo)


def _copy_known(job: Job, known: Manifest, array: ts.TensorStore, journal: Journal) -> None:
    """Take over the features of a shard that was finished before the dataset grew."""
    for lo in range(journal.done, known.rows, BLOCK):
        hi = min(lo + BLOCK, known.rows)
        try:
            features = array[known.first + lo : known.first + hi].read().result()
        except ValueError as error:
            raise read_error(job.features.path, error) from None
        invalid = {r - known.first: why for r, why in known.invalid.items() if lo <= r - known.first < hi}
        journal.append(features, invalid)
    if known.features and features_digest(journal.features[: known.rows]) != known.features:
        journal.remove()
        raise UserError(
            f"{job.features.path}: shard {known.shard} does not hold the features that its manifest was written "
            f"for; mend it with: lit-fast verify {job.dataset.path} --tower {job.features.tower} --repair"
        )


def _append(journal: Journal, batch: Batch, result: np.ndarray, first: int) -> int:
    """Add a batch's features `[batch rows, views * width]` to the journal; how many rows are new."""
    known = journal.done - (batch.first - first)
    features = result[known : batch.rows].astype(BFLOAT16)
    invalid = {r - first: why for r, why in batch.invalid.items() if r - first >= journal.done}
    finite = np.isfinite(features.astype(np.float32)).all(axis=1)
    for i in np.flatnonzero(~finite):
        invalid.setdefault(journal.done + int(i), "non-finite feature")
    for row in invalid:
        features[row - journal.done] = 0
    journal.append(features, invalid)
    return len(features)


def _commit(job: Job, shard: int, array: ts.TensorStore, journal: Journal) -> None:
    """Write a complete shard, then its manifest, then forget the journal."""
    first, rows = shard * SHARD, job.features.shard_rows(shard)
    try:
        # The future must be kept until its result is known: a dropped write is lost without a word.
        future = array[first : first + rows].write(journal.features)
        future.result()
    except ValueError as error:
        raise UserError(
            f"{job.features.path} cannot be written: {first_line(error)}; mend that and run the same command again"
        ) from None
    invalid = {first + row: why for row, why in journal.invalid.items()}
    keys, digest = job.dataset.shard_keys[shard], features_digest(journal.features)
    job.features.write_manifest(Manifest(shard, first, rows, keys, job.features.identity, invalid, digest))
    journal.remove()


def journal_path(features: Features, shard: int) -> Path:
    """Where the journal of an unfinished shard lies."""
    return Path(features.path, "partial", f"{shard:05d}.journal")


def _remove_stale(features: Features) -> None:
    """Delete what killed processes left of unfinished writes, once all shards are there.

    Not earlier: another process may be writing a shard of its share.
    """
    if len(features.finished()) < features.dataset.shards:
        return
    root = Path(features.path)
    for file in [*root.rglob("*.__lock"), *root.rglob(".*.tmp")]:
        file.unlink(missing_ok=True)
    # A kill between a shard's manifest and the end of its journal leaves the journal.
    shutil.rmtree(root / "partial", ignore_errors=True)


def _report(job: Job, rate: float | None) -> None:
    """The last lines on stdout: what there is now, and which rows are invalid."""
    path = job.features.path
    rows = sum(map(job.features.shard_rows, job.shards))
    invalid: dict[int, str] = {}
    for shard in job.shards:
        invalid |= job.features.manifest(shard).invalid
    if rows and len(invalid) == rows:
        why = next(iter(invalid.values()))
        raise UserError(
            f"none of the {rows:,} images could be embedded (first: {why}); mend that and delete {path}"
        )
    counts = f"{rows - len(invalid):,} valid, {len(invalid):,} invalid"
    if rate is None:
        print(f"{path} is complete: {rows:,} rows, {counts}")
    else:
        print(f"embedded {rows:,} rows with {job.tower.name} into {path}: {counts}, {rate:,.0f} images/s")
    if invalid:
        images = Images(job.dataset, job.tower.preprocess, job.max_pixels)
        named = [_named(images, job.dataset, row, invalid[row]) for row in sorted(invalid)[:5]]
        print(f"invalid: {'; '.join(named)}{'; ...' if len(invalid) > 5 else ''}")


def _report_others(job: Job) -> None:
    """Name the unfinished shards of other shares, unless somebody is at work on them."""
    finished = set(job.features.finished())
    left = [s for s in range(job.dataset.shards) if s not in finished]
    if left and not any(_at_work(job.features, s) for s in left):
        command = embed_command(job.dataset, job.features.provenance, job.features.tower)
        print(
            f"note: {len(left):,} shards of other shares are unfinished (first: {left[0]}) and nobody is at work on "
            f"them; this does them: {command} --shard-of 0/1",
            file=sys.stderr,
        )


def _at_work(features: Features, shard: int) -> bool:
    """Whether another process holds the journal of the shard."""
    try:
        with open(journal_path(features, shard), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _named(images: Images, dataset: Dataset, row: int, why: str) -> str:
    block, i = images.place(row)
    return f"{block.keys[i]} in {Path(dataset.sources[block.sources[i]].path).name}: {why}"
