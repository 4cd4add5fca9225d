"""Zero-shot classification: class names and templates become a classifier.

The procedure is big_vision's (evaluators/proj/image_text/discriminative_classifier.py and
prompt_engineering.py); the files it starts from are CLIP_benchmark's.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np

from lit_fast.errors import UserError
from lit_fast.retrieval import ranks

EmbedText = Callable[[list[str]], np.ndarray]
"""Texts to normalised float32 [n, D]."""

# Texts embedded at a time; only class embeddings are kept.
_TEXTS = 8192

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str, keep: str = "") -> str:
    """Underscores to spaces, no ASCII punctuation, lower case, single spaces.

    Deleting leaves no space: "close-up" becomes "closeup". Every occurrence of the string `keep` stays.
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    text = keep.join(part.translate(_NO_PUNCTUATION) for part in parts)
    return " ".join(text.lower().split())


def canonical_names(classnames: Sequence[str]) -> list[str]:
    """The first of each name's comma-separated aliases, canonical.

    Raises:
      UserError: nothing is left of a name.
    """
    names = [canonicalize(name, keep=",").split(",")[0].strip() for name in classnames]
    for number, name in enumerate(names):
        if not name:
            raise UserError(
                f"class name {classnames[number]!r} (number {number}) has neither letters nor digits before "
                "its first comma; rename it in classnames.txt"
            )
    return names


def canonical_templates(templates: Sequence[str]) -> list[str]:
    """Canonical templates with "{}" for the class name, which is written "{c}" or "{}".

    Raises:
      UserError: a template has no place for the name.
    """
    for template in templates:
        if "{c}" not in template and "{}" not in template:
            raise UserError(
                f"prompt template {template!r} has no place for the class name; write {{c}} there in "
                "zeroshot_classification_templates.txt"
            )
    return [canonicalize(template.replace("{c}", "{}"), keep="{}") for template in templates]


def classifier(classnames: Sequence[str], templates: Sequence[str], embed_text: EmbedText) -> np.ndarray:
    """Class embeddings, float32 [classes, D].

    One is the mean over the templates of the normalised text embeddings, divided by (1e-8 + its norm).

    Raises:
      UserError: see `canonical_names` and `canonical_templates`.
    """
    names, templates = canonical_names(classnames), canonical_templates(templates)
    group = max(1, _TEXTS // len(templates))
    parts = []
    for lo in range(0, len(names), group):
        texts = [t.replace("{}", name) for name in names[lo : lo + group] for t in templates]
        embedded = embed_text(texts)
        parts.append(embedded.reshape(-1, len(templates), embedded.shape[1]).mean(axis=1))
    means = np.concatenate(parts)
    return means / (1e-8 + np.linalg.norm(means, axis=1, keepdims=True))


def label_ranks(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The position of an image's own class, int64 [n], 0 = predicted; equal scores in order of number.

    Args:
      images: normalised float32 [n, D].
      classes: float32 [classes, D], from `classifier`.
      labels: int [n].
    """
    return ranks(images, classes, labels[:, None])


def accuracies(
    label_rank: np.ndarray, labels: np.ndarray, classes: int, weights: np.ndarray
) -> dict[str, float]:
    """`acc1`, `acc5` (from five classes on) and `mean_per_class_recall`, CLIP_benchmark's names.

    Args:
      label_rank: int [n], from `label_ranks`.
      labels: int [n], below `classes`.
      classes: how many there are; one that has no image does not count for the mean.
      weights: float [n], how often an image counts; ones for the plain figures.
    """
    first = label_rank < 1
    out = {"acc1": float(weights[first].sum() / weights.sum())}
    if classes >= 5:
        out["acc5"] = float(weights[label_rank < 5].sum() / weights.sum())
    seen = np.bincount(labels, weights, minlength=classes)
    right = np.bincount(labels[first], weights[first], minlength=classes)
    out["mean_per_class_recall"] = float(np.mean(right[seen > 0] / seen[seen > 0]))
    return out


def chance_accuracies(classes: int) -> dict[str, float]:
    """The expected `accuracies` of a random order of the classes."""
    five = {"acc5": 5 / classes} if classes >= 5 else {}
    return {"acc1": 1 / classes} | five | {"mean_per_class_recall": 1 / classes}
