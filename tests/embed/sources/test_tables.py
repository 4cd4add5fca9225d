"""Tables of image files: columns, paths and doubts about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_fast.data.dataset import Dataset
from lit_fast.data.images.reader import ImageReader
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.interface import Columns
from lit_fast.errors import UserError
from tests.embed.contents import captions, keys


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """`images/0.jpg` to `images/3.jpg`."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"image %d" % i)
    return tmp_path / "images"


def index(path: Path, text: str, **options: Any) -> Dataset:
    path.write_text(text)
    return index_dataset([str(path)], path.parent / "d", options=Columns(**options))


def found(dataset: Dataset) -> dict[str, list[str]]:
    """Captions by the content of the image."""
    reader = ImageReader(dataset)
    return {reader.read(i).decode(): texts for i, texts in enumerate(captions(dataset))}


def test_index_flickr8ks_captions_without_header_gives_each_image_its_captions(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"{i // 2}.jpg#{i % 2}\tA dog , number {i} .\n" for i in range(4))
    dataset = index(tmp_path / "Flickr8k.token.txt", text)
    assert found(dataset) == {
        "image 0": ["A dog , number 0 .", "A dog , number 1 ."],
        "image 1": ["A dog , number 2 .", "A dog , number 3 ."],
    }
    assert (
        "Flickr8k.token.txt: guessed header = none, image = 1, captions = 2, images = images/; first caption:"
        in capsys.readouterr().err
    )


def test_index_directory_with_captions_txt_reads_it(images: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text('image,caption\n0.jpg,a\n0.jpg,"b, c"\n')
    assert found(index_dataset([str(tmp_path)], tmp_path / "d")) == {"image 0": ["a", "b, c"]}


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_index_absolute_paths_below_the_table_are_found(images: Path, tmp_path: Path, form: str) -> None:
    text = f"filepath,title\n{form.format(images / '0.jpg')},a\n"
    dataset = index(tmp_path / "t.csv", text)
    assert keys(dataset) == ["images/0.jpg"]
    assert found(dataset) == {"image 0": ["a"]}


def test_index_absolute_paths_elsewhere_name_the_remedy(images: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    text = f"filepath,title\n{images / '0.jpg'},a\n"
    with pytest.raises(UserError, match=r"path outside .*tables \(--images / allows it\)"):
        index(tmp_path / "tables" / "t.csv", text)
    assert found(index(tmp_path / "tables" / "t.csv", text, images="/")) == {"image 0": ["a"]}


def test_index_windows_paths_are_found_or_refused_with_a_remedy(images: Path, tmp_path: Path) -> None:
    dataset = index(tmp_path / "t.csv", "filepath,title\nimages\\0.jpg,a\nC:\\x\\1.jpg,b\n")
    assert keys(dataset) == ["images/0.jpg"]
    assert dataset.left_out == {"path on a Windows drive; make it relative to --images": 1}


def test_index_table_whose_images_are_elsewhere_names_the_remedy(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 image file not found in .*; give the directory .* with --images"):
        index(tmp_path / "t.csv", "filepath,title\nelsewhere/0.jpg,a\n")


def test_index_image_with_two_labels_keeps_the_first_and_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = index(tmp_path / "t.csv", "filepath,label\nimages/0.jpg,4\nimages/0.jpg,2\nimages/1.jpg,3\n")
    assert (dataset.rows, dataset.labelled) == (2, 2)
    assert "1 rows were taken without one value: another label of the same image" in capsys.readouterr().err


def test_index_table_of_urls_alone_names_the_remedy(images: Path, tmp_path: Path) -> None:
    text = "a station\thttp://x.com/1.jpg\nsierra\thttp://x.com/2.jpg\n"  # Conceptual Captions has no header
    with pytest.raises(UserError, match=r"2 a URL and no file; download the images with img2dataset"):
        index(tmp_path / "t.tsv", text)


def test_index_table_in_latin1_alone_names_the_remedy(images: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("filepath;title\nimages/0.jpg;Größe\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"1 caption is not UTF-8 .* convert it with: iconv -f WINDOWS-1252"):
        index_dataset([str(tmp_path / "t.csv")], tmp_path / "d")


@pytest.mark.parametrize("form", [json.dumps, repr])
def test_index_lists_in_one_cell_are_captions(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Any
) -> None:
    lists = [["a", "b's"], ['c "d"']]
    text = "filepath\tcaption\n" + "".join(f"images/{i}.jpg\t{form(v)}\n" for i, v in enumerate(lists))
    assert found(index(tmp_path / "t.tsv", text)) == {"image 0": lists[0], "image 1": lists[1]}
    assert "captions are a list in one cell" in capsys.readouterr().err


def test_index_captions_in_brackets_stay_text(images: Path, tmp_path: Path) -> None:
    text = 'filepath\tcaption\nimages/0.jpg\t["a", "b"]\nimages/1.jpg\t[a dog]\n'
    assert found(index(tmp_path / "t.tsv", text)) == {"image 0": ['["a", "b"]'], "image 1": ["[a dog]"]}


@pytest.mark.parametrize("labels", [["dog", "cat"], ["-1", "-1"]])
def test_index_guessed_label_that_is_no_class_number_is_not_used(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[str]
) -> None:
    text = f"filepath,title,label\nimages/0.jpg,a,{labels[0]}\nimages/1.jpg,b,{labels[1]}\n"
    dataset = index(tmp_path / "t.csv", text)
    assert (dataset.rows, dataset.labelled, dataset.left_out) == (2, 0, {})
    assert f"label = none (label has '{labels[0]}')" in capsys.readouterr().err


def test_index_named_label_that_is_no_class_number_costs_the_label_and_is_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "filepath,title,kind\nimages/0.jpg,a,3\nimages/1.jpg,b,dog\n"
    dataset = index(tmp_path / "t.csv", text, label="kind")
    assert (dataset.rows, dataset.labelled) == (2, 1)
    assert "1 rows were taken without one value: label is not a number" in capsys.readouterr().err


def test_index_words_as_labels_without_captions_name_the_remedy(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"label kind has 'dog', where .* names in classnames.txt beside"):
        index(tmp_path / "t.csv", "filepath,kind\nimages/0.jpg,dog\n", label="kind")


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "2.5"], "numbers"),
        (["http://a/b", "s3://x"], "URLs"),
        (["a/b.jpg", "c.png"], "paths"),
        (["['a' 'b']", "[x]"], "lists that cannot be read"),
    ],
)
def test_index_captions_that_look_like_something_else_are_questioned(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[str], kind: str
) -> None:
    index(tmp_path / "t.csv", f"filepath,title\nimages/0.jpg,{texts[0]}\nimages/1.jpg,{texts[1]}\n")
    assert f"the captions in title look like {kind}" in capsys.readouterr().err


def test_index_plain_captions_are_not_questioned(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(tmp_path / "t.csv", "filepath,title\nimages/0.jpg,2 dogs\nimages/1.jpg,7\n")
    assert "look like" not in capsys.readouterr().err


def test_index_one_column_or_two_of_one_name_is_one_line(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has one column, 'filepath title'; separate the image"):
        index(tmp_path / "t.csv", "filepath title\nimages/0.jpg a\n")
    with pytest.raises(UserError, match="has 2 columns title; rename all but one"):
        index(tmp_path / "t.csv", "filepath,title,title\nimages/0.jpg,a,b\n")


def test_index_json_lines_dotted_names_are_columns(images: Path, tmp_path: Path) -> None:
    rows = [
        {
            "file": {"name": f"images/{i}.jpg"},
            "s": [{"raw": f"a{i}", "lang": "en"}, {"raw": f"b{i}", "lang": "de"}],
        }
        for i in range(2)
    ]
    text = "\n".join(map(json.dumps, rows))
    options = {"image": "file.name", "captions": (("", "s.raw"),), "language": "s.lang"}
    dataset = index(tmp_path / "t.jsonl", text, **options)
    assert found(dataset) == {"image 0": ["a0", "b0"], "image 1": ["a1", "b1"]}
    assert dataset.languages == {"de": 2, "en": 2}


def test_index_table_with_bad_lines_before_the_first_row_is_read_to_its_end(
    images: Path, tmp_path: Path
) -> None:
    dataset = index(tmp_path / "t.csv", "filepath,title\n" + "bad\n" * 300 + "images/0.jpg,a\n")
    assert dataset.left_out == {"1 field, where the first line has 2": 300}
    assert found(dataset) == {"image 0": ["a"]}


def test_index_unquoted_commas_of_two_columns_are_text(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the file of Flickr8k's test captions that CLIP_benchmark reads."""
    lines = [
        "image,caption",
        "0.jpg,a dog , a cat and a cow",
        "1.jpg,one",
        '2.jpg,"two, three"',
        "3.jpg,a,,b,",
    ]
    dataset = index(images / "t.txt", "\n".join(lines) + "\n")
    assert dict(zip(keys(dataset), captions(dataset), strict=True)) == {
        "0.jpg": ["a dog , a cat and a cow"], "1.jpg": ["one"], "2.jpg": ["two, three"], "3.jpg": ["a,,b,"]
    }  # fmt: skip
    assert "a ',' in a caption = text" in capsys.readouterr().err
