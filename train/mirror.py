"""Train in a bucket: a local copy of the run directory, which is kept in step with the bucket.

    URL/checkpoints/<step>/...      files of a checkpoint
    URL/checkpoints/<step>.json     their sizes and digests: the checkpoint counts once this exists

All other files are written again when they have changed, every half minute and before a checkpoint's `.json`. So the
metrics never end before the last checkpoint. A checkpoint that Orbax drops here loses its `.json` first.
"""

from __future__ import annotations

import threading
from typing import Self

from lit_fast.errors import UserError, first_line
from lit_fast.runs.remote_checkpoints import delete_checkpoint, pull_checkpoint, push_checkpoint, stored_steps
from lit_fast.storage.cache import local_directory
from lit_fast.storage.files import (
    copy_files,
    file_status,
    list_names,
    make_directory,
    remove_tree,
    walk_files,
)
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import join

PUSH_SECONDS = 30.0


class RunMirror:
    """The local copy of a run in a bucket.

    As a context manager it writes changes to the bucket in the background, and all of them at the end.

    Attributes:
      local: the local directory, in the cache; it is made again from the bucket at the start.
      has_failed: whether a write to the bucket has failed; `check` raises its error.
    """

    def __init__(self, url: str, lock: Lock | None) -> None:
        """Copy the run from the bucket.

        Args:
          url: the run in a bucket.
          lock: of the run; without it nothing is written.

        Raises:
          UserError: the bucket cannot be read.
        """
        self.url, self._lock = url, lock
        self.local = local_directory("runs", url)
        self._error: UserError | None = None
        self._stop = threading.Event()
        self._pushing = threading.Lock()
        remove_tree(self.local)
        make_directory(self.local)
        names = [name for name in walk_files(url) if _is_small(name)]
        copy_files(url, names, self.local)
        self._sent = {name: self._version(name) for name in names}  # name -> version in the bucket
        self._steps = {step for step in stored_steps(url) if pull_checkpoint(url, step, self.local)}
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        if self._lock:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        self._stop.set()
        if self._lock:
            self._thread.join()
            if self._error is None:
                self._push()
        if isinstance(error, UserError) and error is not self._error:
            raise UserError(str(error).replace(self.local, self.url)) from None
        if self._error is not None:
            raise self._error

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Wait for a checkpoint that is being written to the bucket, whose files Orbax may delete after the next save.

        Raises:
          UserError: the bucket cannot be written, or another process has taken over the run.
        """
        with self._pushing:
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        while self._error is None and not self._stop.wait(PUSH_SECONDS):
            self._push()

    def _push(self) -> None:
        with self._pushing:
            try:
                if self._lock:
                    self._lock.check()
                self._push_changes()
            except UserError as error:
                self._error = error
            except OSError as error:
                self._error = UserError(f"{self.url} cannot be written: {first_line(error)}")

    def _push_changes(self) -> None:
        # The steps first: the files of the metrics are then at least as new as they.
        steps = {int(name) for name in list_names(join(self.local, "checkpoints")) if name.isdigit()}
        versions = {name: self._version(name) for name in _small_files(self.local)}
        changed = [name for name, version in versions.items() if self._sent.get(name) != version]
        copy_files(self.local, changed, self.url)
        self._sent |= {name: versions[name] for name in changed}
        for step in sorted(steps - self._steps):
            push_checkpoint(self.local, step, self.url)
            self._steps.add(step)
        for step in sorted(self._steps - steps):
            delete_checkpoint(self.url, step)
            self._steps.discard(step)

    def _version(self, name: str) -> tuple[int, int]:
        status = file_status(join(self.local, name))
        return status.size, status.modified


def _small_files(local: str) -> list[str]:
    """Return the names of the files outside of `checkpoints`, in which Orbax renames directories meanwhile."""
    names = []
    for top in list_names(local):
        if not _is_small(top):
            continue
        if file_status(join(local, top)).is_directory:
            names += [join(top, name) for name in walk_files(join(local, top))]
        else:
            names.append(top)
    return [name for name in names if _is_small(name)]


def _is_small(name: str) -> bool:
    return name.partition("/")[0] != "checkpoints" and not any(p.startswith(".") for p in name.split("/"))
