"""Finish shards. Those in a bucket are written in the background, one at a time, while the devices continue."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from lit_fast.embed.shard_writer import ShardWriter

SAVE_SECONDS = 180.0  # between copies of a journal in the bucket: the work that a killed machine loses


class Commits:
    """Writes shards of one store, and copies of journals, in order.

    Args:
      in_background: whether to write in a thread, and to save journals regularly.
    """

    def __init__(self, in_background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "commit") if in_background else None
        self._pending: Future[None] | None = None
        self._saved = time.monotonic()

    def finish(self, writer: ShardWriter) -> None:
        """Write a complete shard, after the one before; raises the errors of that one too."""
        if self._pool is None:
            _finish(writer)
        else:
            self.wait()
            self._pending = self._pool.submit(_finish, writer)
            self._saved = time.monotonic()

    def save_regularly(self, writer: ShardWriter) -> None:
        """Save the journal in hand if that is due and nothing is being written; raise the errors of earlier writes."""
        if self._pool is None or (self._pending and not self._pending.done()):
            return
        self.wait()
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self._pending = self._pool.submit(writer.save)
            self._saved = time.monotonic()

    def wait(self) -> None:
        """Wait until everything is written; raises its errors."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Wait until nothing is written any more, without raising errors."""
        if self._pool:
            self._pool.shutdown()


def _finish(writer: ShardWriter) -> None:
    try:
        writer.finish()
    finally:
        if not writer.finished:
            writer.close()
