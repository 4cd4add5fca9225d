"""Labels for images that are no dataset: `lit-fast classify`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.errors import UserError
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates, classifier
from lit_fast.inference.model import Model

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_SHOWN = 5  # labels of an image in the table
_BATCH = 64


def check_labels(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raises UserError for labels or templates that cannot be used."""
    if len(labels) < 2:
        raise UserError("give at least two labels, as in --labels 'a cat,a dog'")
    names = canonical_names(labels)
    canonical_templates(templates)
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} labels mean {name!r} (case and punctuation do not count); leave one of them"
        )


def expand_images(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and for a directory the image files in it by name.

    Raises:
      UserError: a directory holds none.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
        if not inside:
            raise UserError(f"{path} has no image files ({', '.join(_SUFFIXES)})")
        files += inside
    return files


def classify(
    model: Model, images: Sequence[Path], labels: Sequence[str], templates: Sequence[str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Scores float32 [images, labels] as `Model.compare` gives them, and why some images have none (rows of NaN).

    A label becomes an embedding as in zero-shot evaluation: the mean over the templates, each with the label in
    the place of {c}.

    Raises:
      UserError: the vision tower's weights cannot be had, or see `check_labels`.
    """
    check_labels(labels, templates)
    _ = model.tower  # a missing tower is no image's fault
    classes = classifier(labels, templates, model.embed_text)
    scores = np.full((len(images), len(labels)), np.nan, np.float32)
    problems: dict[int, str] = {}
    for lo in range(0, len(images), _BATCH):
        part = range(lo, min(lo + _BATCH, len(images)))
        try:
            embedded = {i: e for i, e in zip(part, model.embed_image([images[j] for j in part]), strict=True)}
        except UserError:
            embedded = {}
            for i in part:
                try:
                    embedded[i] = model.embed_image([images[i]])[0]
                except UserError as error:
                    problems[i] = str(error)
        if embedded:
            scores[list(embedded)] = model.compare(np.stack(list(embedded.values())), classes)
    return scores, problems


def meaning(model: Model) -> str:
    """What the model's scores are, in a few words."""
    if model.loss.name == "softmax":
        return "shares of the labels given, which add up to 100 %"
    return "each label's own probability, whatever the others are"


def format_scores(images: Sequence[Path], labels: Sequence[str], scores: np.ndarray) -> str:
    """A line per image that could be read: its name, then the labels by falling score."""
    lines = []
    width = max((len(str(image)) for image in images), default=0)
    for image, row in zip(images, scores, strict=True):
        if np.isnan(row).any():
            continue
        order = np.argsort(-row, kind="stable")
        best = ", ".join(f"{labels[i]} {100 * row[i]:.3g} %" for i in order[:_SHOWN])
        more = f" and {len(labels) - _SHOWN:,} more" if len(labels) > _SHOWN else ""
        lines.append(f"{image!s:{width}}  {best}{more}")
    return "\n".join(lines)


def as_json(
    model: Model, images: Sequence[Path], labels: Sequence[str], scores: np.ndarray, problems: dict[int, str]
) -> dict[str, Any]:
    """The scores of all labels, for a file."""
    entries: list[dict[str, Any]] = []
    for i, (image, row) in enumerate(zip(images, scores, strict=True)):
        if i in problems:
            entries.append({"image": str(image), "error": problems[i]})
        else:
            entries.append({"image": str(image), "scores": dict(zip(labels, row.tolist(), strict=True))})
    kind = "share" if model.loss.name == "softmax" else "probability"
    return {"model": model.name, "step": model.step, "score": kind, "images": entries}
