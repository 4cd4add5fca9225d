"""SOURCE arguments: files, patterns and directories, and the recognition of formats."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorboardX.record_writer import RecordWriter

from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.expand import expand
from lit_fast.embed.sources.formats import FORMATS, format_of
from lit_fast.errors import UserError
from tests.helpers import tar_bytes


def names(patterns: list[str]) -> list[str]:
    return ["/".join(p.split("/")[-2:]) for p in expand(patterns)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "a/1.tar",
        "a/2.tar",
        "a/10.tar",
        "b/1.tar",
        "b/note.txt",
        "wds/test/0.tar",
        "s/test/0.tar",
        "s/train/0.tar",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "x.tar").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        (["a"], ["a/1.tar", "a/2.tar", "a/10.tar"]),
        (["a/*.tar"], ["a/1.tar", "a/2.tar", "a/10.tar"]),
        (["a/{1..2}.tar", "a/1.tar"], ["a/1.tar", "a/2.tar"]),
        (["{a,b}/?.tar"], ["a/1.tar", "a/2.tar", "b/1.tar"]),
        (["b/1.tar", "a/[2].tar"], ["a/2.tar", "b/1.tar"]),
        (["wds"], ["test/0.tar"]),
        (["b/note.txt"], ["b/note.txt"]),
    ],
)
def test_expand(tree: Path, patterns: list[str], want: list[str]) -> None:
    assert names([f"{tree}/{p}" for p in patterns]) == want
    assert all(p.startswith("/") for p in expand([f"{tree}/{p}" for p in patterns]))


def test_expand_leaves_junk_out_below_the_given_directory(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "set"
    for name in ("0.tar", "._0.tar", "__MACOSX/0.tar", "__MACOSX/._0.tar", "a/.old/1.tar", "@eaDir/0.tar"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    for pattern in ("", "/*.tar", "/**/*.tar", "/**", "/[._0]*.tar", "/0.tar"):
        assert expand([f"{root}{pattern}"]) == [f"{root}/0.tar"]
    assert expand([f"{root}/._0.tar"]) == [f"{root}/._0.tar"]  # named exactly


def test_expand_keeps_leading_zeros(tmp_path: Path) -> None:
    for n in (8, 9, 10):
        (tmp_path / f"{n:05d}.tar").write_bytes(b"")
    assert [Path(p).name for p in expand([f"{tmp_path}/{{00008..00010}}.tar"])] == [
        "00008.tar",
        "00009.tar",
        "00010.tar",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{tree}/c/*.tar", r"c/\*.tar matches no file"),
        ("{tree}/a/{{1..3}}.tar", r"a/3.tar \(from .*\) does not exist"),
        ("{tree}/nothing", "does not exist"),
        ("gopher://host/{{0..3}}.tar/", "cannot be read; give a local path or a URL"),
        ("{tree}/s", "splits test, train; name one"),
        ("{tree}/a/{{9..1}}.tar", "not a range"),
    ],
)
def test_expand_refuses(tree: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand([pattern.format(tree=tree)])


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("noise:7", "noise"),
        ("/x/a.TAR", "tar"),
        ("s3://bucket/a.pq", "parquet"),
        ("https://host/a.tsv?version=2.tar", "table"),
        ("/x/captions.json", "json"),
        ("/x/flowers-train.array_record-00000-of-00004", "array_record"),
        ("/x/flowers-train.tfrecord-00000-of-00004", "tfrecord"),
        ("https://host/download?id=5", "tar"),
    ],
)
def test_format_of_is_decided_by_the_name(path: str, format: str) -> None:
    assert format_of(path) == format


def test_format_of_is_decided_by_content_without_a_known_suffix(tmp_path: Path) -> None:
    array_record = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
    array_record.write(b"record")
    array_record.close()
    tfrecord = RecordWriter(str(tmp_path / "b"))
    tfrecord.write(b"record")
    tfrecord.close()
    (tmp_path / "c").write_bytes(b"PAR1")
    (tmp_path / "d").write_bytes(tar_bytes([("x.jpg", b"x")]))
    (tmp_path / "e").write_bytes(tar_bytes([("ü" * 200, b"x")], tarfile.PAX_FORMAT))
    found = {name: format_of(str(tmp_path / name)) for name in "abcde"}
    assert found == {"a": "array_record", "b": "tfrecord", "c": "parquet", "d": "tar", "e": "tar"}
    assert format_of(str(tmp_path)) == "folder"


def packed(mode: str) -> bytes:
    """A compressed tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{mode}") as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("x.jpg"))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.jpg", b"x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        # The ids must be the same in all processes of the tests: archives hold the time.
        ("a.zip", b"", "is a ZIP archive, which is not read; unpack it and give the directory"),
        ("a", zipped(), "is a ZIP archive, which is not read; unpack it and give the directory"),
        ("a.7z", b"", "is a 7z archive, which is not read; unpack it"),
        ("a.rar", b"", "is a RAR archive, which is not read; unpack it"),
        ("a.tar.gz", packed("gz"), "is compressed with gzip, which is not read; decompress it"),
        ("a.tgz", b"", "is compressed with gzip, which is not read; decompress it"),
        ("download", packed("xz"), "is compressed with xz, which is not read; decompress it"),
        ("a.h5", b"", "is an HDF5 file, which is not read; convert it to parquet or tars"),
        ("data.mdb", b"", "is an LMDB database, which is not read; convert it"),
        ("a.pkl", b"", "is a pickle, which is not read; write parquet or tars instead"),
        ("a.npz", zipped(), "is a NumPy file, which is not read; for features: lit-fast import-features"),
        ("a.JPG", b"", "is one image, which is not read; give its directory, or a table that names it"),
        ("photo", b"\xff\xd8\xff\xe0", "is one image, which is not read"),
        ("empty", b"", "is empty; give a file with data"),
        ("zeros", bytes(1000), "is empty; give a file with data"),
        (
            "a.md",
            b"# Title",
            "begins with b'# Title', which is no known format; give a file of .tar, .parquet",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",
)
def test_a_format_that_is_not_read_is_one_line(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(data or (b"" if name == "empty" else b"anything at all"))
    with pytest.raises(UserError, match=re.escape(f"{path} {problem}")) as caught:
        format_of(str(path))
    assert "\n" not in str(caught.value)
    if "." in name and not data:
        with pytest.raises(UserError, match=re.escape(problem)):
            format_of(f"https://host/{name}")


def test_each_suffix_belongs_to_one_format() -> None:
    suffixes = [suffix for format in FORMATS.values() for suffix in format.suffixes]
    assert len(suffixes) == len(set(suffixes))


def test_expand_warns_of_missing_members_of_a_numbered_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (
        "train-00000-of-00003-abc.parquet",
        "train-00002-of-00003-abc.parquet",
        "test-00000-of-00001.parquet",
    ):
        (tmp_path / file).write_bytes(b"")
    expand([str(tmp_path)])
    warning = f"warning: {tmp_path}/train-00001-of-00003 is missing: 2 of 3 such files are there\n"
    assert capsys.readouterr().err == warning
    expand([f"{tmp_path}/train-*"])
    assert capsys.readouterr().err == warning
    expand([f"{tmp_path}/train-00000-of-00003-abc.parquet"])  # chosen by name
    assert capsys.readouterr().err == ""


def test_expand_of_a_spark_directory_gives_its_parts(tmp_path: Path) -> None:
    parts = [f"part-0000{i}-1234.c000.snappy.parquet" for i in range(2)]
    for file in ("_SUCCESS", "_metadata", "_common_metadata", f".{parts[0]}.crc", *parts):
        (tmp_path / file).write_bytes(b"")
    assert expand([str(tmp_path)]) == [f"{tmp_path}/{part}" for part in parts]


def test_expand_of_pairs_with_a_captions_txt_gives_the_directory(tmp_path: Path) -> None:
    for file in ("captions.txt", "a.jpg", "a.txt"):
        (tmp_path / file).write_bytes(b"x")
    assert expand([str(tmp_path)]) == [str(tmp_path)]


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.csv", "a.json"])
def test_index_a_pointer_of_git_lfs_names_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 123\n")
    with pytest.raises(
        UserError, match="is a pointer of Git LFS and not the file; get it with: git lfs pull"
    ):
        index_dataset([str(tmp_path / name)], tmp_path / "d")


def test_index_texts_beside_images_are_named_where_a_table_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "0.jpg").write_bytes(b"x")
    (root / "0.txt").write_text("a dog")
    (root / "metadata.csv").write_text("file_name,text\n0.jpg,a cat\n")
    index_dataset([str(root)], tmp_path / "d")
    assert "images are not read, only metadata.csv" in capsys.readouterr().err
