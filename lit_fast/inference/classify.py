"""Classify images that are not in a dataset: the command `lit-fast classify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates, classifier
from lit_fast.inference.model import Model
from lit_fast.storage.files import is_directory, is_file, list_names
from lit_fast.storage.paths import StrPath, is_junk, join, suffix

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_MAX_SHOWN = 5  # labels of an image in the table
_BATCH = 64


def check_labels(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raise UserError if labels or templates cannot be used."""
    if len(labels) < 2:
        raise UserError(
            "fewer than two labels were given; give at least two labels, as in --labels 'a cat,a dog'"
        )
    names = canonical_names(labels)
    canonical_templates(templates)
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} labels are equal to {name!r} without case and punctuation; remove all but one of them"
        )


def expand_images(paths: Sequence[StrPath]) -> list[str]:
    """Replace each directory by its image files, sorted by name.

    Raises:
      UserError: a directory has no image files.
    """
    files: list[str] = []
    for path in paths:
        images = [str(path)]
        if is_directory(path):
            names = [name for name in list_names(path) if suffix(name) in _SUFFIXES and not is_junk(name)]
            inside = [join(path, name) for name in names]
            images = [file for file in inside if is_file(file)]
        if not images:
            raise UserError(f"{path} has no image files ({', '.join(_SUFFIXES)}); name another directory")
        files += images
    return files


def classify(
    model: Model, images: Sequence[StrPath], labels: Sequence[str], templates: Sequence[str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Score labels for images.

    A label is embedded as in zero-shot evaluation: the mean over the templates, in each of which it replaces "{c}".

    Returns:
      Scores float32 [images, labels] of `Model.compare`, NaN for images that cannot be used, and the error messages
      of these by the image's index.

    Raises:
      UserError: the vision tower's weights are absent, or see `check_labels`.
    """
    check_labels(labels, templates)
    _ = model.tower  # if the tower cannot be loaded, fail here and not for each image
    classes = classifier(labels, templates, model.embed_text)
    scores = np.full((len(images), len(labels)), np.nan, np.float32)
    errors: dict[int, str] = {}

    def score(batch: range) -> None:
        """Score a batch; if an image of it cannot be used, score its halves."""
        try:
            embeddings = model.embed_image([images[i] for i in batch])
        except UserError as error:
            if len(batch) == 1:
                errors[batch[0]] = str(error)
                return
            middle = len(batch) // 2
            score(batch[:middle])
            score(batch[middle:])
        else:
            scores[batch.start : batch.stop] = model.compare(embeddings, classes)

    for start in range(0, len(images), _BATCH):
        score(range(start, min(start + _BATCH, len(images))))
    return scores, errors


def describe_scores(model: Model) -> str:
    """Return the meaning of the model's scores in one line."""
    if model.loss.name == "softmax":
        return "shares of the given labels, which add up to 100 %"
    return "each label's own probability, independent of the other labels"


def format_scores(images: Sequence[StrPath], labels: Sequence[str], scores: np.ndarray) -> str:
    """Return a line for each image without error: name, labels by decreasing score."""
    lines = []
    width = max((len(str(image)) for image in images), default=0)
    more = f" and {len(labels) - _MAX_SHOWN:,} more" if len(labels) > _MAX_SHOWN else ""
    for image, row in zip(images, scores, strict=True):
        if not np.isnan(row).any():
            order = np.argsort(-row, kind="stable")[:_MAX_SHOWN]
            best = ", ".join(f"{labels[i]} {100 * row[i]:.3g} %" for i in order)
            lines.append(f"{image!s:{width}}  {best}{more}")
    return "\n".join(lines)


def as_json(
    model: Model, images: Sequence[StrPath], labels: Sequence[str], scores: np.ndarray, errors: dict[int, str]
) -> dict[str, Any]:
    """Return the scores of all labels as a JSON object."""
    entries = [
        {"image": str(image)}
        | ({"error": errors[i]} if i in errors else {"scores": dict(zip(labels, row.tolist(), strict=True))})
        for i, (image, row) in enumerate(zip(images, scores, strict=True))
    ]
    kind = "share" if model.loss.name == "softmax" else "probability"
    return {"model": model.name, "step": model.step, "score": kind, "images": entries}
