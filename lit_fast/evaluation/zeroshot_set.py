"""The classes, prompt templates and right answers of a zero-shot classification.

They come from the dataset, or from files:

    class names   text, one per line, as many as the dataset has
    templates     text, one per line, "{c}" or "{}" for the class name
    labels        JSON, several classes per image: an object from keys to lists of class numbers, or ReaL's list of
                  lists, whose i-th belongs to the image ILSVRC2012_val_0000000i, counted from 1
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates
from lit_fast.storage.paths import StrPath, name, stem
from lit_fast.storage.text_files import read_json, read_lines

BARE_NAMES = "class_name_only"  # big_vision's word for no template at all
OWN_TEMPLATES = ("dataset", BARE_NAMES)
_MIN_AGREEMENT = 0.5  # of the file's labels with the dataset's; 0.9 for ReaL and ImageNet, 0.001 if shuffled


@dataclass(frozen=True)
class ZeroShotSet:
    """The classes and right answers of a dataset, checked.

    Attributes:
      classnames: as written.
      templates: as written; the bare name where there are none.
      template_set: origin of the templates: "dataset", a file's name or `BARE_NAMES`.
      row_of: int64 [p], non-decreasing; with `class_of` the pairs of a row and a right class.
      class_of: int64 [p].
      multilabel: whether a row may have several right classes.
      overrides: settings that differ from the dataset's own, by their key in a result: the stem of the file of
        "class_names" or "labels", and "candidates" if not all classes are.
    """

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    template_set: str
    row_of: np.ndarray
    class_of: np.ndarray
    multilabel: bool
    overrides: dict[str, str]


def zero_shot_set(
    dataset: Dataset,
    *,
    classnames: StrPath | None = None,
    templates: StrPath | None = None,
    labels: StrPath | None = None,
    present: bool = False,
) -> ZeroShotSet:
    """Read the zero-shot classification of a dataset from its index, and from files in place of its own.

    Args:
      dataset: with labels, unless they are given.
      classnames: text file in place of the dataset's class names.
      templates: text file in place of the dataset's templates.
      labels: JSON file in place of the dataset's labels.
      present: only classes of some row are candidates: ImageNet-A and -R, labelled with the classes of ImageNet, are
        classified among their 200.

    Raises:
      UserError: a part is missing, or does not fit the rest.
    """
    names = read_lines(classnames) if classnames else dataset.classnames
    missing = [n for n, have in (("labels", labels or dataset.labelled), ("class names", names)) if not have]
    if missing == ["class names"]:
        raise UserError(
            f"dataset {dataset.path} has no class names for zero-shot classification; give --classnames FILE, one name "
            "per line"
        )
    if missing:
        raise UserError(
            f"dataset {dataset.path} has no {' and no '.join(missing)} for zero-shot classification; index tars with a "
            "class number per image (key.cls) and a classnames.txt beside them"
        )
    if classnames and dataset.classnames and len(names) != len(dataset.classnames):
        raise UserError(
            f"{classnames} has {len(names)} class names, but {dataset.path} has {len(dataset.classnames)} classes; "
            "give one name per class, in the same order"
        )
    prompts = (read_lines(templates) if templates else dataset.templates) or ("{c}",)
    for file, check, texts in (
        (classnames, canonical_names, names),
        (templates, canonical_templates, prompts),
    ):
        try:
            check(texts)
        except UserError as error:
            origin = file or f"classnames.txt or templates of dataset {dataset.path}"
            raise UserError(f"{origin}: {error}{'' if file else ', then index it again'}") from None
    row_of, class_of = _labels(dataset, labels)
    if len(class_of) and class_of.max() >= len(names):
        raise UserError(
            f"{labels or f'dataset {dataset.path}'} has label {class_of.max()} but only {len(names)} class names "
            "(numbered from 0); add the missing names"
        )
    if present:
        classes, class_of = np.unique(class_of, return_inverse=True)
        names = tuple(names[label] for label in classes)
    template_set = name(templates) if templates else "dataset" if dataset.templates else BARE_NAMES
    overrides = {key: stem(file) for key, file in (("class_names", classnames), ("labels", labels)) if file}
    overrides |= {"candidates": "present"} if present else {}
    return ZeroShotSet(
        tuple(names), tuple(prompts), template_set, row_of, class_of, labels is not None, overrides
    )


def _labels(dataset: Dataset, file: StrPath | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of a row and a right class, sorted by row."""
    keys: list[str] = []
    own: list[int] = []
    for block in dataset.iter_blocks():
        keys += block.keys
        own += block.labels
    labels = np.array(own, np.int64)
    if file is None:
        rows = np.flatnonzero(labels >= 0)
        return rows, labels[rows]
    lists = _read_lists(dataset, file, keys)
    row_of = np.repeat(np.arange(len(lists)), [len(classes) for classes in lists])
    class_of = np.array([label for classes in lists for label in classes], np.int64)
    _check_agreement(dataset, file, labels, lists)
    return row_of, class_of


def _read_lists(dataset: Dataset, file: StrPath, keys: list[str]) -> list[list[int]]:
    """Return the distinct classes of each row; [] for a row that does not count."""
    value = read_json(file)
    if not isinstance(value, dict | list):
        raise UserError(
            f"{file} is neither a JSON list of lists nor an object from keys to lists; give one of them"
        )
    if isinstance(value, dict) and len(set(keys)) < len(keys):
        key = next(key for key, count in Counter(keys).items() if count > 1)
        raise UserError(
            f"{file} names rows by their keys, but {dataset.path} has {key!r} in several sources; index and evaluate "
            "each source as a dataset of its own"
        )
    lists = []
    for key in keys:
        if isinstance(value, list):
            labels = _imagenet_entry(dataset, file, value, key)
        elif key in value:
            labels = value[key]
        else:
            raise UserError(
                f"{file} has no entry for row {key!r} of {dataset.path}; add one ([] leaves the row out)"
            )
        if not (isinstance(labels, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in labels)):
            raise UserError(
                f"{file} has {str(labels)[:80]} for row {key!r}, which is not a list of class numbers; give one"
            )
        lists.append(list(dict.fromkeys(labels)))
    return lists


def _imagenet_entry(dataset: Dataset, file: StrPath, entries: list[Any], key: str) -> Any:
    match = re.search(r"ILSVRC2012_val_(\d{8})(?!\d)", key)
    if not match:
        raise UserError(
            f"{file} is a list in the order of ILSVRC2012_val_*.JPEG, but row {key!r} of {dataset.path} has another "
            "name; index the photos under their own names, or give an object from keys to lists"
        )
    number = int(match[1])
    if not 1 <= number <= len(entries):
        raise UserError(
            f"{file} has {len(entries)} entries, but {dataset.path} has the row {key!r}; give a complete file"
        )
    return entries[number - 1]


def _check_agreement(dataset: Dataset, file: StrPath, labels: np.ndarray, lists: list[list[int]]) -> None:
    """Refuse labels in another order, or of other classes, than the dataset's own."""
    agrees = [
        label in classes
        for label, classes in zip(labels.tolist(), lists, strict=True)
        if label >= 0 and classes
    ]
    if agrees and sum(agrees) < _MIN_AGREEMENT * len(agrees):
        raise UserError(
            f"{file} does not fit {dataset.path}: of {len(agrees)} images with labels in both, only {sum(agrees)} have "
            "their own label in the file; give a file with the same order and classes"
        )
