"""Embed the unfinished shards of one process.

They are embedded in order, in batches counted from the shard's first row, so that the rows of a batch never depend on
where a run was interrupted. `lit_fast.embed.shard_writer` has the order of the writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import jax
import numpy as np

from lit_fast.data.dataset import SHARD
from lit_fast.data.features import Features
from lit_fast.embed.commits import Commits
from lit_fast.embed.locks import check_rows_are_unlocked, shard_lock_path
from lit_fast.embed.pipeline import StallTimer, run_tower
from lit_fast.embed.shard_writer import ShardWriter, batch_spans
from lit_fast.storage.lock import InUseError, LockWatch
from lit_fast.storage.paths import is_bucket
from lit_fast.towers.embed import compile_tower
from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.loader import Batch, ImageLoader, load_batches
from lit_fast.utils.output import status
from lit_fast.utils.progress import Progress

_POLL_SECONDS = 5.0  # between two looks at the shards of other machines


@dataclass(frozen=True)
class Job:
    """The work of one process."""

    features: Features
    tower: FrozenTower
    shards: list[int]  # this process's share, finished or not
    batch_size: int  # images per device
    workers: int
    dtype: str
    max_pixels: int
    scratch: str  # directory of the journals of a store in a bucket; "": the cache
    is_shared: bool  # whether other machines may embed shards of the share meanwhile

    @property
    def rows(self) -> int:
        """Rows of the share."""
        return sum(map(self.features.shard_rows, self.shards))

    @property
    def device_rows(self) -> int:
        """Rows in the batch of one device."""
        return max(1, self.batch_size // self.features.views)


def embed_shards(job: Job, shards: list[int], signals: list[int]) -> float:
    """Embed the unfinished `shards` in order, until a signal comes.

    Returns:
      Images per second.
    """
    check_rows_are_unlocked(job.features.dataset)
    embedding = _Embedding(job, shards, signals)
    start, reported = time.monotonic(), False
    while True:
        embedded = embedding.rows
        shards = embedding.run(shards)
        if not shards or signals:
            break
        if embedding.rows == embedded:
            if not reported:
                status(f"waiting for {len(shards):,} shards (first: {shards[0]}) that other processes embed")
                reported = True
            deadline = time.monotonic() + _POLL_SECONDS
            while time.monotonic() < deadline and not signals:
                time.sleep(0.1)
    embedding.report()
    return embedding.rows / (time.monotonic() - start)


class _Embedding:
    """Embeds shards in order, as often as `run` is called.

    Attributes:
      rows: number of rows that were embedded.
    """

    def __init__(self, job: Job, shards: list[int], signals: list[int]) -> None:
        self._job, self._signals, self.rows = job, signals, 0
        self._array = job.features.array(create=True)
        self._tower = compile_tower(job.tower, job.dtype)
        self._loader = ImageLoader(
            job.features.dataset, job.tower.preprocess, job.max_pixels, job.features.views
        )
        self._devices = jax.local_device_count()
        self._finished_rows = job.rows - sum(map(job.features.shard_rows, shards))
        self._writers: dict[int, ShardWriter] = {}  # of the shards that batches are loaded for
        self._watches: dict[int, LockWatch] = {}
        self._postponed: list[int] = []
        self._stalls = StallTimer()
        self._progress: Progress | None = None

    def run(self, shards: list[int]) -> list[int]:
        """Embed the shards, until a signal comes.

        Returns:
          The shards that other processes had locked.
        """
        self._postponed = []
        batch_rows = self._job.device_rows * self._devices
        commits = Commits(in_background=is_bucket(self._job.features.path))
        try:
            with (
                closing(
                    load_batches(self._loader, self._spans(shards), batch_rows, self._job.workers)
                ) as batches,
                closing(run_tower(batches, self._tower, self._stalls)) as outputs,
            ):
                for batch, output in outputs:
                    self._store(batch, output.reshape(batch_rows, -1), commits)
                    if self._signals:
                        break
            commits.wait()
            if self._signals:  # the machine may vanish
                for writer in self._writers.values():
                    writer.save()
        finally:
            commits.close()
            for writer in self._writers.values():
                writer.close()
        return self._postponed

    def report(self) -> None:
        """Show the end of the progress and the bottleneck."""
        if self._progress is not None and not self._signals:
            self._progress.close()
            if advice := self._stalls.advice():
                status(advice)

    def _spans(self, shards: list[int]) -> Iterator[tuple[int, int]]:
        """Yield (first row, rows) of all batches; open a shard at its first batch."""
        for shard in shards:
            writer = self._open(shard)
            if writer is None:
                continue
            for lo, rows in batch_spans(writer.done, writer.rows, self._job.device_rows, self._devices):
                yield writer.first + lo, rows

    def _open(self, shard: int) -> ShardWriter | None:
        """Lock a shard and read what is known of it; None if it is finished, or locked by another process."""
        job = self._job
        watch = None
        if job.is_shared:
            if job.features.is_finished(shard):
                return None
            watch = self._watches.setdefault(shard, LockWatch(shard_lock_path(job.features, shard)))
            if watch.is_held():
                self._postponed.append(shard)
                return None
        settings = {"batch_size": job.batch_size, "max_pixels": job.max_pixels}
        try:
            writer = ShardWriter(job.features, self._array, shard, settings, scratch=job.scratch, watch=watch)
        except InUseError:
            if not job.is_shared:
                raise
            self._postponed.append(shard)
            return None
        self._writers[shard] = writer
        writer.resume()
        if writer.finished:
            del self._writers[shard]
            return None
        return writer

    def _store(self, batch: Batch, features: np.ndarray, commits: Commits) -> None:
        """Append the features of a batch to its shard; write the shard once it is complete."""
        shard = batch.first // SHARD
        writer = self._writers[shard]
        if self._progress is None:
            start = self._finished_rows + writer.done
            self._progress = Progress("embed", self._job.rows, "images", start=start)
            self._stalls.restart()
        count = writer.append(batch, features)
        self.rows += count
        self._progress.advance(count, self._stalls.note())
        if writer.done == writer.rows:
            del self._writers[shard]  # `finish` closes it
            commits.finish(writer)
        else:
            commits.save_regularly(writer)
