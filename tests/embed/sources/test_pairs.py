"""Directories of images with their texts beside them, and how they are told from class folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.sources.expand import expand
from lit_fast.embed.sources.formats import FORMATS, format_of
from lit_fast.embed.sources.interface import Columns, Item, Note, Sample, Skipped
from lit_fast.errors import UserError
from tests.embed.sources.test_formats import FILES, index, rows


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def items(path: Path, **options: Any) -> list[Item]:
    return list(FORMATS["pairs"].read(str(path), Columns(**options)))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A directory as img2dataset's FilesSampleWriter fills it."""
    for number, data in enumerate(FILES):
        folder = f"{number // 6:05d}"
        key = f"{folder}{number % 6:04d}"
        meta = {"caption": f"caption {key}", "url": "http://host/x", "key": key, "status": "success"}
        files = {
            f"{key}.jpg": data,
            f"{key}.txt": f"caption {key}",
            f"{key}.json": json.dumps(meta, indent=4),
        }
        write(tmp_path / "files" / folder, files)
        write(tmp_path / "files", {f"{folder}.parquet": b"a log", f"{folder}_stats.json": "{}"})
    return tmp_path / "files"


def test_files_of_img2dataset_are_pairs(
    output: Path, tmp_path: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(output), "--out", str(tmp_path / "d")]) == 0
    shown = capsys.readouterr()
    assert (
        "files: guessed image-text pairs (for one class per folder give --captions ''), captions = caption; "
        'first caption: "caption 000000000"'
    ) in shown.err
    assert "left out" not in shown.out
    dataset = open_dataset(tmp_path / "d")
    names = [f"{n // 6:05d}/{n // 6:05d}{n % 6:04d}" for n in range(12)]
    expected = {
        f"{n}.jpg": ([f"caption {n[6:]}"], [], -1, data) for n, data in zip(names, FILES, strict=True)
    }
    assert rows(dataset) == expected
    assert not dataset.classnames
    embed_dataset(dataset.path, str(tiny_vit), batch_size=8, workers=2)
    assert np.isfinite(open_features(dataset).read_all().astype(np.float32)).all()


def test_one_folder_of_img2dataset_is_a_source(output: Path, tmp_path: Path) -> None:
    assert index(output / "00001", tmp_path / "d").rows == 6


def test_captions_declined_gives_classes(output: Path, tmp_path: Path) -> None:
    assert main(["index", str(output), "--out", str(tmp_path / "d"), "--captions", ""]) == 0
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.captions, dataset.labelled, dataset.classnames) == (0, 12, ("00000", "00001"))


@pytest.mark.parametrize(
    ("beside", "format"),
    [
        ({"x.txt": "a dog"}, "pairs"),
        ({"x.json": '{"caption": "a dog"}'}, "pairs"),
        ({"x.cls": "3"}, "pairs"),
        ({"x.json": '{"shapes": []}'}, "folder"),  # of an annotation program
        ({"x.json": "[]"}, "folder"),
        ({"y.txt": "of another image", "README.txt": "a dog"}, "folder"),
        ({".x.txt": "hidden"}, "folder"),
        ({"b/x.txt": "in another directory"}, "folder"),
    ],
)
def test_format_of_a_directory_is_decided_by_texts_beside_images(
    tmp_path: Path, beside: dict[str, str], format: str
) -> None:
    write(tmp_path / "a", {"x.jpg": FILES[0], **beside})
    assert format_of(str(tmp_path)) == format


def test_a_named_column_is_taken_from_the_json(tmp_path: Path) -> None:
    files = {"x.jpg": FILES[0], "x.txt": "plain", "x.json": '{"en": "a dog", "de": "ein Hund", "id": 3}'}
    root = write(tmp_path / "s", files)
    found = rows(index(root, tmp_path / "d", captions=(("en", "en"), ("de", "de")), label="id"))
    assert found == {"x.jpg": (["a dog", "ein Hund"], ["en", "de"], 3, FILES[0])}
    with pytest.raises(UserError, match=r"has no 'fr'; choose from .*en"):
        index(root, tmp_path / "e", captions=(("", "fr"),))
    with pytest.raises(UserError, match=r"--key is not for image files"):
        index(root, tmp_path / "e", key="id")


def test_a_text_is_one_caption_and_several_lines_are_noted(tmp_path: Path) -> None:
    root = write(tmp_path / "s", {"x.jpg": FILES[0], "x.txt": "\ufeffa dog\r\non grass\n"})
    found = items(root)
    assert [item.captions for item in found if isinstance(item, Sample)] == [("a dog\r\non grass",)]
    assert Note(f"{root}: 1 .txt files have several lines; each file is one caption") in found


def test_captions_that_are_numbers_are_doubted(tmp_path: Path) -> None:
    """As the boxes of object detectors."""
    files = {f"{n}.jpg": FILES[n] for n in range(3)} | {f"{n}.txt": f"{n} 0.5 0.25" for n in range(3)}
    note = "all captions are numbers ('0 0.5 0.25'), as of boxes; give --captions '' to ignore them"
    assert Note(f"{write(tmp_path / 's', files)}: {note}") in items(tmp_path / "s")
    write(tmp_path / "s", {"1.txt": "3 dogs"})
    assert not any(isinstance(item, Note) for item in items(tmp_path / "s"))


def test_stems_with_dots_belong_together_up_to_the_last(tmp_path: Path) -> None:
    files = {"a.b.jpg": FILES[0], "a.b.txt": "one", "a.jpg": FILES[1], "a.txt": "two", "a-b.JPEG": FILES[2]}
    found = rows(index(write(tmp_path / "s", files | {"a-b.TXT": "three"}), tmp_path / "d"))
    assert {key: texts for key, (texts, *_) in found.items()} == {
        "a.b.jpg": ["one"],
        "a.jpg": ["two"],
        "a-b.JPEG": ["three"],
    }


def test_other_names_of_texts(tmp_path: Path) -> None:
    """Sidecar files with the whole name of the image, `.caption` of training scripts, fields of fields."""
    files = {
        "a.jpg": FILES[0],
        "a.jpg.txt": "one",
        "b.png": FILES[1],
        "b.jpg.txt": "of another",
        "b.caption": "two",
    }
    nested = {"c.jpg": FILES[2], "c.json": '{"meta": {"caption": "three"}, "size": {"en": "four"}}'}
    root = write(tmp_path / "s", files | nested)
    assert format_of(str(root)) == "pairs"
    found = items(root)
    texts = {item.key: item.captions for item in found if isinstance(item, Sample)}
    assert texts == {"a.jpg": ("one",), "b.png": ("two",), "c.jpg": ("three",)}
    assert [item for item in found if isinstance(item, Skipped)] == [
        Skipped("b.jpg.txt", "text without an image of the same name")
    ]
    named = [item for item in items(root, captions=(("", "size.en"),)) if isinstance(item, Sample)]
    assert [item.captions for item in named] == [("four",)]
    (root / "c.json").unlink()
    (root / "b.caption").unlink()
    assert format_of(str(root)) == "pairs"


def test_every_file_is_used_or_left_out_with_a_reason(tmp_path: Path) -> None:
    root = write(
        tmp_path / "s",
        {
            "good/x.jpg": FILES[0],
            "good/x.txt": "text",
            "good/x.npy": b"ignored",
            "bad/none.jpg": FILES[1],
            "bad/blank.jpg": FILES[1],
            "bad/blank.txt": "  ",
            "bad/broken.jpg": FILES[1],
            "bad/broken.json": "{",
            "bad/latin.jpg": FILES[1],
            "bad/latin.txt": b"\xff",
            "bad/empty.jpg": b"",
            "bad/empty.txt": "text",
            "bad/long.jpg": FILES[1],
            "bad/long.txt": b"a" * (1 << 20) + b"b",
            "bad/two.jpg": FILES[1],
            "bad/two.PNG": FILES[1],
            "bad/two.txt": "text",
            "bad/alone.txt": "text",
            "bad/movie.mp4": b"x",
            "classes/1.jpg": FILES[2],
            "Thumbs.db": b"x",
        },
    )
    os.mkfifo(root / "bad" / "pipe.txt")
    write(root, {"bad/pipe.jpg": FILES[1]})
    (root / "loop").symlink_to(root)
    found = items(root)
    assert [item.key for item in found if isinstance(item, Sample)] == ["good/x.jpg"]
    assert {item.key: item.reason for item in found if isinstance(item, Skipped)} == {
        "Thumbs.db": "hidden file or leftover of another program",
        "bad/alone.txt": "text without an image of the same name",
        "bad/blank.jpg": "no caption and no label",
        "bad/broken.jpg": ".json is not a JSON object",
        "bad/empty.jpg": "empty image file",
        "bad/latin.jpg": "caption is not UTF-8",
        "bad/long.jpg": ".txt above 1 MiB",
        "bad/movie.mp4": "file that is no image, .txt, .caption, .json or .cls",
        "bad/none.jpg": "no caption and no label",
        "bad/pipe.jpg": ".txt is not a regular file",
        "bad/two.PNG": "several images of one name (.jpg and .png); choose with --image",
        "bad/two.jpg": "several images of one name (.jpg and .png); choose with --image",
        "classes/1.jpg": "no caption and no label",
        "loop": "link to a directory, which is not followed",
    }
    assert [item.text for item in found if isinstance(item, Note)] == [
        f"{root}: files with .npy beside the images are not used",
        f"{root}: no image in classes has a text; if these are classes, index them apart with --captions ''",
    ]
    assert [i.key for i in items(root / "bad", image="png") if isinstance(i, Sample)] == ["two.PNG"]


FILE_NAMES = st.builds(
    lambda folder, stem, suffix: f"{folder}{stem}{suffix}",
    st.sampled_from(["", "p/", "p/q/", ".hidden/", "00000/"]),
    st.sampled_from(["a", "a.b", "A", "ü", "._a", "00000_stats"]),
    st.sampled_from(
        [".jpg", ".JPG", ".png", ".txt", ".TXT", ".jpg.txt", ".json", ".cls", ".npy", ".parquet", ""]
    ),
)
CONTENTS = st.sampled_from(
    [b"", b"text", b"7", b"\xff", b'{"caption": "c"}', b'{"captions": [" ", "d"]}', b"[1]"]
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(FILE_NAMES, CONTENTS, max_size=12))
def test_rows_and_left_out_are_all_files(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("pairs")
    # A name without a suffix may be that of a directory.
    write(root, {name: content for name, content in files.items() if not (root / name).is_dir()})
    existing = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
    found = items(root)
    got = {item.key for item in found if isinstance(item, Sample | Skipped)}
    assert len(got) == sum(isinstance(item, Sample | Skipped) for item in found)
    expected = set()
    captions = {}
    for name in existing:
        mates = {n: os.path.splitext(n)[1].lower() for n in existing if _row_name(n) == _row_name(name)}
        images = [n for n, s in mates.items() if s in (".jpg", ".png")]
        texts = {n: s for n, s in mates.items() if s in (".txt", ".json", ".cls")}
        foreign = {n for n in texts if n.endswith(".jpg.txt") and n[:-4] not in images}
        is_junk = any(part.startswith(".") for part in name.split("/"))
        is_log = name in ("00000.parquet", "00000_stats.json") and (root / "00000").is_dir()
        if is_junk or name in images or name in foreign or not (images or is_log):
            expected.add(name)
        own = {s: files[n] for n, s in texts.items() if n not in foreign}
        is_alone = len(images) == 1 and len(own) == len(texts) - len(foreign)
        if name in images and is_alone and not is_junk and files[name]:
            captions[name] = _captions_of(own)
    assert got == expected
    assert {item.key: item.captions for item in found if isinstance(item, Sample)} == {
        name: texts for name, texts in captions.items() if texts is not None
    }


def _row_name(name: str) -> str:
    base = os.path.splitext(name)[0]
    return base[:-4] if name.endswith(".jpg.txt") else base


def _captions_of(texts: dict[str, bytes]) -> tuple[str, ...] | None:
    """The captions of a row with these texts by suffix; None if it is skipped."""
    plain, label = texts.get(".txt", b""), texts.get(".cls", b"")
    if texts.get(".json") == b'{"captions": [" ", "d"]}':
        return ("d",)
    if texts.get(".json") == b'{"caption": "c"}':
        return ("c",)
    if plain == b"\xff":
        return None
    # A label that is no class number does not cost a row with captions.
    return (plain.decode(),) if plain else (() if label == b"7" else None)


# --- the choice of sources in a directory


def test_metadata_of_image_folders_is_found_at_any_depth(tmp_path: Path) -> None:
    table = '{"file_name": "x.jpg", "text": "a dog"}\n'
    deep = write(tmp_path / "deep", {"data/train/x.jpg": FILES[0], "data/train/metadata.jsonl": table})
    assert expand([str(deep)]) == [f"{deep}/data/train/metadata.jsonl"]
    near = write(
        tmp_path / "near", {"train/x.jpg": FILES[0], "train/metadata.jsonl": table, "cats/y.jpg": b"x"}
    )
    assert expand([str(near)]) == [f"{near}/train/metadata.jsonl"]
    write(deep, {"data/test/x.jpg": FILES[0], "data/test/metadata.jsonl": table})
    with pytest.raises(UserError, match="holds the splits test, train; name one of them"):
        expand([str(deep)])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no files; give .tar"),
        (
            {"data.mdb": b"", "lock.mdb": b""},
            "has .mdb files; such a file is an LMDB database, which is not read; convert",
        ),
        ({"a/b/c.npy": b"", ".DS_Store": b""}, "has .npy files; such a file is a NumPy file"),
        (
            {"a.jpg": b"", "b.txt": b""},
            "holds images without texts beside them and without a folder per class",
        ),
        ({"notes": b"", "README.md": b""}, "has only .md, notes; give .tar"),
        ({"train/a.jpg": b"", "val/a.jpg": b""}, "holds the splits train, val; name one of them"),
    ],
)
def test_a_directory_without_a_source_is_one_line(
    tmp_path: Path, files: dict[str, bytes | str], message: str
) -> None:
    (tmp_path / "s").mkdir()
    write(tmp_path / "s", files)
    with pytest.raises(UserError, match=message) as caught:
        expand([str(tmp_path / "s")])
    assert "\n" not in str(caught.value)


def test_images_beside_tars_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "s", {"0.tar": b"", "photos/x.jpg": FILES[0]})
    assert expand([str(root)]) == [f"{root}/0.tar"]
    assert (
        capsys.readouterr().err
        == f"warning: the images in {root}/photos are not read, only 0.tar and files like it\n"
    )


COCO_START = '{"info": {}, "images": [{"file_name": "1.jpg"'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"images/1.jpg": b"", "data.json": '[{"image": "1.jpg"'},
            "holds images in images and data.json; give .*/s/data",
        ),
        (
            {"train2017/1.jpg": b"", "annotations/captions_train2017.json": COCO_START},
            r"and annotations/captions_train2017\.json; give .*/s/annotations/captions_train2017\.json, with --images",
        ),
        (
            {"a/1.jpg": b"", "b/2.jpg": b"", "dataset_coco.json": COCO_START},
            r"holds images in a, b and dataset_coco\.json; give",
        ),
        (
            {"train2017/1.jpg": b"", "val2017/1.jpg": b""},
            "holds the splits train2017, val2017; name one of them",
        ),
        ({"train/cat/1.jpg": b"", "notes.md": b""}, "holds the split train only; give .*/s/train"),
        (
            {"images/x/1.jpg": b"", "labels/x/1.txt": "0 0.5 0.5 0.1 0.1"},
            "holds images in images and texts of the same names in labels; put each text beside its image",
        ),
    ],
)
def test_folders_that_are_no_classes_are_refused(
    tmp_path: Path, files: dict[str, bytes | str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        expand([str(write(tmp_path / "s", files))])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {"cat/1.jpg": b"", "dog/1.jpg": b"", "class_index.json": '{"0": ["cat"]}', "README.txt": "1"},
        {"cat/1.jpg": b"", "config.json": '{"size": 3}'},
        {"train/1.jpg": b"", "train/1.txt": "a dog"},
        {"cat/1.jpg": b"", "dog/2.jpg": b"", "boxes.json": COCO_START},
    ],
)
def test_folders_that_may_be_classes_or_pairs_are_a_source(
    tmp_path: Path, files: dict[str, bytes | str]
) -> None:
    root = write(tmp_path / "s", files)
    assert expand([str(root)]) == [str(root)]
