"""JSON files: COCO, Karpathy's splits, lists of objects, and the option --split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.embed.sources.formats import FORMATS
from lit_fast.embed.sources.interface import Columns, Guess, Item, Layout, Sample, Skipped
from lit_fast.errors import UserError
from tests.embed.sources.test_formats import FILES, images, index, rows  # noqa: F401
from tests.embed.sources.test_tfrecords import write_tfrecord
from tests.embed.sources.tf_example import example

SPLITS = ["train", "restval", "train", "val", "test", "train"]


def karpathy(folder: str = "") -> dict[str, Any]:
    """The format of dataset_coco.json (with a folder) and dataset_flickr8k.json."""
    files = []
    for number, split in enumerate(SPLITS):
        raws = [f"caption {number}.", f"another {number} "]
        sentences = [
            {"tokens": raw.split(), "raw": raw, "imgid": number, "sentid": 2 * number + i}
            for i, raw in enumerate(raws)
        ]
        where = {"filepath": folder, "cocoid": 900 + number} if folder else {}
        files.append(
            {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences, **where}
        )
    return {"images": files, "dataset": "coco" if folder else "flickr8k"}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def items(path: Path, **options: Any) -> list[Item]:
    return list(FORMATS["json"].read(str(path), Columns(**options)))


def test_karpathy_reads_the_chosen_splits(images: Path, tmp_path: Path) -> None:  # noqa: F811
    for name, folder, root in (("dataset_coco", "images", tmp_path), ("dataset_flickr8k", "", images)):
        path = write(tmp_path / f"{name}.json", karpathy(folder))
        prefix = f"{folder}/" if folder else ""
        out = tmp_path / name
        assert (
            main(["index", str(path), "--images", str(root), "--split", "train+restval", "--out", str(out)])
            == 0
        )
        dataset = open_dataset(out)
        assert rows(dataset) == {
            f"{prefix}{n}.jpg": ([f"caption {n}.", f"another {n}"], [], -1, FILES[n]) for n in (0, 1, 2, 5)
        }
        assert dataset.left_out == {"of the split val": 1, "of the split test": 1}
        assert not (out / "left_out.jsonl").exists()


def test_karpathy_without_a_split_is_refused_with_the_counts(images: Path) -> None:  # noqa: F811
    path = write(images / "k.json", karpathy())
    with pytest.raises(
        UserError,
        match=r"k\.json mixes the splits train \(3\), restval \(1\), val \(1\), test \(1\); choose with --split, "
        r"as in --split train\+restval",
    ):
        items(path)
    with pytest.raises(UserError, match=r"has no split 'dev'; choose from train \(3\)"):
        items(path, split="train+dev")
    one = karpathy()
    one["images"] = [image for image in one["images"] if image["split"] == "train"]
    assert sum(isinstance(item, Sample) for item in items(write(images / "one.json", one))) == 3


@pytest.mark.parametrize(
    "value",
    [
        [{"id": 7, "image": f"{n}.jpg", "caption": f"text {n}"} for n in range(3)],
        {
            "data": [
                {"image_path": f"{n}.jpg", "caption_str": f"text {n}", "set_name": "train"} for n in range(3)
            ]
        },
        {"info": {}, "annotations": [{"file_name": f"{n}.jpg", "caption": f"text {n}"} for n in range(3)]},
    ],
)
def test_lists_of_objects_are_tables(images: Path, tmp_path: Path, value: Any) -> None:  # noqa: F811
    path = write(images / "list.json", value)
    assert rows(index(path, tmp_path / "d")) == {
        f"{n}.jpg": ([f"text {n}"], [], -1, FILES[n]) for n in range(3)
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1, "b": [2]}, "holds an object of a, b; give COCO's"),
        ([1, 2], "holds no list of objects; give COCO's"),
        ("7", "holds no list of objects"),
        ([], "holds no list of objects"),
        ({"images": [{"id": 1}], "categories": [{"id": 2}]}, "holds an object of images, categories"),
        (
            [{"image": "0.jpg", "conversations": [{"from": "human", "value": "?"}]}],
            "has no column for captions or labels among image, conversations, conversations.from, ",
        ),
        (
            {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "bbox": [1]}]},
            "annotations has no 'caption'; choose from .*bbox",
        ),
    ],
)
def test_other_json_is_one_line(images: Path, value: Any, message: str) -> None:  # noqa: F811
    with pytest.raises(UserError, match=message) as caught:
        items(write(images / "x.json", value))
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, 2, "0", "a", None, True]), max_size=6),
    annotated=st.lists(st.sampled_from([0, 1, 2, "0", "a", None, 99]), max_size=6),
)
def test_coco_counts_every_image_and_annotation(
    tmp_path_factory: pytest.TempPathFactory, ids: list[Any], annotated: list[Any]
) -> None:
    root = tmp_path_factory.getbasetemp()
    (root / "x.jpg").write_bytes(b"x")
    annotated = [99, *annotated]
    annotations: list[Any] = [{"image_id": i, "caption": f"text {n}"} for n, i in enumerate(annotated)]
    value = {"images": [{"id": i, "file_name": "x.jpg"} for i in ids], "annotations": [*annotations, "odd"]}
    if not ids:
        return
    found = items(write(root / "coco.json", value))
    known = [i for i in ids if i is not None and i is not True]
    lost = sum(i is None or i not in known for i in annotated) + 1
    skipped = [item.reason for item in found if isinstance(item, Skipped)]
    assert skipped.count("annotation of no image in the file") == lost
    assert skipped.count("image without an id") == len(ids) - len(known)
    assert sum(isinstance(item, Sample) for item in found) + len(skipped) - lost == len(ids)
    texts = sorted(text for item in found if isinstance(item, Sample) for text in item.captions)
    once = [n for n, i in enumerate(annotated) if i is not None and known.count(i) == 1]
    assert texts == sorted(f"text {n}" for n in once)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "filename": st.sampled_from(["x.jpg", "gone.jpg", "../x.jpg", 7, None]),
                "split": st.sampled_from(["train", "val", None, 3]),
                "sentences": st.sampled_from([[{"raw": "a"}], [], None, [{"raw": " "}], ["plain"]]),
            }
        )
        | st.sampled_from([None, 3]),
        max_size=6,
    )
)
def test_karpathy_counts_every_image(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]) -> None:
    root = tmp_path_factory.getbasetemp()
    (root / "x.jpg").write_bytes(b"x")
    first = {"filename": "x.jpg", "split": "train", "sentences": [{"raw": "first"}]}
    found = items(write(root / "k.json", {"images": [first, *entries]}), split="train")
    others = [item for item in found if not isinstance(item, Layout | Guess)]
    assert len(others) == 1 + len(entries)
    good = [
        e
        for e in entries
        if isinstance(e, dict)
        and e["split"] == "train"
        and e["filename"] == "x.jpg"
        and e["sentences"] in ([{"raw": "a"}], ["plain"])
    ]
    assert sum(isinstance(item, Sample) for item in others) == 1 + len(good)


# --- --split of other formats


def test_split_selects_by_a_column(images: Path, tmp_path: Path) -> None:  # noqa: F811
    header = "filepath,title,split\n"
    lines = "".join(f"{n}.jpg,text {n},{split}\n" for n, split in enumerate(SPLITS))
    write(images / "t.csv", header + lines + "gone.jpg,text,test\n")
    names = [f"{n}.jpg" for n in range(6)]
    table = pa.table({"image": names, "text": ["text"] * 6, "split": SPLITS})
    pq.write_table(table, images / "t.parquet")
    records = [
        example({"image": [FILES[n]], "text": [b"a"], "split": [split.encode()], "key": [names[n].encode()]})
        for n, split in enumerate(SPLITS)
    ]
    write_tfrecord(images / "t.tfrecord", records)
    for name in ("t.csv", "t.parquet", "t.tfrecord"):
        dataset = index(images / name, tmp_path / name, split="train+val")
        assert sorted(rows(dataset)) == ["0.jpg", "2.jpg", "3.jpg", "5.jpg"]
        assert dataset.left_out == {"of the split restval": 1, "of the split test": 1 + (name == "t.csv")}
    with pytest.raises(UserError, match=r"no usable row .*; left out 7: 3 of the split train;"):
        index(images / "t.csv", tmp_path / "e", split="tran")


def test_all_splits_are_a_guess_that_is_printed(
    images: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = write(images / "t.csv", "filepath,title,split\n0.jpg,one,train\n1.jpg,two,test\n")
    assert main(["index", str(table), "--out", str(tmp_path / "d")]) == 0
    assert "captions = title, split = all (--split chooses); first" in capsys.readouterr().err
    assert main(["index", str(table), "--out", str(tmp_path / "e"), "--split", "test"]) == 0
    shown = capsys.readouterr()
    assert "split = all" not in shown.err
    assert "left out 1: 1 of the split train\n" in shown.out


def test_split_of_a_source_without_splits_is_one_line(images: Path, tmp_path: Path) -> None:  # noqa: F811
    write(images / "t.csv", "filepath,title\n0.jpg,text\n")
    with pytest.raises(UserError, match=r"t\.csv has no 'split'; choose from"):
        index(images / "t.csv", tmp_path / "d", split="train")
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "x.jpg").write_bytes(FILES[0])
    with pytest.raises(UserError, match="has no splits; leave --split out"):
        index(tmp_path / "classes", tmp_path / "d", split="train")
