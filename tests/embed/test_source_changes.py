"""Sources that changed after indexing, and sources at another place."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import open_features
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from tests.embed.contents import tree
from tests.web import file_server

COUNT = 24


def bitmap(number: int) -> bytes:
    """Return an image file; all have the same size."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def write_tar(path: Path, images: list[int]) -> None:
    """Write row i with image `images[i]` and the caption of row i; the size depends on the number of rows only."""
    with tarfile.open(path, "w") as tar:
        for i, number in enumerate(images):
            for name, data in ((f"{i:05d}.bmp", bitmap(number)), (f"{i:05d}.txt", b"caption %05d" % i)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, images: list[int]) -> None:
    table = pa.table(
        {"image": [bitmap(n) for n in images], "text": [f"caption {i}" for i in range(len(images))]}
    )
    pq.write_table(
        table, path, row_group_size=8, compression="none", use_dictionary=False, write_statistics=False
    )


def write_table(path: Path, images: list[int]) -> None:
    directory = path.parent / "images"
    directory.mkdir(exist_ok=True)
    for i, number in enumerate(images):
        (directory / f"{i}.bmp").write_bytes(bitmap(number))
    path.write_text("filepath,title\n" + "".join(f"images/{i}.bmp,text {i}\n" for i in range(len(images))))


WRITERS: dict[str, Callable[[Path, list[int]], None]] = {
    "a.tar": write_tar, "a.parquet": write_parquet, "a.csv": write_table
}  # fmt: skip


@pytest.fixture(params=WRITERS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "old" / request.param
    path.parent.mkdir()
    WRITERS[path.name](path, list(range(COUNT)))
    return path


def put_back_times(paths: list[Path], work: Callable[[], None]) -> None:
    times = [os.stat(path) for path in paths]
    work()
    for path, before in zip(paths, times, strict=True):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def read_all(dataset: Dataset) -> list[bytes]:
    reader = ImageReader(dataset)
    return [reader.read(row) for row in range(dataset.rows)]


def test_embed_after_source_was_packed_again_in_equal_size_stops(
    source: Path, tmp_path: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d"
    dataset = index_dataset([str(source)], out)
    size = source.stat().st_size
    WRITERS[source.name](source, [*range(1, COUNT), 0])
    assert source.stat().st_size == size
    with pytest.raises(UserError, match=r"(has other content than|have changed since)"):
        embed_dataset(dataset.path, str(tiny_vit))
    assert not (out / "features/tiny/manifests").exists()
    assert main(["verify", str(out)]) == 1
    assert "WRONG  sources: " in capsys.readouterr().out
    assert main(["info", str(out)]) == 0
    if source.suffix != ".csv":
        assert "1 of 1 sources changed" in capsys.readouterr().out


def test_read_of_one_changed_image_with_the_old_time_is_refused(source: Path, tmp_path: Path) -> None:
    """While reading, even where size and time say nothing: two of many images are exchanged."""
    if source.suffix == ".parquet":
        pytest.skip("its rows have no checksums: the file's time and digest are compared")
    dataset = index_dataset([str(source)], tmp_path / "d")
    right = read_all(dataset)
    files = [source, *sorted((source.parent / "images").glob("*"))]
    swapped = [0, 17, *range(2, 17), 1, *range(18, COUNT)]
    put_back_times(files, lambda: WRITERS[source.name](source, swapped))
    reader, refused = ImageReader(open_dataset(dataset.path)), []
    for row in range(dataset.rows):
        try:
            assert reader.read(row) == right[row]
        except (UserError, ValueError) as error:
            refused.append("has changed since it was indexed" in str(error))
    assert refused == [True, True]


def test_parquet_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(range(COUNT)))
    dataset = index_dataset([str(tmp_path / "a.parquet")], tmp_path / "d")
    reader = ImageReader(dataset)
    reader.read(0)
    write_parquet(tmp_path / "a.parquet", list(range(1, COUNT + 1)))
    with pytest.raises(UserError, match="has other content than when it was indexed"):
        [reader.read(row) for row in range(dataset.rows)]


def test_source_copied_with_another_time_is_accepted(source: Path, tmp_path: Path, tiny_vit: Path) -> None:
    dataset = index_dataset([str(source)], tmp_path / "d")
    for file in (source, *(source.parent / "images").glob("*")):
        os.utime(file, ns=(1, 1))
    check_sources(dataset)
    embed_dataset(dataset.path, str(tiny_vit))
    assert index_dataset([str(source)], tmp_path / "d").rows == COUNT  # still the same dataset


def test_source_written_while_it_is_indexed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_fast.embed.sources import formats

    write_tar(tmp_path / "a.tar", list(range(4)))
    read = formats.FORMATS["tar"].read

    def read_and_write(path, options):
        yield from read(path, options)
        write_tar(tmp_path / "a.tar", [3, 2, 1, 0])

    monkeypatch.setitem(formats.FORMATS, "tar", formats.Format(read_and_write, (".tar",)))
    with pytest.raises(UserError, match=r"a\.tar has other content .*: it was written while it was read"):
        index_dataset([str(tmp_path / "a.tar")], tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_relocate_to_a_directory_connects_the_images_again(
    source: Path, tmp_path: Path, tiny_vit: Path
) -> None:
    out, new = tmp_path / "d", tmp_path / "new=place"
    dataset = index_dataset([str(source)], out)
    right = read_all(dataset)
    embed_dataset(dataset.path, str(tiny_vit), name="before")
    shutil.copytree(source.parent, new, copy_function=shutil.copyfile)  # other times
    shutil.rmtree(source.parent)
    with pytest.raises(UserError, match=r"if it has moved: lit-fast index --relocate OLD=NEW"):
        embed_dataset(dataset.path, str(tiny_vit), name="after")
    assert main(["index", "--relocate", f"{source.parent}={new}", str(out)]) == 0
    moved = open_dataset(out)
    assert moved.sources[0].path == str(new / source.name)
    assert read_all(moved) == right
    embed_dataset(out, str(tiny_vit), name="after")
    before, after = (open_features(moved, n).read_all().view(np.uint16) for n in ("before", "after"))
    np.testing.assert_array_equal(before, after)
    assert main(["index", str(new / source.name), "--out", str(out)]) == 0  # "is already indexed"
    assert main(["verify", str(out)]) == 0


def test_relocate_to_a_url_is_compared_by_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_tar(old / "a.tar", list(range(COUNT)))
    write_parquet(old / "b.parquet", list(range(COUNT)))
    (old / "classes/cat").mkdir(parents=True)
    for i in range(3):
        (old / f"classes/cat/{i}.bmp").write_bytes(bitmap(100 + i))
    out = tmp_path / "d"
    sources = [str(old / name) for name in ("a.tar", "b.parquet", "classes")]
    right = read_all(index_dataset(sources, out))
    os.rename(old, tmp_path / "served")
    with file_server(tmp_path / "served") as server:
        assert main(["index", "--relocate", f"{old}={server.url}", str(out)]) == 0
        said = capsys.readouterr().out
        assert "3 of 3 sources are at their new place: sizes equal, 2 digests equal" in said
        moved = open_dataset(out)
        check_sources(moved)
        assert read_all(moved) == right
        # And back, to other files of the same names and sizes.
        before = tree(out)
        shutil.copytree(tmp_path / "served", tmp_path / "other")
        write_parquet(tmp_path / "other/b.parquet", [*range(1, COUNT), 0])
        assert main(["index", "--relocate", f"{server.url}={tmp_path / 'other'}", str(out)]) == 2
        assert "b.parquet has other content than when it was indexed" in capsys.readouterr().err
        write_parquet(tmp_path / "other/b.parquet", list(range(COUNT)))
        (tmp_path / "other/classes/cat/1.bmp").write_bytes(bitmap(7))
        assert main(["index", "--relocate", f"{server.url}={tmp_path / 'other'}", str(out)]) == 2
        assert "is not at its new place: the image file has changed" in capsys.readouterr().err
        assert tree(out) == before


def test_relocate_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [0, 1])
    out = tmp_path / "d"
    index_dataset([str(tmp_path / "a.tar")], out)

    def refused(*arguments: str) -> str:
        assert main(["index", *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert f"no source begins with OLD; the sources are in {tmp_path}" in refused(
        "--relocate", "/elsewhere=/x", str(out)
    )
    assert "a.tar" in refused("--relocate", f"{tmp_path}=/nowhere", str(out))
    assert "--relocate takes one dataset and no --out" in refused(
        "--relocate", f"{tmp_path}=/x", str(out), "--append"
    )
    assert "the following arguments are required: --out" in refused(str(tmp_path / "a.tar"))
    assert "no source begins with OLD" in refused("--relocate", str(tmp_path), str(out))


def test_keys_that_repeat_in_other_sources_are_rows_of_their_own(
    tmp_path: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two downloads, Hub datasets, tables and class folders with equal names; growing keeps them apart."""
    sources = []
    for n, kind in enumerate(("cc3m", "cc12m")):
        directory = tmp_path / kind
        (directory / "data").mkdir(parents=True)
        images = list(range(50 * n, 50 * n + 5))
        write_tar(directory / "00000.tar", images)
        write_parquet(directory / "data/train-00000-of-00001.parquet", images)
        write_table(directory / "captions.csv", images)
        sources.append(
            [str(directory / s) for s in ("00000.tar", "data/train-00000-of-00001.parquet", "captions.csv")]
        )
    at_once = index_dataset([*sources[0], *sources[1]], tmp_path / "at_once")
    grown = index_dataset(sources[0], tmp_path / "grown")
    grown = index_dataset(sources[1], tmp_path / "grown", append=True)
    assert (at_once.rows, at_once.left_out, grown.rows, grown.left_out) == (30, {}, 30, {})
    assert (
        sorted(read_all(at_once))
        == sorted(read_all(grown))
        == sorted(3 * [bitmap(i) for i in (*range(5), *range(50, 55))])
    )
    names = {grown.row_name(block, i) for block in grown.iter_blocks() for i in range(len(block.keys))}
    assert len(names) == 30
    assert {"00003 in cc3m/00000.tar", "00003 in cc12m/00000.tar"} <= names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b.tar"], ("b.tar",)),
        (["/a/x.tar", "/a/y.tar"], ("x.tar", "y.tar")),
        (["/a/x.tar", "/b/x.tar", "/b/y.tar"], ("a/x.tar", "b/x.tar", "y.tar")),
        (["x.tar", "/x.tar", "/b/x.tar"], ("x.tar", "/x.tar", "b/x.tar")),
        (["s3://a/t/0.tar", "gs://a/t/0.tar"], ("s3://a/t/0.tar", "gs://a/t/0.tar")),
    ],
)  # fmt: skip
def test_shortest_names_differ(paths: list[str], names: tuple[str, ...]) -> None:
    from lit_fast.data.dataset import shortest_names

    assert shortest_names(paths) == names


def _two_sources(root: Path) -> tuple[Path, list[bytes]]:
    """Index a/x.tar and b/x.tar, of different images, and exchange the directories."""
    for name, images in (("a", [0, 1, 2]), ("b", [3, 4, 5])):
        (root / name).mkdir()
        write_tar(root / name / "x.tar", images)
    right = read_all(index_dataset([f"{root}/a/x.tar", f"{root}/b/x.tar"], root / "d"))
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        os.rename(root / old, root / new)
    return root / "d", right


def test_relocate_of_exchanged_directories_works_in_one_command(tmp_path: Path) -> None:
    out, right = _two_sources(tmp_path)
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(["index", "--relocate", f"{a}={b}", "--relocate", f"{b}={a}", str(out)]) == 0
    check_sources(open_dataset(out))
    assert read_all(open_dataset(out)) == right


def test_relocate_of_one_source_to_the_place_of_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = _two_sources(tmp_path)
    before = tree(out)
    assert main(["index", "--relocate", f"{tmp_path}/a={tmp_path}/b", str(out)]) == 2
    assert (
        "b/x.tar would be 2 sources of the dataset; give all moves in one command" in capsys.readouterr().err
    )
    assert tree(out) == before


@pytest.mark.parametrize("turn", [1, -1])
def test_relocate_of_nested_directories_follows_the_innermost(tmp_path: Path, turn: int) -> None:
    outer, inner = tmp_path / "data", tmp_path / "data/more"
    inner.mkdir(parents=True)
    write_tar(outer / "x.tar", [0, 1])
    write_tar(inner / "x.tar", [2, 3])
    right = read_all(index_dataset([f"{outer}/x.tar", f"{inner}/x.tar"], tmp_path / "d"))
    os.rename(inner, tmp_path / "inner")
    os.rename(outer, tmp_path / "outer")
    moves = [("--relocate", f"{outer}={tmp_path}/outer"), ("--relocate", f"{inner}={tmp_path}/inner")][::turn]
    assert main(["index", *moves[0], *moves[1], str(tmp_path / "d")]) == 0
    assert read_all(open_dataset(tmp_path / "d")) == right


def _move_images_away(tmp_path: Path) -> Path:
    """Index a table with a directory of images, then put an empty directory in the place of the images."""
    write_table(tmp_path / "a.csv", [0, 1, 2])
    index_dataset([str(tmp_path / "a.csv")], tmp_path / "d")
    os.rename(tmp_path / "images", tmp_path / "away")
    (tmp_path / "images").mkdir()
    return tmp_path / "d"


def test_embed_where_all_images_are_missing_stops_before_work(
    tmp_path: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _move_images_away(tmp_path)
    assert main(["embed", str(out), "--tower", str(tiny_vit)]) == 2
    assert re.search(
        r"none of 3 sampled images of .* can be read .*--relocate OLD=NEW", capsys.readouterr().err
    )


def test_verify_names_images_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _move_images_away(tmp_path)
    os.rename(tmp_path / "away/2.bmp", tmp_path / "images/2.bmp")
    assert main(["verify", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 sampled images not read: " in said
    assert f"--relocate OLD=NEW {out}" in said


def test_index_of_a_directory_again_says_that_new_files_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes/cat").mkdir(parents=True)
    (tmp_path / "classes/cat/0.bmp").write_bytes(bitmap(0))
    command = ["index", str(tmp_path / "classes"), "--out", str(tmp_path / "d")]
    assert main(command) == 0
    (tmp_path / "classes/cat/1.bmp").write_bytes(bitmap(1))
    for more in ([], ["--append"]):
        capsys.readouterr()
        assert main([*command, *more]) == 0
        assert "classes was not read again; files that were added to it since are not in the dataset" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize("at", [1000, -1])
def test_verify_notices_a_changed_byte_behind_the_old_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [0, 1])
    out = index_dataset([str(path)], tmp_path / "d").path
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    put_back_times([path], lambda: path.write_bytes(data))
    assert main(["verify", out]) == 1
    assert "a.tar has other content than when it was indexed" in capsys.readouterr().out


def test_verify_compares_sampled_images_in_archives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [0, 1])
    out = index_dataset([str(path)], tmp_path / "d").path
    write_tar(path, [1, 0])
    # As for a large file, of which the digest covers little.
    monkeypatch.setattr("lit_fast.embed.verify.sources.find_change", lambda source: "")
    monkeypatch.setattr("lit_fast.embed.verify.sources.find_other_content", lambda source: "")
    assert main(["verify", out]) == 1
    assert "a.tar has changed since it was indexed: the image of " in capsys.readouterr().out
