"""Shards in a bucket: shared by machines, saved for other machines, written by one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import Features, open_features
from lit_fast.embed import commits
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.journal import Journal
from lit_fast.embed.locks import shard_lock_path
from lit_fast.embed.shard_writer import ShardWriter, copy_path, journal_path
from lit_fast.errors import UserError
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import exists, list_names, read_bytes, remove, walk_files
from lit_fast.storage.lock import InUseError, Lock, LostLockError
from lit_fast.storage.paths import join
from lit_fast.towers.loader import Batch
from tests.buckets import bucket  # noqa: F401
from tests.embed.contents import tree
from tests.embed.test_extract import SMALL_SHARDS, many

WIDTH = 4


@pytest.fixture
def features(
    bucket: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_shards: None,
) -> Features:
    """A store without features in a bucket, of 2500 rows in three shards."""
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    dataset = upload(many(tmp_path), f"{bucket}/d")
    return Features(dataset, "t", {"width": WIDTH, "identity": "x"})


def upload(dataset: Dataset, url: str) -> Dataset:
    for name, data in tree(dataset.path).items():
        write_atomic(join(url, name), data)
    return open_dataset(url)


def download(url: str) -> dict[str, bytes]:
    return {name: read_bytes(join(url, name)) for name in walk_files(url)}


def open_shard(features: Features, shard: int = 0, **options: str) -> ShardWriter:
    writer = ShardWriter(features, features.array(create=True), shard, {}, **options)
    writer.resume()
    return writer


def append(writer: ShardWriter, rows: int, seed: int = 0) -> None:
    """Append rows that depend on their numbers and the seed."""
    first = writer.first + writer.done
    values = np.arange(first, first + rows)[:, None] + np.full((1, WIDTH), seed)
    invalid = {first: "damaged"}
    writer.append(Batch(first, rows, np.zeros((rows, 1, 1, 3), np.uint8), invalid), values.astype(np.float32))


def test_shard_writer_on_another_machine_continues_from_the_copy_in_the_bucket(
    features: Features, tmp_path: Path
) -> None:
    whole = open_shard(features, scratch=str(tmp_path / "whole"))
    for rows in (100, 200, 724):
        append(whole, rows)
    whole.finish()
    want = download(features.path)
    for file in (features.manifest_path(0), features.shard_path(0)):
        remove(file)
    writer = open_shard(features, scratch=str(tmp_path / "one"))
    append(writer, 100)
    writer.save()
    append(writer, 200)
    writer.save()
    append(writer, 50)  # lost with the machine
    writer.close()
    shutil.rmtree(tmp_path / "one")
    writer = open_shard(features, scratch=str(tmp_path / "two"))
    assert writer.done == 300
    assert not writer.finished
    append(writer, 724)
    writer.finish()
    assert download(features.path) == want
    assert not exists(copy_path(features, 0))
    assert not list((tmp_path / "two").rglob("*.journal"))


def test_shard_writer_with_more_rows_on_the_disk_than_in_the_bucket_keeps_them(features: Features) -> None:
    writer = open_shard(features)
    append(writer, 64)
    writer.save()
    append(writer, 64)
    writer.close()
    with open(journal_path(features, 0), "ab") as file:
        file.write(b"LFJ1 half a record")
    writer = open_shard(features)
    assert writer.done == 128
    writer.save()
    writer.close()
    assert read_bytes(copy_path(features, 0)) == Path(journal_path(features, 0)).read_bytes()


@pytest.mark.parametrize("damage", ["other", "cut", "garbage"])
def test_shard_writer_with_a_damaged_copy_uses_its_first_rows(
    features: Features, tmp_path: Path, damage: str
) -> None:
    writer = open_shard(features, scratch=str(tmp_path / "one"))
    for _ in range(2):
        append(writer, 64)
    writer.save()
    writer.close()
    copy = copy_path(features, 0)
    data = read_bytes(copy)
    if damage == "other":
        Journal(tmp_path / "other", 1024, WIDTH, {"identity": "y"}).close()
        data = (tmp_path / "other").read_bytes()
    write_atomic(copy, {"cut": data[:-1], "garbage": b"x" * 100}.get(damage, data))
    writer = open_shard(features, scratch=str(tmp_path / "two"))
    assert writer.done == (64 if damage == "cut" else 0)
    writer.close()


def test_shard_writer_whose_shard_another_has_finished_keeps_the_manifest_of_the_values(
    features: Features, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both believe to hold the lock; the second one finishes while the first one writes its values."""
    monkeypatch.setattr(Lock, "check", lambda self: None)
    first = open_shard(features, scratch=str(tmp_path / "one"))
    append(first, 1024, seed=1)
    remove(shard_lock_path(features, 0))
    second = open_shard(features, scratch=str(tmp_path / "two"))
    append(second, 1024, seed=2)
    replace_manifest = Features.replace_manifest

    def late(self: Features, *arguments: object) -> bool:
        monkeypatch.setattr(Features, "replace_manifest", replace_manifest)
        second.finish()
        return replace_manifest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Features, "replace_manifest", late)
    with pytest.raises(LostLockError, match=r"shard 0 of .* was written by another process"):
        first.finish()
    assert not exists(features.manifest_path(0))
    first.close()


def test_shard_writer_whose_shard_another_has_finished_with_equal_values_succeeds(
    features: Features, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Lock, "check", lambda self: None)
    writers = []
    for name in ("one", "two"):
        writers.append(open_shard(features, scratch=str(tmp_path / name)))
        append(writers[-1], 1024)
        remove(shard_lock_path(features, 0))
    stored = writers[0]._manifest
    writers[0].finish()
    monkeypatch.setattr("lit_fast.embed.shard_writer.version", lambda path: stored)
    writers[1].finish()
    assert features.is_finished(0)


def start(url: str, tower: Path, cache: Path) -> subprocess.Popen[str]:
    """Embed in a process as on a machine of its own, with the default shares."""
    words = ["embed", url, "--tower", str(tower), "--name", "t", "--batch-size", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LIT_FAST_CACHE": str(cache)},
    )


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)  # several processes; the other tests use both
def test_embed_by_several_machines_of_which_one_vanishes_equals_embed_on_a_disk(
    bucket: str,  # noqa: F811
    tmp_path: Path,
    tiny_vit: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_fast.embed.job._POLL_SECONDS", 0.5)
    local = many(tmp_path)
    embed_dataset(local.path, str(tiny_vit), name="t", batch_size=2)
    url = f"{bucket}/d"
    upload(index_dataset([f"{tmp_path}/many.tar"], tmp_path / "again", seed=0), url)
    copy = f"{url}/features/t/partial/00000.journal"
    with start(url, tiny_vit, tmp_path / "gone") as gone:
        journals = tmp_path / "gone"
        while sum(file.stat().st_size for file in journals.rglob("00000.journal")) < 200 * 64:
            assert gone.poll() is None, gone.communicate()
            time.sleep(0.01)
        gone.send_signal(signal.SIGTERM)
        gone.communicate()
        assert gone.returncode == 143
    assert len(read_bytes(copy)) >= 200 * 64
    shutil.rmtree(tmp_path / "gone")
    with start(url, tiny_vit, tmp_path / "other") as other:
        while not any(name.endswith(".lock") for name in list_names(f"{url}/features/t/partial")):
            assert other.poll() is None, other.communicate()
            time.sleep(0.05)
        embed_dataset(url, str(tiny_vit), name="t", batch_size=2)
        out, err = other.communicate(timeout=100)
    assert other.returncode == 0, err
    assert "2,496 valid, 4 invalid" in out
    assert download(f"{url}/features/t") == tree(Path(local.path) / "features" / "t")


def test_embed_with_a_shard_that_another_machine_has_embeds_the_others_and_waits(
    bucket: str,  # noqa: F811
    tmp_path: Path,
    tiny_vit: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_fast.embed.job._POLL_SECONDS", 0.1)
    monkeypatch.setattr(commits, "SAVE_SECONDS", 0.0)
    url = f"{bucket}/d"
    dataset = upload(many(tmp_path), url)
    lock = Lock(f"{url}/features/t/partial/00001.lock", "shard 1", "stop it")
    seen: list[list[int]] = []

    def record_status(message: str) -> None:
        if "waiting for 1 shards (first: 1) that other processes embed" in message:
            seen.append(open_features(dataset, "t").finished())
            lock.release()

    monkeypatch.setattr("lit_fast.embed.job.status", record_status)
    with pytest.raises(InUseError, match=r"shard 1 of .* is being written by"):
        embed_dataset(url, str(tiny_vit), name="t", batch_size=64, share=(1, 2))
    embed_dataset(url, str(tiny_vit), name="t", batch_size=64)
    assert seen == [[0, 2]]
    assert open_features(dataset, "t").finished() == [0, 1, 2]
    assert not [name for name in walk_files(f"{url}/features/t") if name.startswith("partial")]


def test_embed_of_a_local_dataset_with_scratch_is_refused(tmp_path: Path, tiny_vit: Path) -> None:
    dataset = many(tmp_path)
    with pytest.raises(UserError, match="is not in a bucket and needs no --scratch; leave it out"):
        embed_dataset(dataset.path, str(tiny_vit), scratch=tmp_path)


def test_commits_in_the_background_save_journals_and_raise_errors(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard that could not be written is free again."""
    monkeypatch.setattr(commits, "SAVE_SECONDS", 0.0)
    background = commits.Commits(in_background=True)
    writer = open_shard(features)
    append(writer, 64)
    background.save_regularly(writer)
    background.wait()
    assert read_bytes(copy_path(features, 0)) == Path(journal_path(features, 0)).read_bytes()
    append(writer, 960)
    background.finish(writer)
    other = open_shard(features, 1)
    append(other, 1024)
    remove(shard_lock_path(features, 1))
    background.finish(other)
    with pytest.raises(LostLockError, match=r"00001\.lock was deleted"):
        background.wait()
    background.close()
    assert features.finished() == [0]
    open_shard(features, 1).close()
