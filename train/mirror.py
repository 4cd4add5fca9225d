"""Train in a bucket: a local copy of the run directory, which is kept in step with the bucket.

    URL/checkpoints/<step>/...      files of a checkpoint
    URL/checkpoints/<step>.json     their sizes and digests: the checkpoint counts once this exists

All other files are written again when they have changed, every half minute and before a checkpoint's `.json`. So the
metrics never end before the last checkpoint. A checkpoint that Orbax drops here loses its `.json` first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

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
from lit_fast.storage.paths import join

PUSH_SECONDS = 30.0


class RunMirror:
    """The local copy of a run in a bucket.

    Attributes:
      local: the local directory, in the cache; it is made again from the bucket at the start.
    """

    def __init__(self, url: str, check: Callable[[], None]) -> None:
        """Copy the run from the bucket.

        Args:
          url: the run in a bucket.
          check: raises UserError if another process has taken the run over.

        Raises:
          UserError: the bucket cannot be read.
        """
        self.url, self._check = url, check
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

    def start(self) -> None:
        """Begin to write changes to the bucket in the background."""
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if the bucket could not be written."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for a checkpoint that is being written to the bucket: Orbax may delete its files after the next save."""
        with self._pushing:
            self.check()

    def close(self) -> None:
        """Write everything to the bucket and stop.

        Raises:
          UserError: it cannot be written.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.check()
        self._push()
        self.check()

    def _run(self) -> None:
        while not self._stop.wait(PUSH_SECONDS) and self._error is None:
            self._push()

    def _push(self) -> None:
        with self._pushing:
            try:
                self._check()
                self._push_changes()
            except UserError as error:
                self._error = error
            except OSError as error:
                self._error = UserError(f"{self.url} cannot be written: {first_line(error)}")

    def _push_changes(self) -> None:
        directory = join(self.local, "checkpoints")
        steps = {int(name) for name in list_names(directory) if name.isdigit()}
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
