"""Checkpoints of a run in a bucket, which Orbax reads and writes in a local directory.

    URL/checkpoints/<step>/...      the files of the checkpoint
    URL/checkpoints/<step>.json     name -> [bytes, digest] of these files; written last and deleted first

A checkpoint exists once its `.json` exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

from lit_fast.errors import UserError
from lit_fast.storage.cache import local_directory
from lit_fast.storage.files import (
    in_threads,
    is_file,
    list_directories,
    list_names,
    make_directory,
    read_bytes,
    read_object,
    remove,
    remove_tree,
    rename,
    walk_files,
    write_atomic,
    write_json,
)
from lit_fast.storage.paths import join
from lit_fast.utils.output import status


def stored_steps(run: str) -> list[int]:
    """Return the steps whose checkpoints are complete in the bucket, in order."""
    names = list_names(join(run, "checkpoints"))
    return sorted(
        int(name[: -len(".json")]) for name in names if name.endswith(".json") and name[:-5].isdigit()
    )


def push_checkpoint(local: str, step: int, run: str, check: Callable[[], None]) -> None:
    """Write a checkpoint of the local run directory into the bucket.

    Args:
      check: is called before each write, and raises if this process may not write any longer.

    Raises:
      OSError: the local files cannot be read.
    """
    source, target = _directory(local, step), _directory(run, step)
    names = list(walk_files(source))

    def push(name: str) -> tuple[int, str]:
        data = read_bytes(join(source, name))
        check()
        write_atomic(join(target, name), data)
        return len(data), _digest(data)

    written = in_threads(push, names, 32)
    check()
    write_json(f"{target}.json", {"files": dict(zip(names, written, strict=True))})


def pull_checkpoint(run: str, step: int, local: str, items: Collection[str] = ()) -> bool:
    """Copy a checkpoint from the bucket into the local run directory.

    Args:
      items: the trees to copy, with the metadata; all if empty.

    Returns:
      Whether it is whole; a damaged one is reported and not copied.
    """
    source, target = _directory(run, step), _directory(local, step)
    files = read_object(f"{source}.json", "files", files=dict)["files"]
    wanted = [name for name in files if not items or "/" not in name or name.partition("/")[0] in items]
    partial = join(
        local, f"checkpoints.{step}.partial"
    )  # Orbax takes directories beside the steps for its own
    remove_tree(partial)

    def pull(name: str) -> str:
        try:
            data = read_bytes(join(source, name))
        except FileNotFoundError:
            return f"{name} is missing"
        if [len(data), _digest(data)] != files[name]:
            return f"{name} differs from what was saved"
        write_atomic(join(partial, name), data)
        return ""

    problem = next(filter(None, in_threads(pull, wanted, 32)), "")
    if problem:
        status(f"warning: checkpoint {source} is damaged: {problem}; it is not used")
        remove_tree(partial)
        return False
    make_directory(join(local, "checkpoints"))
    remove_tree(target)
    rename(partial, target)
    return True


def delete_checkpoint(run: str, step: int) -> None:
    """Delete a checkpoint from the bucket."""
    remove(f"{_directory(run, step)}.json")
    remove_tree(_directory(run, step))


def delete_incomplete_checkpoints(run: str) -> None:
    """Delete what a killed process has left of checkpoints without a `.json`; call it with the lock of the run."""
    complete = stored_steps(run)
    for name in list_directories(join(run, "checkpoints")):
        if name.isdigit() and int(name) not in complete:
            remove_tree(join(run, "checkpoints", name))


def cached_checkpoint(run: str, step: int | None, items: Collection[str]) -> tuple[int, str]:
    """Copy trees of a checkpoint of a run in a bucket to the cache.

    Args:
      step: by default the last one.

    Returns:
      The step and the local run directory, whose only checkpoint it is.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    steps = stored_steps(run)
    if not steps:
        raise UserError(f"run {run} has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"run {run} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    marker = read_bytes(f"{_directory(run, step)}.json")
    local = local_directory("checkpoints", run + marker.decode() + ",".join(sorted(items)))
    if not is_file(join(local, "complete")):
        if not pull_checkpoint(run, step, local, items):
            raise UserError(f"checkpoint {_directory(run, step)} is damaged; give another --step")
        write_atomic(join(local, "complete"), b"")
    return step, local


def _directory(run: str, step: int) -> str:
    return join(run, "checkpoints", str(step))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
