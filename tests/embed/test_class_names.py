"""Class names of a dataset: of folders, of WordNet ids, from files; and class numbers that do not fit them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, Source, open_dataset
from lit_fast.embed.class_names import ClassOptions, find_class_names
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources import formats
from lit_fast.errors import UserError
from lit_fast.evaluation.imagenet_classes import imagenet_names, imagenet_templates
from tests.helpers import encoded, picture, write_tar

IMAGE = encoded(picture(1))
WNIDS = {"n01440764": "tench", "n02102040": "English Springer Spaniel", "n03888257": "parachute"}


def folders(root: Path, *names: str) -> str:
    """A directory with a folder of one image per class."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.jpg").write_bytes(IMAGE)
    return str(root)


def labels_by_name(dataset: Dataset) -> dict[str, str]:
    """Name of the folder of each image -> name of its class."""
    return {
        key.partition("/")[0]: dataset.classnames[label]
        for block in dataset.iter_blocks()
        for key, label in zip(block.keys, block.labels, strict=True)
    }


def index(source: str, out: Path, classnames: str | None = None, templates: str | None = None) -> Dataset:
    return index_dataset([source], out, classes=ClassOptions(classnames, templates))


def labelled_tar(path: Path, labels: list[int]) -> str:
    members = []
    for i, label in enumerate(labels):
        members += [(f"{i}.jpg", IMAGE), (f"{i}.cls", str(label).encode())]
    return str(write_tar(path, members))


def test_wordnet_ids_of_folders_get_imagenets_names_and_templates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = index(folders(tmp_path / "val", *WNIDS), tmp_path / "d")
    assert labels_by_name(dataset) == WNIDS
    assert dataset.templates == imagenet_templates()
    error = capsys.readouterr().err
    assert "class names: ImageNet's for 3 WordNet ids, and the 80 prompt templates\n" in error
    assert "warning" not in error


def test_wordnet_ids_beyond_imagenet_1k_are_named_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = index(folders(tmp_path / "val", "n00005787", *WNIDS), tmp_path / "d")
    assert dataset.classnames == ("n00005787", *WNIDS.values())
    assert "1 ids are not of ImageNet-1k and have no name: n00005787; name them" in capsys.readouterr().err


def test_names_and_templates_of_wordnet_ids_can_be_declined(tmp_path: Path) -> None:
    source = folders(tmp_path / "val", *WNIDS)
    command = ["index", source, "--out"]
    assert main([*command, f"{tmp_path}/a", "--classnames", ""]) == 0
    assert main([*command, f"{tmp_path}/b", "--templates", ""]) == 0
    a, b = (open_dataset(tmp_path / name) for name in "ab")
    assert (a.classnames, a.templates) == (tuple(WNIDS), ())
    assert (b.classnames, b.templates) == (tuple(WNIDS.values()), ())


def test_parquet_with_wordnet_ids_in_any_order_gets_names(tmp_path: Path) -> None:
    ids = list(WNIDS)[::-1]
    features = {"label": {"_type": "ClassLabel", "names": ids}}
    table = pa.table({"image": [IMAGE] * 3, "label": [0, 1, 2]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    assert index(f"{tmp_path}/a.parquet", tmp_path / "d").classnames == tuple(WNIDS[key] for key in ids)


@pytest.mark.parametrize(
    "lines",
    [
        ["n03888257 chute, parachute", "n01440764 tench, Tinca tinca", "n02102040 springer", "n99999999 x"],
        ["n03888257\tchute, parachute", "n01440764\ttench, Tinca tinca", "n02102040\tspringer"],
        ["tench, Tinca tinca", "springer", "chute, parachute"],
    ],
    ids=["space", "tab", "names"],
)
def test_names_from_a_file_with_and_without_keys(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "names.txt").write_text("\n".join(lines))
    (tmp_path / "templates.txt").write_text("a {c}.\nthe {}.\n")
    files = f"{tmp_path}/names.txt", f"{tmp_path}/templates.txt"
    dataset = index(folders(tmp_path / "val", *WNIDS), tmp_path / "d", *files)
    assert dataset.classnames == ("tench, Tinca tinca", "springer", "chute, parachute")
    assert dataset.templates == ("a {c}.", "the {}.")


@pytest.mark.parametrize("beside", [False, True])
def test_names_that_begin_with_the_name_of_a_folder_are_taken_by_position(
    tmp_path: Path, beside: bool
) -> None:
    source = folders(tmp_path / "val", "green", "red")
    file = tmp_path / "val" / "classnames.txt" if beside else tmp_path / "names.txt"
    file.write_text("green apple\nred apple\n")
    dataset = index(source, tmp_path / "d", None if beside else str(file))
    assert dataset.classnames == ("green apple", "red apple")


def test_names_from_imagenets_map_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text(
        "n02102040 1 English_springer\nn03888257 2 parachute\nn01440764 3 tench\n"
    )
    dataset = index(folders(tmp_path / "val", *WNIDS), tmp_path / "d", f"{tmp_path}/map.txt")
    assert dataset.classnames == ("tench", "English springer", "parachute")
    tar = labelled_tar(tmp_path / "0.tar", [0, 1, 2])
    with pytest.raises(UserError, match="WordNet ids in another order than sorted"):
        index(tar, tmp_path / "e", f"{tmp_path}/map.txt")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("beside", [False, True])
def test_numbered_folders_take_the_lines_of_a_file_by_their_numbers(
    tmp_path: Path, first: int, beside: bool
) -> None:
    numbers = range(first, first + 12)  # as texts 1, 10, 11, 2
    source = folders(tmp_path / "val", *map(str, numbers))
    file = tmp_path / "val" / "classnames.txt" if beside else tmp_path / "names.txt"
    file.write_text("".join(f"name {n}\n" for n in numbers))
    dataset = index(source, tmp_path / "d", None if beside else str(file))
    assert labels_by_name(dataset) == {str(n): f"name {n}" for n in numbers}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["tench", "springer"], r"has 2 names, but \S* has 3 classes \(n01440764, .*give one name per class"),
        (["n01440764 tench", "n02102040 springer"], r"has no name for 1 of the 3 classes of .*\(n03888257\)"),
        (["a", "b", "..."], "neither letters nor digits"),
        ([""], "is empty"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "names.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        index(folders(tmp_path / "val", *WNIDS), tmp_path / "d", f"{tmp_path}/names.txt")
    assert not (tmp_path / "d").exists()


@given(
    st.lists(st.from_regex(r"[a-zA-Z0-9_-]{1,6}", fullmatch=True), min_size=1, max_size=12, unique=True),
    st.randoms(use_true_random=False),
)
def test_names_by_key_never_meet_another_class(keys: list[str], random: Random) -> None:
    lines = [f"{key}\tname of {key}" for key in keys]
    random.shuffle(lines)
    own = formats.OwnClassNames("x", tuple(sorted(keys)), (), ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_fast.embed.class_names.own_class_names", lambda sources: [own])
        patch.setattr("lit_fast.embed.class_names.read_lines", lambda file: tuple(lines))
        classes = find_class_names([Source("x", 0)], ClassOptions("names.txt"), None)
    assert classes.names == tuple(f"name of {key}" for key in sorted(keys))


@pytest.mark.parametrize(
    ("names", "is_warned"),
    [
        (["0", "1", "10"], True),
        (["class_12", "class_3"], True),
        (["d41d8cd98f00b204", "a3f5c1d2e4"], True),
        (["123e4567-e89b-12d3-a456-426614174000", "123e4567-e89b-12d3-a456-426614174001"], True),
        (["n00005787", "n00004475"], True),  # not of ImageNet-1k
        (["cat", "dog", "7"], False),
        (["beaded", "facade", "cafe"], False),
        (["737-200", "A320", "Boeing 707"], False),
    ],
)
def test_class_names_that_look_like_ids_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], is_warned: bool
) -> None:
    dataset = index(folders(tmp_path / "val", *names), tmp_path / "d")
    assert dataset.classnames == tuple(sorted(names))
    assert ("class names look like ids or numbers" in capsys.readouterr().err) == is_warned


def test_labels_from_one_on_are_refused(tmp_path: Path) -> None:
    tar = labelled_tar(tmp_path / "0.tar", [1, 2, 3])
    (tmp_path / "classnames.txt").write_text("cat\ndog\nbird\n")
    with pytest.raises(UserError, match=r"labels run from 1 to 3, but the 3 class names .* subtract 1"):
        index(tar, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    (tmp_path / "four.txt").write_text("none\ncat\ndog\nbird\n")
    assert index(tar, tmp_path / "d", f"{tmp_path}/four.txt").labelled == 3


@pytest.mark.parametrize(
    ("labels", "left_out", "warning"),
    [
        ([0, 1, 2], {}, ""),
        ([0, 1], {}, "1 of 3 class names have no row: bird"),
        ([1, 7], {"label outside the 3 class names": 1}, "2 of 3 class names have no row: cat, bird"),
        ([0, 1, 2, 3], {"label outside the 3 class names": 1}, ""),
    ],
)
def test_class_names_without_a_row_are_warned_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    labels: list[int],
    left_out: dict[str, int],
    warning: str,
) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\nbird\n")
    dataset = index(labelled_tar(tmp_path / "0.tar", labels), tmp_path / "d")
    assert dataset.left_out == left_out
    error = capsys.readouterr().err
    assert warning in error
    assert ("warning" in error) == bool(warning)


def test_labels_without_class_names_are_warned_of_and_named_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = labelled_tar(tmp_path / "0.tar", [0, 1, 2])
    index(tar, tmp_path / "d")
    assert "there are labels but no class names" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("1 dog\n0 cat\n2 bird\n")
    assert index(tar, tmp_path / "e", f"{tmp_path}/names.txt").classnames == ("cat", "dog", "bird")
    assert f"class names: 3 from {tmp_path}/names.txt (0 is cat)" in capsys.readouterr().err


def test_other_names_for_a_dataset_that_exists_are_refused(tmp_path: Path) -> None:
    source = folders(tmp_path / "val", *WNIDS)
    index(source, tmp_path / "d")
    assert index(source, tmp_path / "d").rows == 3
    with pytest.raises(UserError, match="already a dataset, with other class names or templates"):
        index(source, tmp_path / "d", "")
    more = folders(tmp_path / "more", *WNIDS)
    assert index_dataset([more], tmp_path / "d", append=True).classnames == tuple(WNIDS.values())


def test_imagenet_has_1000_names_in_the_order_of_their_ids() -> None:
    names = imagenet_names()
    assert (len(names), list(names)) == (1000, sorted(names))
    assert len(imagenet_templates()) == 80
    assert all(t.count("{c}") == 1 for t in imagenet_templates())


def test_sources_with_different_class_names_are_refused(tmp_path: Path) -> None:
    sources = [folders(tmp_path / "train", "ant", "bee", "cat"), folders(tmp_path / "val", "ant", "cat")]
    with pytest.raises(UserError, match=r"train and \S*val have different class names, .* of its own"):
        index_dataset(sources, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def labelled_parquet(path: Path, **classes: list[str]) -> str:
    """A file with a row per class of each `ClassLabel` column; all have the same number of classes."""
    features = {column: {"_type": "ClassLabel", "names": names} for column, names in classes.items()}
    count = len(next(iter(classes.values())))
    table = pa.table({"image": [IMAGE] * count} | {column: list(range(count)) for column in classes})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("label", ["fine_label", "coarse_label"])
def test_parquet_has_the_names_of_the_label_that_is_given(tmp_path: Path, label: str) -> None:
    names = {"fine_label": ["maple", "oak"], "coarse_label": ["fish", "tree"]}
    file = labelled_parquet(tmp_path / "a.parquet", **names)
    assert main(["index", file, "--label", label, "--out", f"{tmp_path}/d"]) == 0
    assert open_dataset(tmp_path / "d").classnames == tuple(names[label])


def test_parquet_with_one_class_label_guesses_it_whatever_its_name(tmp_path: Path) -> None:
    dataset = index(labelled_parquet(tmp_path / "a.parquet", species=["cat", "dog"]), tmp_path / "d")
    assert (dataset.labelled, dataset.classnames) == (2, ("cat", "dog"))


def test_parquet_files_of_one_directory_with_different_names_are_refused(tmp_path: Path) -> None:
    labelled_parquet(tmp_path / "a.parquet", label=["cat", "dog"])
    labelled_parquet(tmp_path / "b.parquet", label=["rose", "tulip"])
    with pytest.raises(UserError, match=r"a.parquet and \S*b.parquet have different class names"):
        index(f"{tmp_path}/*.parquet", tmp_path / "d")
