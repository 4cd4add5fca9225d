"""Ranks and recalls against a sort of the whole matrix of similarities."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.evaluation.ranks import count_columns, count_rows, ranks
from lit_fast.evaluation.retrieval import (
    chance_of_hit,
    chance_recalls,
    recall_table,
    recalls,
    retrieval_ranks,
)


def sorted_ranks(scores: np.ndarray, right: list[list[int]]) -> list[int]:
    """Ranks of the first relevant candidates by Python's sort: decreasing score, then increasing index."""
    out = []
    for row, own in zip(scores.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        out.append(min(order.index(j) for j in own))
    return out


def all_recalls(text_ranks: np.ndarray, image_ranks: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """The recalls of all images."""
    sums = recall_table(text_ranks, image_ranks, owner).sum(axis=0).astype(np.float64)
    return {name: float(value) for name, value in recalls(sums).items()}


@st.composite
def retrieval_sets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, texts and owners. Small whole numbers: exact products, and ties in nearly every row."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=9))
    owner = np.repeat(np.arange(len(counts)), counts)
    numbers = st.integers(-2, 2)
    width = draw(st.integers(1, 3))

    def vectors(count: int) -> np.ndarray:
        flat = draw(st.lists(numbers, min_size=count * width, max_size=count * width))
        return np.array(flat, np.float32).reshape(count, width)

    return vectors(len(counts)), vectors(len(owner)), owner


TILES = st.tuples(st.integers(1, 12), st.integers(1, 50))


@given(retrieval_sets(), TILES, st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_ranks_equal_a_full_sort_with_ties(
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray], tile: tuple[int, int], compared: int
) -> None:
    images, texts, owner = drawn
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    own = [np.flatnonzero(owner == i).tolist() for i in range(len(images))]
    text_ranks, image_ranks = retrieval_ranks(images, texts, owner, tile=tile)
    assert text_ranks.tolist() == sorted_ranks(scores.T, [[i] for i in owner.tolist()])
    assert image_ranks.tolist() == sorted_ranks(scores, own)
    # One direction by itself, in whole rows.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_fast.evaluation.ranks._COMPARED", compared)
        one = ranks(images, texts, owner, np.arange(len(owner)), tile=tile[0] * tile[1])
        other = ranks(texts, images, np.arange(len(owner)), owner, tile=tile[1])
    assert one.tolist() == image_ranks.tolist()
    assert other.tolist() == text_ranks.tolist()


@given(st.integers(0, 10_000), TILES)
@settings(max_examples=50, deadline=None)
def test_recalls_equal_argsort_in_float64(seed: int, tile: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, rng.integers(1, 40))
    owner = np.repeat(np.arange(len(counts)), counts)
    images = rng.normal(size=(len(counts), 24)).astype(np.float32)
    texts = (images[owner] + 2 * rng.normal(size=(len(owner), 24))).astype(np.float32)
    got = all_recalls(*retrieval_ranks(images, texts, owner, tile=tile), owner)

    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    for k in (1, 5, 10):
        first_texts = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        any_own = [np.any(owner[first] == i) for i, first in enumerate(first_texts)]
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(any_own))
        first_images = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        own = [owner[j] in first for j, first in enumerate(first_images)]
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(own))


@given(st.integers(0, 100), st.integers(1, 600), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_count_rows_and_columns_equal_sums(seed: int, rows: int, columns: int) -> None:
    marks = np.random.default_rng(seed).random((rows, columns)) < 0.9
    assert count_rows(marks).tolist() == marks.sum(axis=1).tolist()
    assert count_columns(marks).tolist() == marks.sum(axis=0).tolist()


def test_recalls_of_one_misranked_text() -> None:
    images = np.eye(2, dtype=np.float32)
    # The fourth text belongs to image 1 but is nearer to image 0.
    texts = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.8, 0.2]], np.float32)
    owner = np.array([0, 0, 1, 1])
    got = all_recalls(*retrieval_ranks(images, texts, owner), owner)
    assert got["image_retrieval_recall@1"] == 0.75
    assert got["text_retrieval_recall@1"] == 1.0
    assert got["image_retrieval_recall@5"] == got["text_retrieval_recall@10"] == 1.0


@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (9, 9)])
def test_ranks_of_equal_scores_prefer_the_lower_index(tile: tuple[int, int]) -> None:
    ones, numbers = np.ones((3, 1), np.float32), np.arange(3)
    got = retrieval_ranks(ones, ones, numbers, tile=tile)
    assert [r.tolist() for r in got] == [[0, 1, 2], [0, 1, 2]]
    # Of its two right candidates the query finds the second, number 1, first.
    right = ranks(ones[:1], ones, np.array([0, 0]), np.array([2, 1]))
    assert right.tolist() == [1]


def test_retrieval_ranks_of_one_image_are_zero() -> None:
    got = retrieval_ranks(np.ones((1, 4), np.float32), -np.ones((2, 4), np.float32), np.array([0, 0]))
    assert [r.tolist() for r in got] == [[0, 0], [0]]


@pytest.mark.parametrize("owner", [[0, 0, 0], [0, 1], [0, 1, 2], [0, 1, 0], [1, 0, 1]])
def test_retrieval_ranks_of_invalid_owners_raises_value_error(owner: list[int]) -> None:
    with pytest.raises(ValueError, match=r"owners of|in order"):
        retrieval_ranks(np.ones((2, 2), np.float32), np.ones((3, 2), np.float32), np.array(owner))


def test_ranks_need_less_memory_than_the_matrix() -> None:
    import tracemalloc

    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(4000, 8)).astype(np.float32) for _ in range(2))
    owner = np.arange(4000)
    for work in (
        lambda: ranks(images, texts, owner, owner, tile=1 << 18),
        lambda: retrieval_ranks(images, texts, owner, tile=(512, 512)),
    ):
        tracemalloc.start()
        try:
            work()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Four bytes per score of a tile and a byte for each of four marks, beside what each row has; the whole
        # matrix would be 64 MB.
        assert peak < 2.5 * 4 * (1 << 18)


def test_recall_table_counts_an_image_with_its_texts() -> None:
    table = recall_table(np.array([0, 3, 0]), np.array([0, 7]), np.array([0, 1, 1]))
    assert table.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 1, 2, 2, 0, 0, 1]]
    got = recalls(np.array([1.0, 2.0]) @ table)  # the second image twice
    assert got["image_retrieval_recall@1"] == pytest.approx(3 / 5)
    assert got["text_retrieval_recall@5"] == pytest.approx(1 / 3)


def test_chance_recalls_equal_the_formula_and_random_scores() -> None:
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
        reached.append(all_recalls(*retrieval_ranks(images, texts, owner), owner))
    for name, value in want.items():
        assert np.mean([r[name] for r in reached]) == pytest.approx(value, abs=0.03), name


def test_chance_recalls_with_fewer_candidates_than_k_are_one() -> None:
    with np.errstate(all="raise"):
        assert set(chance_recalls(np.array([2])).values()) == {1.0}
        assert chance_recalls(np.array([1, 2]))["text_retrieval_recall@1"] == pytest.approx(0.5)
        assert chance_of_hit(np.array([1, 3]), 3, 5) == 1.0
