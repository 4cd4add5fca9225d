"""What a zero-shot classification asks of each row: class names, prompt templates and right classes.

They come from the dataset, or from files:

    class names   text, one per line, as many as the dataset has
    templates     text, one per line, "{c}" or "{}" for the class name
    labels        JSON, several classes per image: an object from keys to lists of class numbers, or ReaL's
                  list of lists, whose i-th belongs to the image ILSVRC2012_val_0000000i, counted from 1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates
from lit_fast.storage.files import read_json, read_lines

BARE_NAMES = "class_name_only"  # big_vision's word for no template at all
OWN_TEMPLATES = ("dataset", BARE_NAMES)
_AGREEMENT = 0.5  # of ReaL's labels and ImageNet's own it is 0.9, of shuffled ones 0.001


@dataclass(frozen=True)
class ZeroShotSet:
    """Classes and answers of a dataset, checked.

    Attributes:
      classnames: as they were written.
      templates: as they were written; the bare name where there are none.
      template_set: where the templates come from: "dataset", a file's name or `BARE_NAMES`.
      row_of: int64 [p], rising; with `class_of` the pairs of a row and a right class.
      class_of: int64 [p].
      several: whether a row may have several right classes.
      given: what is not the dataset's own, by its key in a result: "class_names" and "labels" from a file, by
        its name without suffix, and "candidates" if not all classes are.
    """

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    template_set: str
    row_of: np.ndarray
    class_of: np.ndarray
    several: bool = False
    given: dict[str, str] = field(default_factory=dict)


def zero_shot_set(
    dataset: Dataset,
    *,
    classnames: Path | None = None,
    templates: Path | None = None,
    labels: Path | None = None,
    present: bool = False,
) -> ZeroShotSet:
    """The zero-shot classification of a dataset; reads its index, and the files given in place of what it has.

    With `present`, only the classes that are right for some row are candidates: ImageNet-A and -R, when
    labelled with the classes of ImageNet, are classified among their 200.

    Raises:
      UserError: something is missing, or does not fit the rest.
    """
    names = read_lines(classnames) if classnames else dataset.classnames
    lacking = [n for n, have in (("labels", labels or dataset.labelled), ("class names", names)) if not have]
    if lacking:
        raise UserError(
            f"dataset {dataset.path} has no {' and no '.join(lacking)} for zero-shot classification; index tars "
            f"with a class number per image (key.cls) and a classnames.txt beside them"
        )
    if classnames and dataset.classnames and len(names) != len(dataset.classnames):
        raise UserError(
            f"{classnames} has {len(names)} class names, but {dataset.path} has {len(dataset.classnames)} classes; "
            f"give a name for each, in their order"
        )
    prompts = (read_lines(templates) if templates else dataset.templates) or ("{c}",)
    _check_texts(dataset, classnames, canonical_names, names)
    _check_texts(dataset, templates, canonical_templates, prompts)
    row_of, class_of = _labels_of(dataset, labels)
    if len(class_of) and class_of.max() >= len(names):
        raise UserError(
            f"{labels or f'dataset {dataset.path}'} has label {class_of.max()} but only {len(names)} class names "
            f"(numbered from 0)"
        )
    if present:
        found, class_of = np.unique(class_of, return_inverse=True)
        names = tuple(names[number] for number in found)
    where = templates.name if templates else "dataset" if dataset.templates else BARE_NAMES
    given = {what: file.stem for what, file in (("class_names", classnames), ("labels", labels)) if file}
    given |= {"candidates": "present"} if present else {}
    return ZeroShotSet(tuple(names), tuple(prompts), where, row_of, class_of, labels is not None, given)


def _check_texts(dataset: Dataset, file: Path | None, check: Any, texts: Sequence[str]) -> None:
    try:
        check(texts)
    except UserError as error:
        where = file or f"classnames.txt or templates of dataset {dataset.path}"
        raise UserError(f"{where}: {error}{'' if file else ' and index it anew'}") from None


def _labels_of(dataset: Dataset, file: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a row and a right class, by row."""
    keys, own = [], []
    for block in dataset.iter_blocks():
        keys += block.keys
        own += block.labels
    labels = np.array(own, np.int64)
    if file is None:
        rows = np.flatnonzero(labels >= 0)
        return rows, labels[rows]
    lists = _lists(dataset, file, keys)
    row_of = np.repeat(np.arange(len(lists)), [len(found) for found in lists])
    class_of = np.array([number for found in lists for number in found], np.int64)
    _check_agreement(dataset, file, labels, lists)
    return row_of, class_of


def _lists(dataset: Dataset, file: Path, keys: list[str]) -> list[list[int]]:
    """The classes of each row, each once; none for a row that does not count."""
    value = read_json(file)
    found = []
    for key in keys:
        if isinstance(value, dict):
            if key not in value:
                raise UserError(f"{file} has no entry for row {key!r} of {dataset.path}; [] leaves a row out")
            labels = value[key]
        elif isinstance(value, list):
            labels = _by_number(dataset, file, value, key)
        else:
            raise UserError(f"{file} is neither a JSON list of lists nor an object from keys to lists")
        if not (isinstance(labels, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in labels)):
            raise UserError(
                f"{file} has {str(labels)[:80]} for row {key!r}, which is no list of class numbers"
            )
        found.append(list(dict.fromkeys(labels)))
    return found


def _by_number(dataset: Dataset, file: Path, value: list[Any], key: str) -> Any:
    match = re.search(r"ILSVRC2012_val_(\d{8})(?!\d)", key)
    if not match:
        raise UserError(
            f"{file} is a list in the order of ILSVRC2012_val_*.JPEG, but row {key!r} of {dataset.path} is not "
            f"called so; index the photos under their own names, or give an object from keys to lists"
        )
    number = int(match[1])
    if not 1 <= number <= len(value):
        raise UserError(f"{file} has {len(value)} entries, but {dataset.path} has the row {key!r}")
    return value[number - 1]


def _check_agreement(dataset: Dataset, file: Path, labels: np.ndarray, lists: list[list[int]]) -> None:
    """Refuse labels in another order, or of other classes, than the dataset's own."""
    both = [own in found for own, found in zip(labels.tolist(), lists, strict=True) if own >= 0 and found]
    if both and sum(both) < _AGREEMENT * len(both):
        raise UserError(
            f"{file} does not fit {dataset.path}: of {len(both)} images with labels in both, only {sum(both)} "
            f"have their own label in the file; its order or its classes are others"
        )
