"""Train in a bucket: a local copy of the run directory, whose changes are written to the bucket.

    URL/checkpoints/<step>/...      files of a checkpoint
    URL/checkpoints/<step>.json     their sizes and digests: the checkpoint counts once this exists

All other files are written again when they have changed, every half minute and before a checkpoint's `.json`. So the
metrics never end before the last checkpoint. A checkpoint that Orbax drops here loses its `.json` first.

Of several processes the first one reads and writes checkpoints alone; each has its own local directory.
"""

from __future__ import annotations

import threading
import time
from typing import Self

import jax
from jax.experimental.multihost_utils import sync_global_devices

from lit_fast.errors import UserError, first_line
from lit_fast.runs.remote_checkpoints import (
    delete_checkpoint,
    delete_incomplete_checkpoints,
    pull_checkpoint,
    push_checkpoint,
    stored_steps,
)
from lit_fast.storage.atomic import copy_files, write_atomic
from lit_fast.storage.cache import local_directory
from lit_fast.storage.files import (
    exists,
    file_status,
    in_threads,
    is_file,
    list_names,
    make_directory,
    read_bytes,
    remove_tree,
    walk_files,
)
from lit_fast.storage.lock import Lock, LostLockError
from lit_fast.storage.paths import join
from lit_fast.utils.output import status

PUSH_SECONDS = 30.0
_LOOK_SECONDS = 1.0  # after which a new checkpoint is noticed
_SKELETON = ("metrics", "meta")  # parts of a checkpoint by which Orbax decides what to keep
_IDENTITY = ("config.toml", "tower.json", "tokens.json", "stream.json", "text_init.json")


class RunMirror:
    """The local copy of a run in a bucket.

    As a context manager it writes changes to the bucket in the background, and all of them at the end. After a write
    has failed, the local copy stays: the next training here continues from its checkpoints.

    Attributes:
      local: the local directory, in the cache.
      has_failed: whether a write to the bucket has failed; `push` raises its error.
    """

    def __init__(self, url: str, lock: Lock | None) -> None:
        """Copy the run from the bucket.

        Args:
          url: the run in a bucket.
          lock: of the run; None in all processes but the first, which write nothing.

        Raises:
          UserError: the bucket cannot be read.
        """
        self.url, self._lock = url, lock
        self.local = local_directory("runs", f"{url}#{jax.process_index()}")
        self._error: UserError | None = None
        self._stop = threading.Event()
        self._pushing = threading.Lock()
        self._sent: dict[str, tuple[int, int]] = {}  # name -> version in the bucket
        self._steps: set[int] = set()  # in the bucket
        if lock:
            delete_incomplete_checkpoints(url)
            self._steps = set(stored_steps(url))
        else:
            sync_global_devices("run in the bucket")  # the first process may have written it
        self._skeletons: set[int] = set()  # steps of which only a part is local
        if lock and self._is_ahead():
            status(f"{url} lacks checkpoints that {self.local} has; writing them")
            self._keep_newer()
            self.push(final=False)
        else:
            self._pull()
        if lock:
            sync_global_devices("run in the bucket")
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        if self._lock:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        self.push(final=True)
        if isinstance(error, UserError) and error is not self._error:
            raise UserError(str(error).replace(self.local, self.url)) from None

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def fetch(self, step: int) -> bool:
        """Copy all of a checkpoint from the bucket; return False if it is damaged there."""
        if step in self._skeletons:
            if not pull_checkpoint(self.url, step, self.local):
                return False
            self._skeletons.discard(step)
        return True

    def check(self) -> None:
        """Write new checkpoints to the bucket before Orbax may delete them; an error waits for `push`."""
        if self._lock and self._error is None and self._local_steps() != self._steps:
            self._push()

    def push(self, *, final: bool = True) -> None:
        """Write all changes to the bucket.

        Args:
          final: nothing is written afterwards.

        Raises:
          UserError: the bucket cannot be written, or another process has taken over the run.
        """
        if final and not self._stop.is_set():
            self._stop.set()
            if self._lock and self._thread.is_alive():
                self._thread.join()
        if self._lock and self._error is None:
            self._push()
        if self._error is not None:
            raise self._error

    def _pull(self) -> None:
        remove_tree(self.local)
        make_directory(self.local)
        names = [name for name in walk_files(self.url) if _is_small(name)]
        copy_files(self.url, names, self.local)
        self._sent = {name: self._version(name) for name in names}
        if self._lock:  # the first process
            # A damaged one is deleted from the bucket at the next push.
            self._skeletons = {
                step for step in self._steps if pull_checkpoint(self.url, step, self.local, _SKELETON)
            }

    def _keep_newer(self) -> None:
        """Keep the checkpoints of the local copy that are newer than those in the bucket."""
        for step in self._local_steps():
            if step in self._steps:
                self._skeletons.add(step)
            elif step < max(self._steps, default=0):
                remove_tree(join(self.local, "checkpoints", str(step)))

    def _is_ahead(self) -> bool:
        """Return whether an earlier process has left checkpoints here that it could not write to the bucket."""
        if max(self._local_steps(), default=0) <= max(self._steps, default=0):
            return False
        return all(_content(join(self.local, name)) == _content(join(self.url, name)) for name in _IDENTITY)

    def _run(self) -> None:
        last = time.monotonic()
        while self._error is None and not self._stop.wait(_LOOK_SECONDS):
            if time.monotonic() - last >= PUSH_SECONDS or self._local_steps() != self._steps:
                self._push()
                last = time.monotonic()

    def _push(self) -> None:
        with self._pushing:
            try:
                if self._lock:
                    self._lock.check()
                    self._push_changes(self._lock)
            except LostLockError as error:
                self._error = error
            except UserError as error:
                self._error = self._unwritable(error)
            except OSError as error:
                self._error = self._unwritable(
                    UserError(f"{self.url} cannot be written: {first_line(error)}")
                )

    def _unwritable(self, error: UserError) -> UserError:
        return UserError(
            f"{error.problem}; fix the cause, then rerun the same command, here to continue from "
            f"what is in {self.local}"
        )

    def _push_changes(self, lock: Lock) -> None:
        # The steps first: the files of the metrics are then at least as new as they.
        steps = self._local_steps()
        versions = {name: self._version(name) for name in _small_files(self.local)}
        changed = [name for name, version in versions.items() if self._sent.get(name) != version]

        def send(name: str) -> None:
            data = read_bytes(join(self.local, name))
            lock.check_recent()
            write_atomic(join(self.url, name), data)

        in_threads(send, changed)
        self._sent |= {name: versions[name] for name in changed}
        for step in sorted(steps - self._steps):
            try:
                push_checkpoint(self.local, step, self.url, lock.check_recent)
            except FileNotFoundError:
                if exists(join(self.local, "checkpoints", str(step))):
                    raise
                continue  # Orbax has just deleted it; the next process deletes what is in the bucket
            self._steps.add(step)
        for step in sorted(self._steps - steps):
            lock.check_recent()
            delete_checkpoint(self.url, step)
            self._steps.discard(step)

    def _local_steps(self) -> set[int]:
        return {int(name) for name in list_names(join(self.local, "checkpoints")) if name.isdigit()}

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
    top, *_ = parts = name.split("/")
    return not top.startswith(("checkpoints", "damaged")) and not any(part.startswith(".") for part in parts)


def _content(location: str) -> bytes | None:
    return read_bytes(location) if is_file(location) else None
