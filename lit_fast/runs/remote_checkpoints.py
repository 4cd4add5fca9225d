"""Checkpoints of a run in a bucket, which Orbax reads and writes in a local directory.

    URL/checkpoints/<step>/...      the files of the checkpoint
    URL/checkpoints/<step>.json     name -> [bytes, digest] of these files; written last and deleted first

A checkpoint exists once its `.json` exists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from contextlib import suppress

from lit_fast.errors import UserError
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.cache import local_directory
from lit_fast.storage.files import (
    in_threads,
    is_file,
    list_directories,
    list_names,
    make_directory,
    read_bytes,
    remove,
    remove_tree,
    rename,
    walk_files,
)
from lit_fast.storage.paths import is_bucket, join
from lit_fast.storage.text_files import read_object, write_json
from lit_fast.utils.output import status

_ATTEMPTS = 3  # to read a checkpoint of a run that is being trained, which may delete it meanwhile


def stored_steps(run: str) -> list[int]:
    """Return the steps of the complete checkpoints of a run, in a bucket or a local directory, in order."""
    names, end = list_names(join(run, "checkpoints")), ".json" if is_bucket(run) else ""
    return sorted(
        int(name.removesuffix(end)) for name in names if re.fullmatch(rf"[0-9]+{re.escape(end)}", name)
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
    problem = _pull(run, step, local, items)
    if problem:
        status(f"warning: checkpoint {_directory(run, step)} is damaged: {problem}; it is not used")
    return not problem


def _pull(run: str, step: int, local: str, items: Collection[str]) -> str:
    """Do as `pull_checkpoint`, but return the problem; "" if the checkpoint is whole."""
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
        remove_tree(partial)
        return problem
    make_directory(join(local, "checkpoints"))
    remove_tree(target)
    rename(partial, target)
    return ""


def delete_checkpoint(run: str, step: int) -> None:
    """Delete a checkpoint from the bucket."""
    remove(f"{_directory(run, step)}.json")
    remove_tree(_directory(run, step))


def delete_incomplete_checkpoints(run: str) -> None:
    """Delete the files of checkpoints without a `.json`, left by a killed process; call it with the lock of the run."""
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
    problem = ""
    for _ in range(_ATTEMPTS):
        steps = stored_steps(run)
        if not steps:
            raise UserError(f"run {run} has no checkpoint yet; wait until lit-fast train has saved one")
        if step is not None and step not in steps:
            raise UserError(
                f"run {run} has no checkpoint of step {step}; choose from {', '.join(map(str, steps))}"
            )
        chosen = steps[-1] if step is None else step
        marker = _marker(run, chosen)
        local = local_directory("checkpoints", f"{run}{marker!r}{','.join(sorted(items))}")
        if is_file(join(local, "complete")):
            return chosen, local
        with suppress(UserError):  # of a marker that has just been deleted
            problem = _pull(run, chosen, local, items)
            if not problem:
                write_atomic(join(local, "complete"), b"")
                return chosen, local
        if marker is not None and _marker(run, chosen) == marker:  # no training has replaced it meanwhile
            break
    raise UserError(
        f"checkpoint {_directory(run, chosen)} is damaged: {problem or 'its .json cannot be read'}; give another --step"
    )


def _marker(run: str, step: int) -> bytes | None:
    with suppress(FileNotFoundError):
        return read_bytes(f"{_directory(run, step)}.json")
    return None


def _directory(run: str, step: int) -> str:
    return join(run, "checkpoints", str(step))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
