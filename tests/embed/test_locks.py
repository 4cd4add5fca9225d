"""A process whose lock was taken over stops before it commits, and leaves the files to the other process."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lit_fast.embed.index
import lit_fast.embed.tokenize
import lit_fast.storage.lock
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import Features
from lit_fast.embed.importers.import_rows import import_rows
from lit_fast.embed.index import index_dataset
from lit_fast.embed.locks import check_rows_are_unlocked, lock_rows, shard_lock_path
from lit_fast.embed.relocate import relocate_sources
from lit_fast.embed.shard_writer import ShardWriter
from lit_fast.embed.tokenize import tokenize_dataset
from lit_fast.errors import UserError
from lit_fast.storage.holder import Holder
from lit_fast.storage.lock import InUseError, LostLockError
from lit_fast.towers.loader import Batch
from tests.helpers import samples, write_tar

OTHER = dataclasses.replace(
    Holder.this_process(), host="far", kernel="another/1/2", command="lit-fast index"
).encode()
LOST = r"was taken over by `lit-fast index` \(process .* on far, .* suspended for 60 s; rerun"


@pytest.fixture
def tars(tmp_path: Path) -> tuple[Path, Path]:
    return write_tar(tmp_path / "a.tar", samples(3)), write_tar(tmp_path / "b.tar", samples(5, first=50))


def lose(lock: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that first lets another process take over the lock."""

    def call(*arguments: Any) -> Any:
        lock.write_bytes(OTHER)
        return function(*arguments)

    return call


@pytest.mark.parametrize("append", [False, True])
def test_index_that_lost_its_lock_commits_nothing(
    tars: tuple[Path, Path], tmp_path: Path, append: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"
    if append:
        index_dataset([str(tars[1])], out)
    monkeypatch.setattr("lit_fast.embed.index._shuffled", lose(out / ".lock", lit_fast.embed.index._shuffled))
    with pytest.raises(LostLockError, match=LOST):
        index_dataset([str(tars[0])], out, append=append)
    assert (out / ".lock").read_bytes() == OTHER
    assert (out / ("index-1" if append else "index")).exists()  # the other process writes there
    assert open_dataset(out).rows == 5 if append else not (out / "dataset.json").exists()


def test_tokenize_that_lost_its_lock_commits_nothing(
    tars: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_dataset([str(tars[0])], tmp_path / "d")
    tokens = tmp_path / "d" / "tokens" / "words"
    function = lose(tokens / ".lock", lit_fast.embed.tokenize.encode_record)
    monkeypatch.setattr("lit_fast.embed.tokenize.encode_record", function)
    with pytest.raises(LostLockError, match=LOST):
        tokenize_dataset(tmp_path / "d", train_vocab=275, name="words")
    assert not (tokens / "tokens.json").exists()


def test_embed_that_lost_its_lock_writes_no_row(
    tars: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = index_dataset([str(tars[0])], tmp_path / "d")
    features = Features(dataset, "t", {"width": 4, "identity": "x"})
    writer = ShardWriter(features, features.array(create=True), 0, {})
    writer.resume()
    batch = Batch(0, 2, np.zeros((2, 8, 8, 3), np.uint8), {})
    Path(shard_lock_path(features, 0)).write_bytes(OTHER)
    clock = lit_fast.storage.lock._clock
    monkeypatch.setattr(lit_fast.storage.lock, "_clock", lambda: clock() + 3600)  # as after a suspension
    with pytest.raises(LostLockError, match=LOST):
        writer.append(batch, np.ones((2, 4), np.float32))
    with pytest.raises(LostLockError, match=LOST):
        writer.finish()
    writer.close()
    assert not features.manifests()


def test_writers_of_rows_refuse_a_locked_dataset(tars: tuple[Path, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "d")
    index_dataset([str(tars[0])], out)
    with lock_rows(out):
        for function in (
            lambda: relocate_sources(out, [f"{tmp_path}={tmp_path}"]),
            lambda: import_rows([("a", np.ones(3, "f4"), "a cat")], out, tower="t"),
            lambda: index_dataset([str(tars[1])], out, append=True),
        ):
            with pytest.raises(InUseError, match=f"^{re.escape(out)} is being written by"):
                function()
        index_dataset([str(tars[0])], out)  # there is nothing to write
    relocate_sources(out, [f"{tmp_path}={tmp_path}"])


def test_dataset_that_has_grown_since_it_was_opened_is_noticed(
    tars: tuple[Path, Path], tmp_path: Path
) -> None:
    old = index_dataset([str(tars[0])], tmp_path / "d")
    check_rows_are_unlocked(old)
    index_dataset([str(tars[1])], tmp_path / "d", append=True)
    features = Features(old, "t", {"width": 4, "identity": "x"})
    with pytest.raises(
        UserError, match=rf"^{re.escape(old.path)} has grown since this command was started; rerun"
    ):
        ShardWriter(features, features.array(create=True), 0, {})
    assert not list((tmp_path / "d").rglob("*.lock"))
