"""Guessed columns: printed, named, declined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.interface import Columns
from tests.embed.contents import captions

HEADER = "filepath,title,caption,label"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table with two columns that may be captions; an image that it names."""
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "t.csv").write_text(f"{HEADER}\nx.jpg,a dog,A dog.,3\n")
    return tmp_path / "t.csv"


def guesses(output: Any) -> list[str]:
    return [line for line in output.readouterr().err.splitlines() if "guessed" in line]


def test_index_guessed_columns_are_printed_with_first_caption(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index_dataset([str(table)], tmp_path / "d")
    assert guesses(capsys) == [
        "t.csv: guessed image = filepath, captions = caption (also: title), label = label; "
        'first caption: "A dog."'
    ]


def test_index_named_columns_are_no_guesses(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = Columns((("", "title"),), image="filepath", label="label")
    dataset = index_dataset([str(table)], tmp_path / "d", options=named)
    assert captions(dataset) == [["a dog"]]
    assert guesses(capsys) == []


def test_index_many_files_with_equal_columns_print_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        column = "text" if i < 2 else "title"
        pq.write_table(pa.table({"image": [b"x"], column: [f"text {i}"]}), tmp_path / f"{i}.parquet")
    index_dataset([f"{tmp_path}/*.parquet"], tmp_path / "d")
    lines = guesses(capsys)
    assert len(lines) == 2
    assert any("guessed image = image, captions = text; " in line for line in lines)
    assert 'guessed image = image, captions = title; first caption: "text 2"' in "".join(lines)


@pytest.mark.parametrize(
    ("option", "found"),
    [("--label", (["A dog."], -1)), ("--captions", ([], 3)), ("--key", (["A dog."], 3))],
)
def test_index_empty_option_declines_the_guess(
    table: Path, tmp_path: Path, option: str, found: tuple[list[str], int]
) -> None:
    out = str(tmp_path / "d")
    assert main(["index", str(table), "--out", out, option, ""]) == 0
    dataset = open_dataset(out)
    [block] = dataset.iter_blocks()
    assert (captions(dataset)[0], block.labels[0]) == found
    assert dataset.sources[0].names == (f"{option[2:]}=",)
    assert main(["index", str(table), "--out", out]) == 2  # other options


def test_index_column_with_another_role_is_not_guessed_as_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / f"images/val_{number}.JPEG").write_bytes(b"x%d" % number)
    file = tmp_path / "val_annotations.txt"  # Tiny ImageNet's
    file.write_text("val_0.JPEG\tn03444034\t0\t32\nval_1.JPEG\tn04067472\t52\t55\n")
    assert main(["index", str(file), "--label", "2", "--out", f"{tmp_path}/d"]) == 2
    assert "label 2 has 'n03444034', where a class number from 0 on is needed" in capsys.readouterr().err
    assert main(["index", str(file), "--out", f"{tmp_path}/d"]) == 0
    assert "the captions in 2 look like WordNet ids ('n03444034'); see --captions" in capsys.readouterr().err


def test_index_headerless_numbers_are_not_guessed_as_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    file = tmp_path / "t.csv"
    file.write_text("a.jpg,3\n")
    assert main(["index", str(file), "--out", f"{tmp_path}/d"]) == 2
    assert "has no column for captions or labels among 1, 2; name it" in capsys.readouterr().err
    assert main(["index", str(file), "--label", "2", "--out", f"{tmp_path}/d"]) == 0
    assert open_dataset(tmp_path / "d").labelled == 1


def test_index_empty_image_option_is_refused(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(table), "--out", str(tmp_path / "d"), "--image", ""]) == 2
    assert "every row needs an image; name its column" in capsys.readouterr().err
