"""Zero-shot classification: class names and templates become a classifier.

The procedure is big_vision's (evaluators/proj/image_text/discriminative_classifier.py and
prompt_engineering.py); the files it starts from are CLIP_benchmark's. CLIP_benchmark and open_clip differ in
the texts alone: they neither lower names and templates nor take their punctuation away, and use a name with
all of its aliases.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np

from lit_fast.errors import UserError
from lit_fast.evaluation.retrieval import chance_of_any
from lit_fast.utils.normalize import normalize

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
                "its first comma; give it another name"
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
                f"prompt template {template!r} has no place for the class name; write {{c}} there"
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
    return normalize(means)


def accuracy_table(best: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What each image contributes to the accuracies, int64 [n, 3]: see `accuracies`.

    Columns: its class, whether that is the first one predicted, whether it is among the first five.

    Args:
      best: int [n], the rank of an image's class among all, 0 = predicted.
      labels: int [n], its class; -1 for all of them where images may have several.
    """
    return np.stack([labels, best < 1, best < 5], axis=1).astype(np.int64)


def accuracies(classes: int, rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """`acc1`, `acc5` (from five classes on) and `mean_per_class_recall`, CLIP_benchmark's names.

    The mean is over the classes that have an image, as scikit-learn's `balanced_accuracy_score` takes it.
    Where images have several labels (class -1) a prediction is right if it is one of them, which is
    big_vision's definition of ReaL accuracy, and there is no recall per class.

    Args:
      classes: how many there are.
      rows: int [g, 3], of `accuracy_table`, rising.
      weights: float64 [r, g], how often each row counts.

    Returns:
      Figures by name, float64 [r].
    """
    total = weights.sum(axis=1)
    out = {"acc1": weights @ rows[:, 1] / total}
    if classes >= 5:
        out["acc5"] = weights @ rows[:, 2] / total
    if rows[0, 0] >= 0:
        first = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
        seen = np.add.reduceat(weights, first, axis=1)
        right = np.add.reduceat(weights * rows[:, 1], first, axis=1)
        with np.errstate(invalid="ignore"):
            out["mean_per_class_recall"] = np.nanmean(right / seen, axis=1)
    return out


def chance_accuracies(classes: int, labels: np.ndarray | None = None) -> dict[str, float]:
    """The expected `accuracies` of a random order of the classes.

    Args:
      classes: how many there are.
      labels: int [n], how many classes are right for each image; None where that is one for all.
    """
    shown = (1, 5) if classes >= 5 else (1,)
    if labels is None:
        return {f"acc{k}": k / classes for k in shown} | {"mean_per_class_recall": 1 / classes}
    return {f"acc{k}": chance_of_any(labels, classes, k) for k in shown}
