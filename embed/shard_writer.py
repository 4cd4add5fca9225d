"""Write the features of one shard.

Batches are appended to a journal. Then the whole shard is written to the array, and its manifest last: a shard is
finished when its manifest exists. If a process is killed, any later one continues from the journal and produces
identical bytes.

Objects in buckets cannot be appended to: the journal of a store in a bucket is a local file, in the cache or another
directory. `save` copies it to the bucket, so that another machine continues from it:

    D/features/<tower>/partial/00000.journal
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, SHARD
from lit_fast.data.features import BFLOAT16, Features, Manifest, features_digest
from lit_fast.data.shards import read_error, tensorstore_reason
from lit_fast.embed.journal import Journal
from lit_fast.embed.locks import check_rows_are_unlocked, lock_shard
from lit_fast.errors import UserError
from lit_fast.storage.atomic import version, write_atomic
from lit_fast.storage.cache import local_directory
from lit_fast.storage.files import read_bytes, read_range, remove
from lit_fast.storage.lock import LockWatch, LostLockError
from lit_fast.storage.paths import is_bucket, join
from lit_fast.towers.loader import Batch
from lit_fast.utils.output import status

MAX_COPY_BYTES = 100 << 20  # of a journal in a bucket


class ShardWriter:
    """An unfinished shard of a feature store.

    Attributes:
      done: number of known rows, from the shard's first on.
      rows: number of rows of the shard.
      finished: whether the shard has its manifest.

    Call `resume` first, then `append` until `done` equals `rows`, then `finish`.
    """

    def __init__(
        self,
        features: Features,
        array: ts.TensorStore,
        shard: int,
        settings: dict[str, Any],
        *,
        scratch: str = "",
        watch: LockWatch | None = None,
    ) -> None:
        """Lock a shard and open its journal.

        Args:
          array: `features.array()`.
          settings: the settings that decide the bytes; a journal of others is discarded.
          scratch: local directory of the journal of a store in a bucket; "": the cache.
          watch: what this process has seen of the shard's lock before.

        Raises:
          UserError: another process embeds this shard, or writes the rows of the dataset.
        """
        self._lock = lock_shard(features, shard, watch)
        try:
            check_rows_are_unlocked(features.dataset)
            self._open(features, array, shard, settings, scratch)
        except BaseException:
            self._lock.release()
            raise

    def _open(
        self, features: Features, array: ts.TensorStore, shard: int, settings: dict[str, Any], scratch: str
    ) -> None:
        self._features, self._array, self._shard = features, array, shard
        self.first, self.rows = shard * SHARD, features.shard_rows(shard)
        path, self._copy = journal_path(features, shard, scratch), copy_path(features, shard)
        keys = features.dataset.shard_keys[shard]
        identity = {"identity": features.identity, "keys": keys} | settings
        self._journal = Journal(path, self.rows, array.shape[1], identity)
        self.finished = False
        self._manifest = version(features.manifest_path(shard))
        self._saved = self._saved_bytes = 0  # rows and bytes of the copy in the bucket
        if self._journal.discarded:
            status(
                f"note: {path} was written with other settings and is discarded; shard {shard} starts at its first row"
            )

    @property
    def done(self) -> int:
        return self._journal.done

    def resume(self) -> None:
        """Copy the rows that were stored before the dataset grew; finish the shard if all its rows are known.

        Raises:
          UserError: the stored rows are damaged.
        """
        features, shard = self._features, self._shard
        stored = features.manifest(shard) if self._manifest is not None else None
        if stored is not None and stored.rows >= self.rows:  # finished by another process meanwhile
            self._end()
            return
        if self._copy and self.done < self.rows:
            with suppress(FileNotFoundError):
                if self._journal.add_missing(read_bytes(self._copy)):
                    self._saved = self.done
        if stored is not None:
            self._copy_stored(stored)
        if self.done == self.rows:
            self.finish()

    def close(self) -> None:
        """Close the journal and release the lock."""
        self._journal.close()
        self._lock.release()

    def save(self) -> None:
        """Copy the journal of a store in a bucket to the bucket, if it has new rows.

        Of a journal of more than 100 MiB the first rows are copied.

        Raises:
          UserError: the bucket cannot be written, or the process has lost the lock of the shard.
        """
        if not self._copy or self.done <= self._saved or self._saved_bytes == MAX_COPY_BYTES:
            return
        done = self.done
        self._lock.check()
        data = read_range(self._journal.path, 0, MAX_COPY_BYTES)
        write_atomic(self._copy, data)
        self._saved, self._saved_bytes = done, len(data)

    def append(self, batch: Batch, result: np.ndarray) -> int:
        """Append the new rows of a batch.

        Args:
          batch: the next batch; its first rows may be known already.
          result: features, float32 `[batch rows, views * width]`.

        Returns:
          The number of new rows.

        Raises:
          UserError: the process has lost the lock of the shard.
        """
        known = self.done - (batch.first - self.first)
        features = result[known : batch.rows].astype(BFLOAT16)
        invalid = {
            row - self.first: reason for row, reason in batch.invalid.items() if row - self.first >= self.done
        }
        finite = np.isfinite(features.astype(np.float32)).all(axis=1)
        for i in np.flatnonzero(~finite):
            invalid.setdefault(self.done + int(i), "non-finite feature")
        for row in invalid:
            features[row - self.done] = 0
        self._lock.check_recent()
        self._journal.append(features, invalid)
        return len(features)

    def finish(self) -> None:
        """Write the complete shard and its manifest, then delete the journal.

        Raises:
          UserError: the store cannot be written.
          LostLockError: another process has taken over the shard.
        """
        features, shard, values = self._features, self._shard, self._journal.features
        invalid = {self.first + row: reason for row, reason in self._journal.invalid.items()}
        manifest = _manifest(features, shard, values, invalid)
        path = features.manifest_path(shard)
        self._lock.check()
        if version(path) != self._manifest:
            self._refuse()
        _write_values(features, self._array, self.first, values)
        if not features.replace_manifest(manifest, self._manifest) and features.manifest(shard) != manifest:
            remove(path)  # the shard's values are those of this process
            self._refuse()
        self._end()

    def _refuse(self) -> NoReturn:
        raise LostLockError(
            f"shard {self._shard} of {self._features.path} was written by another process, because this one was "
            "suspended; rerun the same command once that has ended"
        )

    def _end(self) -> None:
        self._journal.remove()
        if self._copy:
            remove(self._copy)
        self._lock.release()
        self.finished = True

    def _copy_stored(self, stored: Manifest) -> None:
        """Append the features that were stored before the dataset grew."""
        for lo in range(self.done, stored.rows, BLOCK):
            hi = min(lo + BLOCK, stored.rows)
            try:
                features = self._array[self.first + lo : self.first + hi].read().result()
            except ValueError as error:
                raise read_error(self._features.path, error) from None
            invalid = {row - self.first: reason for row, reason in stored.invalid.items()}
            self._journal.append(features, {row: r for row, r in invalid.items() if lo <= row < hi})
        if stored.features and features_digest(self._journal.features[: stored.rows]) != stored.features:
            self._journal.remove()
            raise UserError(
                f"{self._features.path}: shard {self._shard} is damaged, its digest differs from its manifest's; "
                f"repair it with: lit-fast verify {self._features.dataset.path} --tower {self._features.tower} "
                "--repair"
            )


def write_shard(
    features: Features, array: ts.TensorStore, shard: int, values: np.ndarray, invalid: dict[int, str]
) -> None:
    """Write all rows of a shard in one write, then its manifest.

    Args:
      values: bfloat16 `[rows, views * width]`.
      invalid: row of the dataset -> reason.

    Raises:
      UserError: the array cannot be written.
    """
    _write_values(features, array, shard * SHARD, values)
    features.write_manifest(_manifest(features, shard, values, invalid))


def _manifest(features: Features, shard: int, values: np.ndarray, invalid: dict[int, str]) -> Manifest:
    keys = features.dataset.shard_keys[shard]
    digest = features_digest(values)
    return Manifest(shard, shard * SHARD, len(values), keys, features.identity, invalid, digest)


def _write_values(features: Features, array: ts.TensorStore, first: int, values: np.ndarray) -> None:
    try:
        # Keep the future until its result is known: a write whose future is dropped may be lost silently.
        future = array[first : first + len(values)].write(values)
        future.result()
    except ValueError as error:
        raise UserError(
            f"{features.path} cannot be written: {tensorstore_reason(error)}; fix the cause, then rerun "
            "the same command"
        ) from None


def journal_path(features: Features, shard: int, scratch: str = "") -> str:
    """Return the local path of the journal of an unfinished shard.

    Args:
      scratch: directory of the journals of stores in buckets; "": the cache.
    """
    if not is_bucket(features.path):
        return join(features.path, "partial", f"{shard:05d}.journal")
    return join(local_directory("journals", features.path, scratch), f"{shard:05d}.journal")


def copy_path(features: Features, shard: int) -> str:
    """Return the location of the copy of a journal in the bucket; "" for a local store."""
    path = join(features.path, "partial", f"{shard:05d}.journal")
    return path if is_bucket(path) else ""


def remove_journal(features: Features, shard: int) -> None:
    """Delete the journal of an unfinished shard, in the cache or the store, and its copy in a bucket."""
    remove(journal_path(features, shard))
    if copy := copy_path(features, shard):
        remove(copy)


def batch_spans(done: int, rows: int, device_rows: int, devices: int) -> list[tuple[int, int]]:
    """Return (first row, rows) of the batches that cover a shard from row `done` on.

    A batch begins at a multiple of `device_rows` from the shard's first row and has up to `devices` times as many. So
    the rows that share a device's batch, and with them the bits of the features, do not depend on `done` and `devices`.
    """
    batch_rows = device_rows * devices
    start = done // device_rows * device_rows
    return [(lo, min(batch_rows, rows - lo)) for lo in range(start, rows, batch_rows)] if done < rows else []
