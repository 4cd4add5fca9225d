"""Names and templates to a classifier, and its accuracies."""

from functools import partial
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.errors import UserError
from lit_fast.evaluation.bootstrap import point_estimates
from lit_fast.evaluation.ranks import ranks
from lit_fast.evaluation.zeroshot import (
    accuracies,
    accuracy_table,
    canonical_names,
    canonical_templates,
    canonicalize,
    chance_accuracies,
    classifier,
)


@pytest.mark.parametrize(
    ("text", "keep", "want"),
    [
        ("a close-up photo of a {}.", "{}", "a closeup photo of a {}"),
        ("itap of the {}.", "{}", "itap of the {}"),
        ("{} {", "{}", "{}"),
        ("Great_White  shark", "", "great white shark"),
        ("jack-o'-lantern", "", "jackolantern"),
        ("tench, Tinca tinca", ",", "tench, tinca tinca"),
        ("tench, Tinca tinca", "", "tench tinca tinca"),
        ("  Äpfel\t(grün) \n", "", "äpfel grün"),
        ("ΣΊΣΥΦΟΣ", "", "σίσυφος"),
        ("“quoted”…", "", "“quoted”…"),  # only ASCII punctuation goes
        ("!?", "", ""),
    ],
)
def test_canonicalize(text: str, keep: str, want: str) -> None:
    assert canonicalize(text, keep) == want


@given(st.text())
def test_canonicalize_is_idempotent_on_ascii(text: str) -> None:
    once = canonicalize(text.encode("ascii", "ignore").decode())
    assert canonicalize(once) == once


def test_canonical_names_keep_the_first_alias() -> None:
    assert canonical_names(["Great_White, man-eater", "T-shirt", "a , b"]) == ["great white", "tshirt", "a"]


def test_canonical_templates_accept_both_spellings() -> None:
    got = canonical_templates(["A photo of a {c}.", "{}", "{c}, or {c}!", "a_{c}_b"])
    assert got == ["a photo of a {}", "{}", "{} or {}", "a {} b"]


def test_canonical_templates_without_the_name_raise_user_error() -> None:
    with pytest.raises(UserError, match=r"'a photo of a \{name\}\.'.*\{c\}"):
        canonical_templates(["{c}", "a photo of a {name}."])


@pytest.mark.parametrize("name", ["?!", "", ", rose"])
def test_canonical_names_of_empty_name_raise_user_error(name: str) -> None:
    with pytest.raises(UserError, match="number 1"):
        canonical_names(["rose", name])


def embed_letters(texts: list[str]) -> np.ndarray:
    """Normalized letter counts: a text tower whose results can be worked out by hand."""
    counts = np.array([[t.count(c) for c in "abc {}"] + [1] for t in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_classifier_is_the_normalized_mean_of_normalized_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    names, templates = ["aab", "b, a", "c", "ca"], ["{c}", "A {}.", "{c} {c} bb"]
    want = []
    for name in ("aab", "b", "c", "ca"):
        mean = embed_letters([name, f"a {name}", f"{name} {name} bb"]).mean(axis=0)
        want.append(mean / (1e-8 + np.linalg.norm(mean)))
    got = classifier(names, templates, embed_letters)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    monkeypatch.setattr("lit_fast.evaluation.zeroshot._TEXTS", 6)  # two classes at a time
    calls = []
    again = classifier(names, templates, lambda texts: calls.append(len(texts)) or embed_letters(texts))
    assert calls == [6, 6]
    np.testing.assert_array_equal(again, got)


def figures(best: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """The accuracies of all images."""
    return point_estimates(partial(accuracies, classes), accuracy_table(best, labels))


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_accuracies_equal_a_full_sort_with_ties(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    images = rng.integers(-1, 2, (n, 3)).astype(np.float32)
    vectors = rng.integers(-1, 2, (classes, 3)).astype(np.float32)
    labels = rng.integers(0, classes, n)
    got = figures(ranks(images, vectors, np.arange(n), labels), labels, classes)

    order = np.argsort(-(images.astype(np.float64) @ vectors.T), axis=1, kind="stable")
    assert got["acc1"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert ("acc5" in got) == (classes >= 5)
    if classes >= 5:
        assert got["acc5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(axis=1)))
    recall = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
    assert got["mean_per_class_recall"] == pytest.approx(np.mean(recall))


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_accuracies_of_multilabel_images_accept_any_label(seed: int) -> None:
    """ReaL accuracy as big_vision has it: the prediction is among the image's labels."""
    rng = np.random.default_rng(seed)
    n, classes = 30, 9
    images, vectors = (rng.normal(size=(k, 4)).astype(np.float32) for k in (n, classes))
    lists = [rng.permutation(classes)[: rng.integers(1, 4)] for _ in range(n)]
    image_of = np.repeat(np.arange(n), [len(found) for found in lists])
    best = ranks(images, vectors, image_of, np.concatenate(lists))
    got = figures(best, np.full(n, -1), classes)
    order = np.argsort(-(images.astype(np.float64) @ vectors.T), axis=1)
    want = {k: np.mean([np.isin(o[:k], l).any() for o, l in zip(order, lists, strict=True)]) for k in (1, 5)}
    assert got == {"acc1": pytest.approx(want[1]), "acc5": pytest.approx(want[5])}


def test_accuracies_of_uneven_classes_and_weights() -> None:
    best, labels = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 2])
    got = figures(best, labels, 3)
    assert got == {"acc1": 0.75, "mean_per_class_recall": 0.5}  # class 1 has no image and does not count
    rows = np.array([[0, 1, 1], [2, 0, 1]])
    drawn = accuracies(3, rows, np.array([[3.0, 1.0], [1.0, 3.0], [4.0, 0.0]]))
    assert drawn["acc1"].tolist() == [0.75, 0.25, 1.0]
    assert drawn["mean_per_class_recall"].tolist() == [0.5, 0.5, 1.0]


def test_chance_accuracies_equal_the_formula() -> None:
    assert chance_accuracies(10) == {"acc1": 0.1, "acc5": 0.5, "mean_per_class_recall": 0.1}
    assert "acc5" not in chance_accuracies(4)
    # One and three right ones of ten: the first is right with 0.1 and 0.3.
    several = chance_accuracies(10, np.array([1, 3]))
    assert several == {
        "acc1": pytest.approx(0.2),
        "acc5": pytest.approx((0.5 + 1 - comb(7, 5) / comb(10, 5)) / 2),
    }
