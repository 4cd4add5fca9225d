"""Image-text retrieval: ranks in both directions and recall.

The definitions are big_vision's (evaluators/proj/image_text/image_text_retrieval.py) and CLIP_benchmark's
(metrics/zeroshot_retrieval.py), which agree. What they leave to the sorting routine is fixed here: of two
equal scores the candidate with the lower number comes first.
"""

from __future__ import annotations

import numpy as np

from lit_fast.evaluation.ranks import before, best_right, count_columns, count_rows, first_of

RECALL_AT = (1, 5, 10)
COLUMNS = 2 + 2 * len(RECALL_AT)  # of `recall_table`

# Images and texts of a tile: 4 MiB of scores, near enough to the caches.
_IMAGES, _TEXTS = 512, 2048


def retrieval_ranks(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, *, tile: tuple[int, int] = (_IMAGES, _TEXTS)
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in both directions from one product of images and texts, tile by tile.

    The tiles along the diagonal, which hold the scores of the right pairs, are computed once before all
    others, by the same products: a dot product computed by itself can differ in the last bit.

    Args:
      images: normalised float32 [n, D], finite.
      texts: normalised float32 [m, D], finite.
      owner: int [m], rising: the image that a text belongs to; every image has at least one text.
      tile: images and texts whose scores are held at a time.

    Returns:
      int64 [m], the rank of a text's image among the images, and int64 [n], the rank of the best of an
      image's texts among the texts; 0 = first.
    """
    n, m = len(images), len(texts)
    if len(owner) != m:
        raise ValueError(f"{m} texts but owners of {len(owner)}")
    first = first_of(owner, n)
    rows, columns = min(n, tile[0]), min(m, tile[1])
    buffer = np.empty(rows * columns, np.float32)

    def scores(lo: int, hi: int, left: int, right: int) -> np.ndarray:
        out = buffer[: (hi - lo) * (right - left)].reshape(hi - lo, right - left)
        return np.matmul(images[lo:hi], texts[left:right].T, out=out)

    def tiles(every: bool) -> list[tuple[int, int, int, int]]:
        return [
            (lo, min(lo + rows, n), left, min(left + columns, m))
            for lo in range(0, n, rows)
            for left in range(0, m, columns)
            if every or (first[lo] < left + columns and first[min(lo + rows, n)] > left)
        ]

    own = np.empty(m, np.float32)
    for lo, hi, left, right in tiles(every=False):
        a, b = max(left, first[lo]), min(right, first[hi])  # the texts of the tile that belong to its images
        own[a:b] = scores(lo, hi, left, right)[owner[a:b] - lo, np.arange(a, b) - left]
    best, best_text = best_right(own, np.arange(m), first)

    text_ranks, image_ranks = np.zeros(m, np.int64), np.zeros(n, np.int64)
    for lo, hi, left, right in tiles(every=True):
        part = scores(lo, hi, left, right)
        a, b = max(left, first[lo]), min(right, first[hi])
        if a < b:  # right candidates never stand before the right one
            part[owner[a:b] - lo, np.arange(a, b) - left] = -np.inf
        numbers, text_numbers = np.arange(lo, hi)[:, None], np.arange(left, right)
        text_ranks[left:right] += count_columns(before(part, own[left:right], numbers, owner[left:right]))
        image_ranks[lo:hi] += count_rows(
            before(part, best[lo:hi, None], text_numbers, best_text[lo:hi, None])
        )
    return text_ranks, image_ranks


def recall_table(text_ranks: np.ndarray, image_ranks: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """What each image contributes to the recalls, int64 [n, 8]: see `recalls`.

    Columns: 1, how many texts it has, how many of them find it among the first 1, 5 and 10 images, and
    whether it finds one of them among the first 1, 5 and 10 texts.

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
    """Recall at 1, 5 and 10 under CLIP_benchmark's names.

    `image_retrieval_recall@k` is the share of texts whose image is among the first k images,
    `text_retrieval_recall@k` the share of images with any of their texts among the first k texts.

    Args:
      sums: float64 [..., 8], the columns of `recall_table`, each added up over some images.

    Returns:
      Figures by name, float64 [...]; not a number where there was no image.
    """
    images, texts = sums[..., 0], sums[..., 1]
    with np.errstate(invalid="ignore"):
        to_image = {k: sums[..., 2 + i] / texts for i, k in enumerate(RECALL_AT)}
        to_text = {k: sums[..., 5 + i] / images for i, k in enumerate(RECALL_AT)}
    named = {f"image_retrieval_recall@{k}": value for k, value in to_image.items()}
    return named | {f"text_retrieval_recall@{k}": value for k, value in to_text.items()}


def chance_recalls(counts: np.ndarray) -> dict[str, float]:
    """The expected `recalls` of a random order; `counts` int [n] are the texts per image."""
    n, m = len(counts), int(counts.sum())
    named = {f"image_retrieval_recall@{k}": min(k, n) / n for k in RECALL_AT}
    return named | {f"text_retrieval_recall@{k}": chance_of_any(counts, m, k) for k in RECALL_AT}


def chance_of_any(right: np.ndarray, candidates: int, k: int) -> float:
    """The chance that the first k of randomly ordered candidates hold a right one, averaged over queries.

    1 - C(m - c, k) / C(m, k) for c right ones of m.

    Args:
      right: int [n], how many candidates are right.
      candidates: how many there are.
      k: how many are looked at.
    """
    drawn = np.arange(min(k, candidates))
    # The probability that every draw misses; with fewer than k wrong ones a factor is 0.
    misses = ((candidates - right[:, None] - drawn) / (candidates - drawn)).prod(axis=1)
    return float(1 - misses.mean())
