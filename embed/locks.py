"""Which processes may write a dataset at the same time.

    D/.lock                                 index and import-features: the rows, everything else follows them
    D/tokens/<tokenizer>/.lock              tokenize
    D/features/<tower>/partial/00000.lock   embed, one per shard, so that several processes share the work

A process that writes tokens or features takes its own lock first and then checks that nobody writes the rows. A
process that appends rows does it the other way round. Of two that start at the same time at most one continues.
"""

from __future__ import annotations

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import Features
from lit_fast.errors import UserError
from lit_fast.storage.files import list_names
from lit_fast.storage.lock import Lock, LockWatch, check_unlocked
from lit_fast.storage.paths import StrPath, join

LOCK = ".lock"
_STOP = "stop it"


def lock_rows(out: StrPath) -> Lock:
    """Lock a dataset, which need not exist yet, against other processes that write its rows."""
    return Lock(join(out, LOCK), out, "choose another --out")


def lock_tokens(directory: StrPath) -> Lock:
    """Lock the tokens of one tokenizer."""
    return Lock(join(directory, LOCK), directory, "choose another --name")


def check_tokens_are_unlocked(directory: StrPath) -> None:
    """Raise UserError if a process writes the tokens of one tokenizer."""
    check_unlocked([join(directory, LOCK)], directory, "choose another --name")


def lock_shard(features: Features, shard: int, watch: LockWatch | None = None) -> Lock:
    """Lock one shard of a feature store; `watch` is what this process has seen of the lock before."""
    return Lock(shard_lock_path(features, shard), f"shard {shard} of {features.path}", _STOP, watch=watch)


def shard_lock_path(features: Features, shard: int) -> str:
    """Return the location of the lock of a shard."""
    return join(features.path, "partial", f"{shard:05d}.lock")


def check_rows_are_unlocked(dataset: Dataset) -> None:
    """Raise UserError if a process writes the rows of a dataset, or has appended some since it was opened.

    Call it after a lock of tokens or features was taken.
    """
    check_unlocked([join(dataset.path, LOCK)], dataset.path, _STOP)
    if open_dataset(dataset.path).shard_keys != dataset.shard_keys:
        raise UserError(f"{dataset.path} has grown since this command was started; rerun the same command")


def check_parts_are_unlocked(path: StrPath) -> None:
    """Raise UserError if a process writes tokens or features of a dataset; call it after `lock_rows`."""
    tokens, features = join(path, "tokens"), join(path, "features")
    locks = [join(tokens, name, LOCK) for name in list_names(tokens)]
    for tower in list_names(features):
        partial = join(features, tower, "partial")
        locks += [join(partial, name) for name in list_names(partial) if name.endswith(LOCK)]
    check_unlocked(locks, path, _STOP)
