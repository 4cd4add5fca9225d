"""Every format that `index` reads: rows, guessed columns, skipped entries, and the images afterwards."""

from __future__ import annotations

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lit_fast.data.images.parquet
import lit_fast.embed.row_reader
from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.interface import Columns
from lit_fast.errors import UserError
from tests.helpers import encoded, picture, samples, tar_bytes, write_tar

FILES = [encoded(picture(i)) for i in range(12)]


def index(source: Path | str, out: Path, **options: Any) -> Dataset:
    return index_dataset([str(source)], out, seed=0, options=Columns(**options))


def rows(dataset: Dataset) -> dict[str, tuple[Any, ...]]:
    """Key -> captions, languages, label and image file of every row."""
    reader, found, row = ImageReader(dataset), {}, 0
    for block, captions in zip(dataset.iter_blocks(), dataset.iter_captions(), strict=True):
        for i, key in enumerate(block.keys):
            languages = block.languages[i] if block.languages else []
            found[key] = (captions[i], languages, block.labels[i], reader.read(row))
            row += 1
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Files `0.jpg` to `11.jpg`."""
    for i, data in enumerate(FILES):
        path = tmp_path / "images" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


# --- parquet


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    """A struct of bytes and path; the class names are in the metadata; a row without bytes keeps its position."""
    struct = [{"bytes": data, "path": None} for data in FILES]
    struct[3] = {"bytes": None, "path": "x"}
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    table = pa.table({"image": struct, "label": [i % 2 for i in range(12)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    dataset = index(tmp_path / "a.parquet", tmp_path / "d")
    assert (dataset.rows, dataset.labelled, dataset.classnames) == (12, 12, ("cat", "dog"))
    [block] = dataset.iter_blocks()
    assert sorted(block.keys)[0] == f"{tmp_path.name}/a.parquet/0/0"
    reader = ImageReader(dataset)
    for row, (group, within) in enumerate(zip(block.offsets, block.sizes, strict=True)):
        number = 5 * group + within
        assert block.labels[row] == number % 2
        if number == 3:
            with pytest.raises(ImageError, match="no image in the row"):
                reader.read(row)
        else:
            assert reader.read(row) == FILES[number]
    # A row group is one run of rows, shuffled within.
    runs = [group for i, group in enumerate(block.offsets) if i == 0 or group != block.offsets[i - 1]]
    assert sorted(runs) == [0, 1, 2]
    assert block.sizes != sorted(block.sizes)


def test_parquet_with_plain_bytes_keys_and_languages(tmp_path: Path) -> None:
    table = pa.table(
        {
            "jpg": FILES,
            "uid": [f"k{i}" for i in range(12)],
            "sentences": [[{"raw": f"one {i}"}, {"raw": f"two {i}"}] for i in range(12)],
            "lang": ["en", "de"] * 6,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = index(tmp_path / "a.parquet", tmp_path / "d", language="lang")
    assert rows(dataset)["k1"] == (["one 1", "two 1"], ["de", "de"], -1, FILES[1])
    assert dataset.languages == {"de": 12, "en": 12}


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_paths(images: Path, tmp_path: Path, nested: bool) -> None:
    paths = [f"images/{i}.jpg" for i in range(12)]
    column = [{"bytes": None, "path": p} for p in paths] if nested else paths
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if nested else pa.string()
    table = pa.table({"image": pa.array(column, kind), "text": [f"text {i}" for i in range(12)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    found = rows(index(tmp_path / "a.parquet", tmp_path / "d"))
    assert found == {p: ([f"text {i}"], [], -1, FILES[i]) for i, p in enumerate(paths)}


def test_parquet_as_pandas_writes_it(tmp_path: Path) -> None:
    """Categories are dictionaries; a column of numbers with a gap is one of floats."""
    table = pa.table(
        {
            "image": pa.array(FILES).dictionary_encode(),
            "text": pa.array(["a"] * 12).dictionary_encode(),
            "label": [None, float("nan"), *(float(i) for i in range(10))],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    found = list(rows(index(tmp_path / "a.parquet", tmp_path / "d")).values())
    assert sorted(label for _, _, label, _ in found) == [-1, -1, *range(10)]
    assert sorted(data for _, _, _, data in found) == sorted(FILES)
    assert all(captions == ["a"] for captions, _, _, _ in found)


def test_a_row_group_is_read_once_by_one_of_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"image": FILES, "text": [f"{i}" for i in range(12)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    dataset = index(tmp_path / "a.parquet", tmp_path / "d")
    read, times = lit_fast.data.images.parquet._read_column, []
    monkeypatch.setattr(
        lit_fast.data.images.parquet, "_read_column", lambda s, g: times.append(g) or read(s, g)
    )
    reader = ImageReader(dataset)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(reader.read, [*range(12)] * 3))
    assert sorted(got) == sorted(FILES * 3)
    assert sorted(times) == [0, 1, 2]
    reader = ImageReader(dataset, cached_bytes=1)  # the cache is bounded: one at a time
    for row in range(12):
        reader.read(row)
    assert len(reader._parquet._row_groups) == 1


# --- tables


def test_open_clips_table(images: Path, tmp_path: Path) -> None:
    """Separated by tabs; repeats of an image are one row, adjacent or not."""
    lines = [f"images/{i}.jpg\tone {i}\n" for i in range(12)] + [
        f"images/{i}.jpg\ttwo {i}\n" for i in range(11)
    ]
    (tmp_path / "t.csv").write_text("filepath\ttitle\n" + "".join(lines))
    found = rows(index(tmp_path / "t.csv", tmp_path / "d"))
    assert found["images/3.jpg"] == (["one 3", "two 3"], [], -1, FILES[3])
    assert found["images/11.jpg"] == (["one 11"], [], -1, FILES[11])
    assert len(found) == 12


def test_a_repeat_in_a_later_group_is_a_duplicate(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lit_fast.embed.row_reader, "GROUP_ROWS", 3)
    lines = [f"images/{i}.jpg,text {i}\n" for i in [*range(12), 0]]
    (tmp_path / "t.csv").write_text("filepath,title\n" + "".join(lines))
    dataset = index(tmp_path / "t.csv", tmp_path / "d")
    assert dataset.left_out == {"duplicate key": 1}
    assert dataset.rows == 12


def test_quotes_commas_and_line_ends(images: Path, tmp_path: Path) -> None:
    texts = ['a "b", c', "two\nlines", "ü", " spaces "]
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["caption", "image_path", "cls"], *([t, f"{i}.jpg", i] for i, t in enumerate(texts))]
        )
    found = rows(index(tmp_path / "t.csv", tmp_path / "d", images=str(images)))
    assert [found[f"{i}.jpg"][0] for i in range(4)] == [[t.strip()] for t in texts]
    assert [found[f"{i}.jpg"][2] for i in range(4)] == [0, 1, 2, 3]


def test_json_lines_with_captions_in_two_languages(images: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"file_name": f"{i}.jpg", "en": f"text {i}", "de": [f"Text {i}", "Bild"]})
        for i in range(12)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out = tmp_path / "d"
    command = ["index", f"{tmp_path}/t.jsonl", "--images", str(images), "--out", str(out)]
    assert main([*command, "--captions", "en=en,de=de"]) == 0
    dataset = open_dataset(out)
    assert rows(dataset)["4.jpg"] == (["text 4", "Text 4", "Bild"], ["en", "de", "de"], -1, FILES[4])
    assert dataset.languages == {"de": 24, "en": 12}
    assert main([*command, "--captions", "en=en,de=de"]) == 0
    assert main([*command, "--captions", "en=en"]) == 2  # the same sources with other options


def test_table_with_repeated_captions_keeps_each(images: Path, tmp_path: Path) -> None:
    """In one row, in rows of one image and in two languages; CLIP_benchmark counts them, too."""
    lines = [("0.jpg", "Radio", "Radio"), ("0.jpg", "Radio", "Funk"), ("1.jpg", ["a", "a"], "a")]
    text = "\n".join(json.dumps({"file_name": f, "en": en, "de": de}) for f, en, de in lines)
    (tmp_path / "t.jsonl").write_text(text)
    options = {"images": str(images), "captions": (("en", "en"), ("de", "de"))}
    dataset = index(tmp_path / "t.jsonl", tmp_path / "d", **options)
    found = rows(dataset)
    assert found["0.jpg"][:2] == (["Radio", "Radio", "Radio", "Funk"], ["en", "de", "en", "de"])
    assert found["1.jpg"][:2] == (["a", "a", "a"], ["en", "en", "de"])
    assert (dataset.captions, dataset.languages) == (7, {"de": 3, "en": 4})


def test_captions_of_crossmodal_3600(images: Path, tmp_path: Path) -> None:
    """As its captions.jsonl has them: photos without a suffix, an object per language."""
    lines = [
        json.dumps(
            {"image/key": f"{i}", "image/locale": "de"}
            | {
                l: {"caption": [f"{l} {i}", f"{l} {i} too"], "caption/tokenized": ["x"]}
                for l in ("de", "quz")
            }
        )
        for i in range(12)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    names = (("de", "de"), ("quz", "quz"))
    found = rows(index(tmp_path / "captions.jsonl", tmp_path / "d", captions=names, images=str(images)))
    captions = ["de 4", "de 4 too", "quz 4", "quz 4 too"]
    assert found["4.jpg"] == (captions, ["de", "de", "quz", "quz"], -1, FILES[4])


def test_paths_stay_inside(images: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(FILES[0])
    (images / "empty.jpg").write_bytes(b"")
    (images / "folder.jpg").mkdir()
    os.mkfifo(images / "pipe.jpg")
    (images / "link.jpg").symlink_to(images / "1.jpg")
    outside = f"path outside {images}"
    reasons = {
        "../secret.jpg": outside,
        "x/../../secret.jpg": outside,
        "/etc/passwd": f"{outside} (--images / allows it)",
        f"{images}x/1.jpg": f"{outside} (--images / allows it)",
        "..": outside,
        "a\x00b.jpg": "path is not UTF-8 text",
        "99.jpg": f"image file not found in {images}",
        "empty.jpg": "empty image file",
        "folder.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
        "x" * 5000: "no path of an image",
        "": "no path of an image",
    }
    good = ["0.jpg", "./x/../1.jpg", f"{images}/2.jpg", "link.jpg"]
    lines = [json.dumps({"path": path, "caption": f"text {i}"}) for i, path in enumerate([*good, *reasons])]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    dataset = index(tmp_path / "t.jsonl", tmp_path / "d", images=str(images))
    assert sorted(rows(dataset)) == ["0.jpg", "1.jpg", "2.jpg", "link.jpg"]
    assert dataset.left_out == {reason: list(reasons.values()).count(reason) for reason in reasons.values()}


def test_missing_images_later(images: Path, tmp_path: Path) -> None:
    """One file is one invalid row; the whole directory stops the work."""
    (tmp_path / "t.csv").write_text("filepath,title\n" + "".join(f"{i}.jpg,text\n" for i in range(12)))
    dataset = index(tmp_path / "t.csv", tmp_path / "d", images=str(images))
    [block] = dataset.iter_blocks()
    (images / block.keys[0]).unlink()
    (images / block.keys[1]).unlink()
    os.mkfifo(images / block.keys[1])
    (images / block.keys[2]).unlink()
    (images / block.keys[2]).mkdir()
    reader = ImageReader(dataset)
    check_sources(dataset)
    with pytest.raises(ImageError, match="image file not found"):
        reader.read(0)
    for row in (1, 2):
        with pytest.raises(ImageError, match="not a regular file"):
            reader.read(row)
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"images, the images of .* is missing; restore it"):
        reader.read(3)
    with pytest.raises(UserError, match=r"images, the images of .* is missing; restore it"):
        check_sources(dataset)


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (
            "filepath,titel",
            {"captions": (("", "title"),)},
            r"t.csv has no 'title'; choose from titel, filepath",
        ),
        ("filepath,title", {"image": "filpath"}, r"t.csv has no 'filpath'; choose from filepath, title"),
        ("filepath,title", {"label": "x"}, "has no 'x'"),
        ("filepath,title", {"key": "title"}, "--key is not for tables of image files"),
        ("url,caption", {}, "has only URLs .url.; download the images with img2dataset"),
        (
            "file,b",
            {},
            "has no column for captions or labels among file, b; name it with --captions or --label",
        ),
        ("a,b", {}, "has no column for the image among a, b; name it with --image"),
        ("filepath,title", {"images": "/no/such"}, "--images /no/such is not a directory"),
    ],
)
def test_wrong_names_are_one_line(tmp_path: Path, header: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n1.jpg,text\n")
    with pytest.raises(UserError, match=message):
        index(tmp_path / "t.csv", tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


# --- COCO


def test_coco(images: Path, tmp_path: Path) -> None:
    value = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(12)],
        "annotations": [{"id": i, "image_id": i % 11, "caption": f"caption {i}\n"} for i in range(33)],
    }
    (tmp_path / "captions_val.json").write_text(json.dumps(value))
    dataset = index(tmp_path / "captions_val.json", tmp_path / "d", images=str(images))
    found = rows(dataset)
    assert found["4.jpg"] == (["caption 4", "caption 15", "caption 26"], [], -1, FILES[4])
    assert dataset.left_out == {"no caption and no label": 1}
    assert len(found) == 11
    value["annotations"] = {}
    (tmp_path / "captions_val.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="has no column for captions or labels among id, file_name"):
        index(tmp_path / "captions_val.json", tmp_path / "e", images=str(images))


# --- a folder per class


def test_a_folder_per_class(tmp_path: Path) -> None:
    """The number of a class is the rank of its folder's name; a file beside may have the names."""
    root = tmp_path / "val"
    for i, data in enumerate(FILES):
        path = root / f"n{i % 3:02d}" / ("deep" if i == 5 else "") / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "n00" / "notes.txt").write_text("not an image")
    dataset = index(root, tmp_path / "d")
    assert dataset.classnames == ("n00", "n01", "n02")
    assert rows(dataset)["n02/deep/5.JPEG"] == ([], [], 2, FILES[5])
    assert dataset.rows == 12
    (tmp_path / "classnames.txt").write_text("fish\nbird\nfrog\n")
    assert index(root, tmp_path / "e").classnames == ("fish", "bird", "frog")
    with pytest.raises(UserError, match="has no columns that options could name"):
        index(root, tmp_path / "f", label="x")


def test_class_folders_skip_junk_and_count_all_that_is_no_row(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "val"
    files = ["bird/0.jpg", "cat/1.jpg", "cat/deep/2.jpg"]
    junk = [
        "__MACOSX/bird/._0.jpg",
        ".hidden/3.jpg",
        "@eaDir/bird/0.jpg",
        "bird/.ipynb_checkpoints/0-checkpoint.jpg",
        "bird/._0.jpg",
        "bird/Thumbs.db",
        ".DS_Store",
    ]
    others = ["bird/notes.txt", "README.md"]
    for i, name in enumerate([*files, *junk, *others, "top.jpg", "x/a.tif"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[i % 12])
    (root / "empty").mkdir()
    dataset = index(root, tmp_path / "d")
    assert dataset.classnames == ("bird", "cat", "empty", "x")
    assert {key: row[2] for key, row in rows(dataset).items()} == {files[0]: 0, files[1]: 1, files[2]: 1}
    assert dataset.left_out == {
        "hidden file or leftover of another program": len(junk),
        "no image file (.jpg, .jpeg, .png, .webp, .gif or .bmp)": len(others) + 1,
        "image beside the class folders": 1,
    }
    assert dataset.rows + sum(dataset.left_out.values()) == sum(p.is_file() for p in root.rglob("*"))
    assert "has 2 class folders without an image, which are classes: empty, x" in capsys.readouterr().err


def test_class_folders_in_class_folders_are_reported(tmp_path: Path, capsys: Any) -> None:
    for i, name in enumerate(["pets/cat/0.jpg", "pets/dog/1.jpg", "cars/images/2.jpg"]):
        (tmp_path / "s" / name).parent.mkdir(parents=True)
        (tmp_path / "s" / name).write_bytes(FILES[i])
    (tmp_path / "s" / "pets" / "link").symlink_to(tmp_path / "s" / "cars")
    (tmp_path / "s" / "linked").symlink_to(tmp_path / "s" / "cars")  # a class by itself
    for name in ("pets/a.jpg", "pets/b.jpg"):
        (tmp_path / "s" / name).write_bytes(FILES[5])
    dataset = index(tmp_path / "s", tmp_path / "d")
    assert (dataset.rows, dataset.classnames) == (6, ("cars", "linked", "pets"))
    assert dataset.left_out == {"no image file (.jpg, .jpeg, .png, .webp, .gif or .bmp)": 1}
    error = capsys.readouterr().err
    assert "pets (cat, dog) are not classes of their own: their images are of the class pets" in error


def test_junk_in_tables_and_tars_is_no_row(images: Path, tmp_path: Path) -> None:
    for name in ("._1.jpg", ".hidden/2.jpg", "__MACOSX/3.jpg"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(FILES[0])
    lines = ["./images/0.jpg", "images/._1.jpg", "images/.hidden/2.jpg", "images/__MACOSX/3.jpg"]
    (tmp_path / "t.csv").write_text("filepath,title\n" + "".join(f"{line},text\n" for line in lines))
    dataset = index(tmp_path / "t.csv", tmp_path / "d")
    assert (dataset.rows, dataset.left_out) == (1, {"hidden file or leftover of another program": 3})
    members = [("./0.jpg", FILES[0]), ("./._0.jpg", b"x"), ("./0.txt", b"text"), ("__MACOSX/0.txt", b"no")]
    write_tar(tmp_path / "0.tar", [*members, (".DS_Store", b"x"), ("._0.txt", b"x")])
    dataset = index(tmp_path / "0.tar", tmp_path / "e")
    assert (dataset.rows, dataset.left_out) == (1, {"hidden file or leftover of another program": 4})


# --- tars


def test_columns_of_tars(tmp_path: Path) -> None:
    value = {"caption": "web", "synthetic": "made", "lang": "en", "id": 7, "class": 3}
    members = [
        ("a.jpg", FILES[0]),
        ("a.left.jpg", FILES[1]),
        ("a.txt", b"txt"),
        ("a.json", json.dumps(value).encode()),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    options = {
        "captions": (("", "synthetic"), ("fr", "txt")),
        "key": "id",
        "label": "class",
        "language": "lang",
    }
    dataset = index(path, tmp_path / "d", image="left.jpg", **options)
    assert rows(dataset) == {"7": (["made", "txt"], ["en", "fr"], 3, FILES[1])}
    with pytest.raises(UserError, match=r"0.tar has no 'captoin'; choose from caption, "):
        index(path, tmp_path / "e", captions=(("", "captoin"),))


# --- which format


def test_what_a_directory_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", samples(2))
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "a" / "0.parquet")  # img2dataset's log
    assert index(tmp_path / "a", tmp_path / "d").sources[0].path.endswith("0.tar")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "a" / "other.parquet")
    with pytest.raises(
        UserError, match=r"a holds .parquet and .tar files; name those to read, as in .*/a/\*.tar"
    ):
        index(tmp_path / "a", tmp_path / "e")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"b has no files; give .*, or a folder of images per class"):
        index(tmp_path / "b", tmp_path / "e")
    for split in ("train", "val"):
        (tmp_path / "c" / split / "cat").mkdir(parents=True)
        (tmp_path / "c" / split / "cat" / "x.jpg").write_bytes(FILES[0])
    with pytest.raises(UserError, match="holds the splits train, val; name one"):
        index(tmp_path / "c", tmp_path / "e")
    (tmp_path / "odd").write_bytes(tar_bytes(samples(2)))
    assert index(tmp_path / "odd", tmp_path / "f").rows == 2


def test_formats_together_in_one_dataset(images: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(3, first=100))
    pq.write_table(
        pa.table({"image": FILES, "text": [f"text {i}" for i in range(12)]}), tmp_path / "a.parquet"
    )
    (tmp_path / "t.csv").write_text("filepath,title\nimages/1.jpg,text\n")
    sources = [f"{tmp_path}/0.tar", f"{tmp_path}/a.parquet", f"{tmp_path}/t.csv"]
    dataset = index_dataset(sources, tmp_path / "d", seed=0)
    assert dataset.rows == 16
    assert {source.kind for source in dataset.sources} == {"tar", "parquet", "folder"}
    assert set(FILES) <= {row[3] for row in rows(dataset).values()}
