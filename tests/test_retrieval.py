"""Ranks and recalls against a sort of the whole matrix of similarities."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.retrieval import chance_recalls, ranks, recalls, retrieval_ranks


def sorted_ranks(scores: np.ndarray, right: list[list[int]]) -> list[int]:
    """Where the first right candidate stands when Python sorts by falling score, then by number."""
    out = []
    for row, own in zip(scores.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        out.append(min(order.index(j) for j in own))
    return out


@st.composite
def retrieval_sets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, texts and owners. Small whole numbers: exact products, and ties in nearly every row."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=9))
    owner = np.repeat(np.arange(len(counts)), counts)
    owner = np.array(draw(st.permutations(owner.tolist())))
    numbers = st.integers(-2, 2)
    width = draw(st.integers(1, 3))

    def vectors(count: int) -> np.ndarray:
        flat = draw(st.lists(numbers, min_size=count * width, max_size=count * width))
        return np.array(flat, np.float32).reshape(count, width)

    return vectors(len(counts)), vectors(len(owner)), owner


@given(retrieval_sets(), st.sampled_from([1, 7, 20, 1 << 20]))
@settings(max_examples=300, deadline=None)
def test_ranks_equal_a_full_sort_with_ties(
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray], tile: int
) -> None:
    images, texts, owner = drawn
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    own = [np.flatnonzero(owner == i) for i in range(len(images))]
    want = sorted_ranks(scores, [o.tolist() for o in own])
    assert ranks(images, texts, own, tile=tile).tolist() == want
    want = sorted_ranks(scores.T, [[i] for i in owner.tolist()])
    assert ranks(texts, images, owner[:, None], tile=tile).tolist() == want


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_recalls_equal_argsort_in_float64(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, rng.integers(1, 40))
    owner = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = rng.normal(size=(len(counts), 24)).astype(np.float32)
    texts = (images[owner] + 2 * rng.normal(size=(len(owner), 24))).astype(np.float32)
    text_ranks, image_ranks = retrieval_ranks(images, texts, owner)
    got = recalls(text_ranks, image_ranks, owner, np.ones(len(images)))

    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    for k in (1, 5, 10):
        first_texts = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        any_own = [np.any(owner[first] == i) for i, first in enumerate(first_texts)]
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(any_own))
        first_images = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        own = [owner[j] in first for j, first in enumerate(first_images)]
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(own))


def test_two_images_four_texts_one_misranked() -> None:
    images = np.eye(2, dtype=np.float32)
    # The fourth text belongs to image 1 but lies nearer to image 0.
    texts = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.8, 0.2]], np.float32)
    owner = np.array([0, 0, 1, 1])
    got = recalls(*retrieval_ranks(images, texts, owner), owner, np.ones(2))
    assert got["image_retrieval_recall@1"] == 0.75
    assert got["text_retrieval_recall@1"] == 1.0
    assert got["image_retrieval_recall@5"] == got["text_retrieval_recall@10"] == 1.0


def test_equal_scores_go_to_the_lower_number() -> None:
    images, texts = np.ones((3, 1), np.float32), np.ones((3, 1), np.float32)
    assert [r.tolist() for r in retrieval_ranks(images, texts, np.array([0, 1, 2]))] == [[0, 1, 2], [0, 1, 2]]
    assert [r.tolist() for r in retrieval_ranks(images, texts, np.array([2, 0, 1]))] == [[2, 0, 1], [1, 2, 0]]


def test_equal_scores_with_many_scattered_texts() -> None:
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 25))
    _, image_ranks = retrieval_ranks(np.ones((40, 1), np.float32), np.ones((1000, 1), np.float32), owner)
    assert image_ranks.tolist() == [owner.tolist().index(i) for i in range(40)]


def test_one_image_is_always_found() -> None:
    got = retrieval_ranks(np.ones((1, 4), np.float32), -np.ones((2, 4), np.float32), np.array([0, 0]))
    assert [r.tolist() for r in got] == [[0, 0], [0]]


@pytest.mark.parametrize("owner", [[0, 0, 0], [0, 1], [0, 1, 2], [0, 1, 1, 0]])
def test_owners_must_fit(owner: list[int]) -> None:
    with pytest.raises(ValueError, match="image"):
        retrieval_ranks(np.ones((2, 2), np.float32), np.ones((3, 2), np.float32), np.array(owner))


def test_memory_stays_below_the_matrix() -> None:
    import tracemalloc

    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(4000, 8)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    try:
        ranks(images, texts, np.arange(4000)[:, None], tile=1 << 18)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * 4 * (1 << 18)  # the whole matrix would be 64 MB


def test_weights_count_an_image_with_its_texts() -> None:
    text_ranks, image_ranks, owner = np.array([0, 3, 0]), np.array([0, 7]), np.array([0, 1, 1])
    weighted = recalls(text_ranks, image_ranks, owner, np.array([1.0, 2.0]))
    repeated = recalls(np.array([0, 3, 0, 3, 0]), np.array([0, 7, 7]), np.array([0, 1, 1, 2, 2]), np.ones(3))
    assert weighted == pytest.approx(repeated)
    assert weighted["image_retrieval_recall@1"] == pytest.approx(3 / 5)
    assert weighted["text_retrieval_recall@5"] == pytest.approx(1 / 3)


def test_chance_is_the_formula_and_what_random_scores_reach() -> None:
    counts = np.array([1, 2, 5, 3, 1, 4, 2])
    n, m = len(counts), int(counts.sum())
    want = chance_recalls(counts)
    for k in (1, 5, 10):
        assert want[f"image_retrieval_recall@{k}"] == pytest.approx(min(k, n) / n)
        misses = np.mean([comb(m - c, k) / comb(m, k) for c in counts.tolist()])
        assert want[f"text_retrieval_recall@{k}"] == pytest.approx(1 - misses)

    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(n), counts)
    # One-hot queries make the similarities themselves random: a random order in every trial.
    reached = []
    for _ in range(400):
        table = rng.random((n, m)).astype(np.float32)
        images, texts = np.eye(n, dtype=np.float32), table.T.copy()
        reached.append(recalls(*retrieval_ranks(images, texts, owner), owner, np.ones(n)))
    for name, value in want.items():
        assert np.mean([r[name] for r in reached]) == pytest.approx(value, abs=0.03), name


def test_chance_with_fewer_candidates_than_k() -> None:
    with np.errstate(all="raise"):
        assert set(chance_recalls(np.array([2])).values()) == {1.0}
        assert chance_recalls(np.array([1, 2]))["text_retrieval_recall@1"] == pytest.approx(0.5)
