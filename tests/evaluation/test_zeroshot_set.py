"""Class names, templates and labels from files, and files that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from lit_fast.data.dataset import Dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot_set import zero_shot_set

NAMES = ("tench", "goldfish", "shark", "ray", "cock")


def make_dataset(path: Path, labels: list[int], keys: list[str] | None = None, **options: object) -> Dataset:
    """A dataset of labelled rows without sources."""
    writer = DatasetWriter(path)
    for i, label in enumerate(labels):
        writer.add(Row(keys[i] if keys else f"k{i}", 0, 0, 0, (), label))
    return writer.finish(seed=0, sources=[], **{"classnames": NAMES} | options)  # type: ignore[arg-type]


def photos(count: int) -> list[str]:
    """Keys of ImageNet's validation photos, as folders and tars give them."""
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, count + 1)]
    return [f"n0144/{name}.JPEG" if i % 2 else name for i, name in enumerate(names)]


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_zero_shot_set_reads_the_dataset(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", [2, -1, 0, 2], templates=["a {c}"])
    got = zero_shot_set(data)
    assert (got.classnames, got.templates, got.template_set) == (NAMES, ("a {c}",), "dataset")
    assert (got.row_of.tolist(), got.class_of.tolist(), got.multilabel) == ([0, 2, 3], [2, 0, 2], False)


def test_zero_shot_set_of_present_classes(tmp_path: Path) -> None:
    got = zero_shot_set(make_dataset(tmp_path / "d", [4, -1, 1, 4]), present=True)
    assert got.classnames == ("goldfish", "cock")
    assert got.class_of.tolist() == [1, 0, 1]


def test_zero_shot_set_reads_names_and_templates_from_files(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", [0, 4])
    names = write(tmp_path / "names.txt", "\ufeffA\nB\r\n C \nD, d\nE\n\n")
    templates = write(tmp_path / "clip.txt", "a {}.\n{c}")
    got = zero_shot_set(data, classnames=names, templates=templates)
    assert got.classnames == ("A", "B", "C", "D, d", "E")
    assert (got.templates, got.template_set) == (("a {}.", "{c}"), "clip.txt")


def test_zero_shot_set_matches_real_labels_by_photo_number(tmp_path: Path) -> None:
    real = write(tmp_path / "real.json", [[0, 3], [], [2], [1, 1, 4]])
    keys = photos(4)
    order = [3, 0, 2, 1]
    data = make_dataset(tmp_path / "d", [1, 0, 2, 3], [keys[i] for i in order])
    got = zero_shot_set(data, labels=real)
    assert got.multilabel
    # The photo without labels does not count; a class named twice counts once.
    pairs = list(zip(got.row_of.tolist(), got.class_of.tolist(), strict=True))
    assert pairs == [(0, 1), (0, 4), (1, 0), (1, 3), (2, 2)]
    assert zero_shot_set(data, labels=real, present=True).classnames == NAMES


def test_zero_shot_set_with_labels_by_key_needs_no_own_labels(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", [-1, -1, -1])
    got = zero_shot_set(
        data, labels=write(tmp_path / "l.json", {"k0": [2], "k1": [], "k2": [0, 4], "x": [9]})
    )
    assert (got.row_of.tolist(), got.class_of.tolist()) == ([0, 2, 2], [2, 0, 4])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a\nb\nc\nd\n", r"names\.txt has 4 class names, but \S*/d has 5 classes"),
        ("a\nb\n\nc\nd\n", r"names\.txt is empty in line 3"),
        ("", r"names\.txt is empty"),
        ("a\nb\n??\nd\ne", r"names\.txt: class name '\?\?' \(number 2\)"),
        (b"\xff\xfe", r"names\.txt is not UTF-8 text"),
    ],
)
def test_zero_shot_set_with_wrong_class_names_raises_user_error(
    tmp_path: Path, names: str | bytes, message: str
) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(UserError, match=message):
        zero_shot_set(make_dataset(tmp_path / "d", [0]), classnames=file)


@pytest.mark.parametrize(
    ("labels", "keys", "message"),
    [
        ([[0]] * 4, None, r"list in the order of ILSVRC2012_val_\*\.JPEG, but row 'k0'"),
        ([[0]] * 3, photos(4), r"has 3 entries, but \S* has the row 'n0144/ILSVRC2012_val_00000004\.JPEG'"),
        ({"k0": [0]}, None, r"has no entry for row 'k1'"),
        ({f"k{i}": [i + 2] for i in range(4)}, None, r"has label 5 but only 5 class names"),
        ({f"k{i}": [4] for i in range(4)}, None, r"of 4 images with labels in both, only 0 have"),
        ({f"k{i}": i for i in range(4)}, None, r"has 0 for row 'k0', which is not a list of class numbers"),
        ({f"k{i}": [True] for i in range(4)}, None, r"has \[True\] for row 'k0'"),
        ({f"k{i}": [-1] for i in range(4)}, None, r"has \[-1\] for row 'k0'"),
        ({f"k{i}": [1 << 70] for i in range(4)}, None, r"which is not a list of class numbers"),
        (7, None, "is neither a JSON list of lists nor an object"),
        ("[[", None, "is damaged: not JSON"),
    ],
)
def test_zero_shot_set_with_wrong_labels_raises_user_error(
    tmp_path: Path, labels: object, keys: list[str] | None, message: str
) -> None:
    data = make_dataset(tmp_path / "d", [2, 3, 2, 3] if keys is None else [0] * 4, keys)
    with pytest.raises(UserError, match=message) as caught:
        zero_shot_set(data, labels=write(tmp_path / "labels.json", labels))
    assert "\n" not in str(caught.value)


def test_zero_shot_set_with_shuffled_labels_raises_user_error(tmp_path: Path) -> None:
    """ReaL's list read in the order of the classes would fit by its length."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    data = make_dataset(tmp_path / "d", labels.tolist(), photos(200))
    right = [[int(label)] for label in labels]
    zero_shot_set(data, labels=write(tmp_path / "right.json", right))
    with pytest.raises(UserError, match="a file with the same order and classes"):
        zero_shot_set(data, labels=write(tmp_path / "wrong.json", sorted(right)))
