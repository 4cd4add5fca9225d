"""Image-text retrieval: ranks in both directions and recall.

The definitions are big_vision's (evaluators/proj/image_text/image_text_retrieval.py) and CLIP_benchmark's
(metrics/zeroshot_retrieval.py), which agree. Where they leave the order to the sorting routine, the candidate with the
lower index comes first of two with equal scores.
"""

from __future__ import annotations

import numpy as np

from lit_fast.evaluation.ranks import best_relevant, count_columns, count_rows, pair_offsets, precedes

RECALL_AT = (1, 5, 10)
COLUMNS = 2 + 2 * len(RECALL_AT)  # of `recall_table`

_TILE = (512, 2048)  # images, texts: 4 MiB of scores, about the size of a cache


def retrieval_ranks(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, *, tile: tuple[int, int] = _TILE
) -> tuple[np.ndarray, np.ndarray]:
    """Rank in both directions from one product of images and texts, tile by tile.

    The tiles on the diagonal, which hold the scores of the matching pairs, are computed once more before all others
    and by the same products, because a separate dot product can differ in the last bit.

    Args:
      images: normalized float32 [n, D], finite.
      texts: normalized float32 [m, D], finite.
      owner: int [m], non-decreasing: the image that a text belongs to. Every image has at least one text.
      tile: images and texts whose scores are in memory at a time.

    Returns:
      int64 [m], the rank of a text's image among the images, and int64 [n], the rank of the best of an image's texts
      among the texts; 0 = first.
    """
    n, m = len(images), len(texts)
    if len(owner) != m:
        raise ValueError(f"{m} texts have owners of {len(owner)}")
    offsets = pair_offsets(owner, n)
    rows, columns = min(n, tile[0]), min(m, tile[1])
    buffer = np.empty(rows * columns, np.float32)

    def scores_of(lo: int, hi: int, left: int, right: int) -> np.ndarray:
        out = buffer[: (hi - lo) * (right - left)].reshape(hi - lo, right - left)
        return np.matmul(images[lo:hi], texts[left:right].T, out=out)

    def tiles(diagonal_only: bool) -> list[tuple[int, int, int, int]]:
        return [
            (lo, min(lo + rows, n), left, min(left + columns, m))
            for lo in range(0, n, rows)
            for left in range(0, m, columns)
            if not diagonal_only or (offsets[lo] < left + columns and offsets[min(lo + rows, n)] > left)
        ]

    matching = np.empty(m, np.float32)
    for lo, hi, left, right in tiles(diagonal_only=True):
        a, b = (
            max(left, offsets[lo]),
            min(right, offsets[hi]),
        )  # the texts of the tile that belong to its images
        matching[a:b] = scores_of(lo, hi, left, right)[owner[a:b] - lo, np.arange(a, b) - left]
    best, best_text = best_relevant(matching, np.arange(m), offsets)

    text_ranks, image_ranks = np.zeros(m, np.int64), np.zeros(n, np.int64)
    for lo, hi, left, right in tiles(diagonal_only=False):
        scores = scores_of(lo, hi, left, right)
        a, b = max(left, offsets[lo]), min(right, offsets[hi])
        if a < b:  # matching candidates never precede the best of them
            scores[owner[a:b] - lo, np.arange(a, b) - left] = -np.inf
        image_index, text_index = np.arange(lo, hi)[:, None], np.arange(left, right)
        text_ranks[left:right] += count_columns(
            precedes(scores, matching[left:right], image_index, owner[left:right])
        )
        image_ranks[lo:hi] += count_rows(
            precedes(scores, best[lo:hi, None], text_index, best_text[lo:hi, None])
        )
    return text_ranks, image_ranks


def recall_table(text_ranks: np.ndarray, image_ranks: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the contribution of each image to `recalls`, int64 [n, 8].

    Columns: 1; the number of its texts; how many of them find it among the first 1, 5 and 10 images; whether it finds
    one of them among the first 1, 5 and 10 texts.

    Args:
      text_ranks: int [m], see `retrieval_ranks`.
      image_ranks: int [n].
      owner: int [m].
    """
    n = len(image_ranks)
    texts = [np.bincount(owner, minlength=n)]
    texts += [np.bincount(owner[text_ranks < k], minlength=n) for k in RECALL_AT]
    return np.stack([np.ones(n, np.int64), *texts, *(image_ranks < k for k in RECALL_AT)], axis=1)


def recalls(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return recall at 1, 5 and 10 under CLIP_benchmark's names.

    `image_retrieval_recall@k` is the share of texts whose image is among the first k images,
    `text_retrieval_recall@k` the share of images with any of their texts among the first k texts.

    Args:
      sums: float64 [..., 8], the columns of `recall_table` summed over some images.

    Returns:
      Figures by name, float64 [...]; NaN where there is no image.
    """
    images, texts = sums[..., 0], sums[..., 1]
    with np.errstate(invalid="ignore"):
        to_image = {k: sums[..., 2 + i] / texts for i, k in enumerate(RECALL_AT)}
        to_text = {k: sums[..., 5 + i] / images for i, k in enumerate(RECALL_AT)}
    figures = {f"image_retrieval_recall@{k}": value for k, value in to_image.items()}
    return figures | {f"text_retrieval_recall@{k}": value for k, value in to_text.items()}


def chance_recalls(counts: np.ndarray) -> dict[str, float]:
    """Return the expected `recalls` of a random order; `counts` int [n] are the texts per image."""
    n, m = len(counts), int(counts.sum())
    figures = {f"image_retrieval_recall@{k}": min(k, n) / n for k in RECALL_AT}
    return figures | {f"text_retrieval_recall@{k}": chance_of_hit(counts, m, k) for k in RECALL_AT}


def chance_of_hit(relevant: np.ndarray, candidates: int, k: int) -> float:
    """Return the probability of a relevant one among the first k of randomly ordered candidates.

    It is 1 - C(m - c, k) / C(m, k) for c relevant ones of m, averaged over the queries.

    Args:
      relevant: int [n], the number of relevant candidates of each query.
      candidates: their total number.
      k: positions that count.
    """
    drawn = np.arange(min(k, candidates))
    # The probability that every draw misses; with fewer than k irrelevant ones a factor is 0.
    misses = ((candidates - relevant[:, None] - drawn) / (candidates - drawn)).prod(axis=1)
    return float(1 - misses.mean())
