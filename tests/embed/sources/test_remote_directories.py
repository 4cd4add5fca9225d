"""Class folders, image-text pairs and records at URLs, on real servers and in fsspec's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from lit_fast.storage import remote
from lit_fast.storage.atomic import copy_files
from lit_fast.storage.files import walk_files
from tests.buckets import bucket  # noqa: F401
from tests.embed.sources.tf_example import example
from tests.helpers import encoded, picture, samples, write_tar


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Class folders, image-text pairs, and files of records."""
    root = tmp_path / "files"
    for i in range(6):
        image = encoded(picture(i))
        for path in (root / "classes" / "ab"[i % 2] / f"{i}.jpg", root / "pairs" / "00" / f"{i}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        (root / "pairs" / "00" / f"{i}.txt").write_text(f"picture {i}")
    (root / "classes" / "a" / "empty.jpg").touch()
    (root / "classes" / "a" / "notes.md").write_text("notes")
    (root / "records").mkdir()
    writer = ArrayRecordWriter(str(root / "records" / "x.array_record"), "group_size:1")
    for i in range(6):
        writer.write(example({"image": [encoded(picture(i))], "caption": [f"picture {i}".encode()]}))
    writer.close()
    write_tar(root / "t" / "0.tar", samples(4))
    return root


@pytest.fixture
def memory(files: Path) -> Iterator[str]:
    """The same files at memory://."""
    system = fsspec.filesystem("memory")
    system.put(str(files), "/data", recursive=True)
    yield "memory://data"
    system.rm("/data", recursive=True)


def images(dataset: Dataset) -> dict[str, tuple[bytes, tuple[str, ...], int]]:
    """Key -> image file, captions and label of every row, through the reader."""
    reader, keys = (
        ImageReader(dataset),
        [(k, l) for b in dataset.iter_blocks() for k, l in zip(b.keys, b.labels, strict=True)],
    )
    captions = [tuple(c) for block in dataset.iter_captions() for c in block]
    return {k: (reader.read(row), c, l) for row, ((k, l), c) in enumerate(zip(keys, captions, strict=True))}


def assert_equal(url: str, files: Path, tmp_path: Path) -> None:
    for name, source in (
        ("c", "classes/"),
        ("p", "pairs/"),
        ("r", "records/x.array_record"),
        ("t", "t/*.tar"),
    ):
        local = index_dataset([f"{files}/{source}"], tmp_path / f"local-{name}", seed=0)
        away = index_dataset([f"{url}/{source}"], tmp_path / f"away-{name}", seed=0)
        assert images(away) == images(local)
        assert away.left_out == local.left_out
        assert away.classnames == local.classnames
        check_sources(away)


def test_index_directories_and_records_of_a_bucket_equals_local(
    bucket: str,  # noqa: F811
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    copy_files(files, list(walk_files(files)), f"{bucket}/x")
    assert_equal(f"{bucket}/x", files, tmp_path)


def test_index_over_another_protocol_of_fsspec_equals_local(
    memory: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    assert_equal(memory, files, tmp_path)
    dataset = open_dataset(tmp_path / "away-t")
    fsspec.filesystem("memory").pipe("/data/t/0.tar", (files / "t" / "0.tar").read_bytes())
    with pytest.raises(UserError, match="is another file than when it was indexed"):
        check_sources(dataset)
    fsspec.filesystem("memory").pipe("/data/classes/a/0.jpg", encoded(picture(9)))
    dataset = open_dataset(tmp_path / "away-c")
    keys = [key for block in dataset.iter_blocks() for key in block.keys]
    with pytest.raises(ImageError, match="has changed since it was indexed"):
        ImageReader(dataset).read(keys.index("a/0.jpg"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("az://container/x.tar", "az://container/x.tar needs more packages; run: pip install adlfs"),
        ("sftp://host/x.tar", "needs more packages; run: pip install paramiko"),
        ("nosuch://host/x.tar", "cannot be read; give a local path or a URL with https://"),
        ("file:///etc/x.tar", "cannot be read; give a local path"),
        ("simplecache://x.tar", "cannot be read; give a local path"),
        ("memory://x.tar::file:///etc/x.tar", "cannot be read; give a local path"),
        ("memory://nothing/x.tar", "does not exist"),
        ("memory://nothing/", "has no files"),
        ("memory://nothing/*.tar", "matches no file"),
    ],
)
def test_index_a_url_that_cannot_be_read_is_one_line(
    url: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    for package in ("adlfs", "paramiko"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["index", url, "--out", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
