"""`lit-fast embed`: the features of one frozen tower for every row of a dataset, once.

Rows go shard by shard, in batches counted from the shard's first row, so that what shares a batch never
depends on where a run was interrupted. A finished batch goes to the shard's journal, a finished shard to
the feature array in one write; its manifest comes last.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from embed.images import Batch, Images, read_ahead
from embed.journal import Journal
from lit_fast.dataset import SHARD, Dataset, open_dataset
from lit_fast.errors import UserError
from lit_fast.features import BFLOAT16, Features, Manifest
from lit_fast.files import read_json, write_json
from lit_fast.preprocess import MAX_PIXELS
from lit_fast.progress import Progress
from lit_fast.towers import Tower, load_tower


@dataclass(frozen=True)
class Job:
    """What one process has to do."""

    dataset: Dataset
    features: Features
    tower: Tower
    shards: list[int]  # this process's share, finished or not
    batch_size: int
    workers: int
    dtype: str
    max_pixels: int


def embed_dataset(
    path: Path,
    tower_spec: str,
    *,
    name: str | None = None,
    preprocess: str | None = None,
    resolution: int | None = None,
    gelu: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    dtype: str | None = None,
    max_pixels: int = MAX_PIXELS,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Embed the shards `s` of a dataset with `s % share[1] == share[0]`; goes on with what is there.

    Raises:
      UserError: a source is missing, the name is taken by another tower, the disk is full, or no image
        could be decoded.
    """
    dataset = open_dataset(path)
    _check_sources(dataset)
    tower = load_tower(tower_spec, preprocess=preprocess, resolution=resolution, gelu=gelu)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    features = Features(dataset, _checked_name(name or tower.name), tower.provenance(dtype))
    devices = jax.local_device_count()
    # A CPU's caches make small batches fast: 62 images/s by 8, 36 by 64 (ViT-Ti/16, two cores).
    batch_size = batch_size or (8 if jax.default_backend() == "cpu" else 64 * devices)
    job = Job(
        dataset,
        features,
        tower,
        shards=list(range(share[0], dataset.shards, share[1])),
        batch_size=-(-batch_size // devices) * devices,
        workers=workers or len(os.sched_getaffinity(0)),
        dtype=dtype,
        max_pixels=max_pixels,
    )
    try:
        _claim(features)
        _check_finished(job)
        finished = set(features.finished())
        todo = [s for s in job.shards if s not in finished]
        rate = _embed_shards(job, todo) if todo else None
        _remove_stale(features)
        _report(job, rate)
    except OSError as error:
        where = error.filename or features.path
        raise UserError(f"{where}: {error.strerror}; mend that and run the same command again") from None
    except MemoryError:
        raise UserError("out of memory; lower --batch-size, --workers or --max-pixels") from None


def _check_sources(dataset: Dataset) -> None:
    for source, size in zip(dataset.sources, dataset.source_bytes, strict=True):
        try:
            found = os.stat(source).st_size
        except OSError as error:
            raise UserError(
                f"source {source} of {dataset.path} cannot be read: {error.strerror}; restore it there"
            ) from None
        if found != size:
            raise UserError(
                f"source {source} has {found} bytes, but had {size} when it was indexed; restore it"
            )


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        raise UserError(f"{name!r} cannot be a directory's name; choose --name of letters, digits and ._=+-")
    return name


def _claim(features: Features) -> None:
    """Write tower.json, or check that the one there says the same."""
    file = features.path / "tower.json"
    if not file.exists():
        write_json(file, features.provenance)
        return
    there = read_json(file)
    if not isinstance(there, dict) or there.get("identity") != features.identity:
        mine = features.provenance
        other = [
            k for k in mine if k not in ("identity", "versions", "name", "source") and there.get(k) != mine[k]
        ]
        raise UserError(
            f"{features.path} holds features of another tower (other {', '.join(other) or 'identity'}); "
            f"choose another --name"
        )


def _check_finished(job: Job) -> None:
    for shard in set(job.features.finished()) & set(job.shards):
        manifest = job.features.manifest(shard)
        if manifest.keys != job.dataset.shard_keys[shard] or manifest.tower != job.features.identity:
            raise UserError(
                f"{job.features.manifest_path(shard)} belongs to other rows or another tower; choose another "
                f"--name or delete {job.features.path}"
            )


def _embed_shards(job: Job, shards: list[int]) -> float:
    """Do the unfinished `shards`, in order; images per second."""
    done = sum(_rows(job.dataset, s) for s in set(job.shards) - set(shards))
    total = sum(_rows(job.dataset, s) for s in job.shards)
    array = job.features.array(create=True)
    run = _compile(job)
    images = Images(job.dataset, job.tower.preprocess, job.max_pixels)
    size = job.tower.preprocess.size
    journals: dict[int, Journal] = {}
    embedded, began = 0, time.monotonic()
    progress: Progress | None = None
    with ExitStack() as stack:
        spans = _spans(job, shards, array, journals, stack)
        batches = stack.enter_context(closing(read_ahead(images, spans, job.batch_size, size, job.workers)))
        for batch, result in _in_flight(batches, run):
            shard = batch.first // SHARD
            journal = journals[shard]
            if progress is None:
                progress = Progress("embed", total, "images", start=done + journal.done)
            journal.append(*_checked(batch, result, shard * SHARD))
            progress.advance(batch.rows)
            embedded += batch.rows
            if journal.done == _rows(job.dataset, shard):
                _commit(job, shard, array, journals.pop(shard))
    if progress is not None:
        progress.close()
    return embedded / (time.monotonic() - began)


def _rows(dataset: Dataset, shard: int) -> int:
    return min(SHARD, dataset.rows - shard * SHARD)


def _spans(
    job: Job, shards: list[int], array: ts.TensorStore, journals: dict[int, Journal], stack: ExitStack
) -> Iterator[tuple[int, int]]:
    """The batches to do, as (first row, rows); opens the journal of a shard when its turn has come."""
    for shard in shards:
        rows = _rows(job.dataset, shard)
        belongs = {
            "identity": job.features.identity,
            "keys": job.dataset.shard_keys[shard],
            "batch_size": job.batch_size,
            "max_pixels": job.max_pixels,
        }
        path = job.features.path / "partial" / f"{shard:05d}.journal"
        journal = stack.enter_context(Journal(path, rows, job.tower.width, belongs))
        if journal.discarded:
            print(f"note: {path} was begun with other settings; shard {shard} starts anew", file=sys.stderr)
        if job.features.manifest_path(shard).exists():  # by another process, before the journal was ours
            journal.remove()
        elif journal.done == rows:
            _commit(job, shard, array, journal)
        else:
            journals[shard] = journal
            for lo in range(journal.done, rows, job.batch_size):
                yield shard * SHARD + lo, min(job.batch_size, rows - lo)


def _compile(job: Job) -> Callable[[np.ndarray], jax.Array]:
    """The tower over all local devices: uint8 `[batch, size, size, 3]` to float32 `[batch, width]`."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    split, same = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(job.tower.params, same)
    dtype = jax.numpy.dtype(job.dtype)
    embed = jax.jit(lambda p, x: job.tower.embed(p, x, dtype), out_shardings=split)
    return lambda images: embed(params, jax.device_put(images, split))


def _in_flight(
    batches: Iterator[Batch], run: Callable[[np.ndarray], jax.Array]
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Results in order; the next batch is on the device before the result of the last one is fetched."""
    waiting: deque[tuple[Batch, jax.Array]] = deque()
    for batch in batches:
        waiting.append((batch, run(batch.images)))
        if len(waiting) > 1:
            first, result = waiting.popleft()
            yield first, np.asarray(result)
    while waiting:
        first, result = waiting.popleft()
        yield first, np.asarray(result)


def _checked(batch: Batch, result: np.ndarray, first: int) -> tuple[np.ndarray, dict[int, str]]:
    """The batch's features as bfloat16 and its invalid rows, counted from the shard's first row."""
    features = result[: batch.rows].astype(BFLOAT16)
    invalid = {row - first: why for row, why in batch.invalid.items()}
    finite = np.isfinite(features.astype(np.float32)).all(axis=1)
    for i in np.flatnonzero(~finite):
        invalid.setdefault(batch.first - first + int(i), "non-finite feature")
    for row in invalid:
        features[row - (batch.first - first)] = 0
    return features, invalid


def _commit(job: Job, shard: int, array: ts.TensorStore, journal: Journal) -> None:
    """Write a complete shard, then its manifest, then forget the journal."""
    first, rows = shard * SHARD, _rows(job.dataset, shard)
    try:
        # The future must be kept until its result is known: a dropped write is lost without a word.
        future = array[first : first + rows].write(journal.features)
        future.result()
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{job.features.path} cannot be written: {reason}; mend that and run the same command again"
        ) from None
    invalid = {first + row: why for row, why in journal.invalid.items()}
    keys = job.dataset.shard_keys[shard]
    job.features.write_manifest(Manifest(shard, first, rows, keys, job.features.identity, invalid))
    journal.remove()


def _remove_stale(features: Features) -> None:
    """Delete what killed processes left of unfinished writes, once all shards are there.

    Not earlier: another process may be writing a shard of its share.
    """
    if len(features.finished()) < features.dataset.shards:
        return
    for file in [*features.path.rglob("*.__lock"), *features.path.rglob(".*.tmp")]:
        file.unlink(missing_ok=True)
    # A kill between a shard's manifest and the end of its journal leaves the journal.
    shutil.rmtree(features.path / "partial", ignore_errors=True)


def _report(job: Job, rate: float | None) -> None:
    """The last lines on stdout: what there is now, and which rows are invalid."""
    path = job.features.path
    rows = sum(_rows(job.dataset, s) for s in job.shards)
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


def _named(images: Images, dataset: Dataset, row: int, why: str) -> str:
    block, i = images.place(row)
    return f"{block.keys[i]} in {Path(dataset.sources[block.sources[i]]).name}: {why}"
