"""Zero-shot classification: a classifier from class names and templates, and its accuracies.

The procedure is big_vision's (evaluators/proj/image_text/discriminative_classifier.py and prompt_engineering.py); its
input files are CLIP_benchmark's. CLIP_benchmark and open_clip differ in the texts alone: they keep case and punctuation
of names and templates, and use a name with all its aliases.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np

from lit_fast.errors import UserError
from lit_fast.evaluation.retrieval import chance_of_hit
from lit_fast.utils.normalize import normalize

EmbedText = Callable[[list[str]], np.ndarray]
"""Texts to normalized float32 [n, D]."""

_TEXTS = 8192  # embedded at a time; only class embeddings are kept

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str, keep: str = "") -> str:
    """Replace underscores by spaces, delete ASCII punctuation, convert to lower case, collapse spaces.

    Deletion leaves no space: "close-up" becomes "closeup". Every occurrence of the string `keep` stays.
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    text = keep.join(part.translate(_NO_PUNCTUATION) for part in parts)
    return " ".join(text.lower().split())


def canonical_names(classnames: Sequence[str]) -> list[str]:
    """Canonicalize the first of each name's comma-separated aliases.

    Raises:
      UserError: a name becomes empty.
    """
    names = [canonicalize(name, keep=",").split(",")[0].strip() for name in classnames]
    for number, name in enumerate(names):
        if not name:
            raise UserError(
                f"class name {classnames[number]!r} (number {number}) has neither letters nor digits before its first "
                "comma; rename it"
            )
    return names


def canonical_templates(templates: Sequence[str]) -> list[str]:
    """Canonicalize templates; "{c}" and "{}", the class name, become "{}".

    Raises:
      UserError: a template has neither.
    """
    for template in templates:
        if "{c}" not in template and "{}" not in template:
            raise UserError(f"prompt template {template!r} lacks the class name; write {{c}} in its place")
    return [canonicalize(template.replace("{c}", "{}"), keep="{}") for template in templates]


def classifier(classnames: Sequence[str], templates: Sequence[str], embed_text: EmbedText) -> np.ndarray:
    """Return the class embeddings, float32 [classes, D].

    Each is the mean over the templates of the normalized text embeddings, divided by (1e-8 + its norm).

    Raises:
      UserError: see `canonical_names` and `canonical_templates`.
    """
    names, templates = canonical_names(classnames), canonical_templates(templates)
    group = max(1, _TEXTS // len(templates))
    means = []
    for lo in range(0, len(names), group):
        texts = [t.replace("{}", name) for name in names[lo : lo + group] for t in templates]
        embedded = embed_text(texts)
        means.append(embedded.reshape(-1, len(templates), embedded.shape[1]).mean(axis=1))
    return normalize(np.concatenate(means))


def accuracy_table(ranks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the contribution of each image to `accuracies`, int64 [n, 3].

    Columns: its class, whether the class is predicted, whether it is among the first five.

    Args:
      ranks: int [n], the rank of an image's class among all; 0 = predicted.
      labels: int [n], its class; -1 for all images where they may have several.
    """
    return np.stack([labels, ranks < 1, ranks < 5], axis=1).astype(np.int64)


def accuracies(classes: int, rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return `acc1`, `acc5` (from five classes on) and `mean_per_class_recall`, CLIP_benchmark's names.

    The mean is over the classes that have an image, as in scikit-learn's `balanced_accuracy_score`. Where images have
    several labels (class -1), a prediction is right if it is one of them (big_vision's ReaL accuracy), and there is no
    recall per class.

    Args:
      classes: their number.
      rows: int [g, 3], of `accuracy_table`, sorted.
      weights: float64 [r, g], the multiplicity of each row.

    Returns:
      Figures by name, float64 [r].
    """
    total = weights.sum(axis=1)
    out = {"acc1": weights @ rows[:, 1] / total}
    if classes >= 5:
        out["acc5"] = weights @ rows[:, 2] / total
    if rows[0, 0] >= 0:
        first = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
        images = np.add.reduceat(weights, first, axis=1)
        right = np.add.reduceat(weights * rows[:, 1], first, axis=1)
        with np.errstate(invalid="ignore"):
            out["mean_per_class_recall"] = np.nanmean(right / images, axis=1)
    return out


def chance_accuracies(classes: int, labels: np.ndarray | None = None) -> dict[str, float]:
    """Return the expected `accuracies` of a random order of the classes.

    Args:
      classes: their number.
      labels: int [n], the number of right classes of each image; None: one each.
    """
    ks = (1, 5) if classes >= 5 else (1,)
    if labels is None:
        return {f"acc{k}": k / classes for k in ks} | {"mean_per_class_recall": 1 / classes}
    return {f"acc{k}": chance_of_hit(labels, classes, k) for k in ks}
