"""Image-text retrieval: ranks and recall, without ever holding the matrix of all similarities.

The definitions are big_vision's (evaluators/proj/image_text/image_text_retrieval.py) and CLIP_benchmark's.
What they leave to the sorting routine is fixed here: of two equal scores the candidate with the lower
number comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALL_AT = (1, 5, 10)

# Scores held at a time: 64 MiB as float32.
_TILE = 1 << 24


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    right: Sequence[np.ndarray] | np.ndarray,
    *,
    tile: int = _TILE,
) -> np.ndarray:
    """The position of every query's best right candidate, 0 = first.

    Scores are float32 dot products; candidates are ordered by falling score, equal ones by rising number.
    The score of a right candidate is taken out of the tile that it is compared in, because a dot product
    computed by itself can differ from it in the last bit. (For the same reason two identical candidates
    can come out of a matrix product a bit apart; equal means equal as computed.)

    Args:
      queries: float32 [n, D], finite, n > 0.
      candidates: float32 [m, D], finite, m > 0.
      right: per query its right candidates, int [>= 1], in rising order.
      tile: scores held at a time, in whole rows; decides the memory.

    Returns:
      int64 [n].
    """
    n, m = len(queries), len(candidates)
    if len(right) != n:
        raise ValueError(f"{n} queries but right candidates for {len(right)}")
    out = np.empty(n, np.int64)
    step = min(n, max(1, tile // m))
    scores = np.empty((step, m), np.float32)  # one buffer: fresh memory costs more than the comparing
    for lo in range(0, n, step):
        part = queries[lo : lo + step]
        np.matmul(part, candidates.T, out=scores[: len(part)])
        for i, row in enumerate(scores[: len(part)], start=lo):
            best = right[i][row[right[i]].argmax()]
            # A lower number wins a tie against the best right candidate, a higher one loses it.
            before = np.count_nonzero(row[:best] >= row[best])
            out[i] = before + np.count_nonzero(row[best + 1 :] > row[best])
    return out


def retrieval_ranks(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in both directions.

    Args:
      images: normalised float32 [n, D].
      texts: normalised float32 [m, D].
      owner: int [m], the image that a text belongs to; every image has at least one text.

    Returns:
      int64 [m], the rank of a text's image among the images, and int64 [n], the rank of the best of an
      image's texts among the texts.
    """
    counts = np.bincount(owner, minlength=len(images))
    if len(owner) != len(texts) or len(counts) != len(images) or not counts.all():
        raise ValueError("every text needs an image and every image at least one text")
    own_texts = np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])
    return ranks(texts, images, owner[:, None]), ranks(images, texts, own_texts)


def recalls(
    text_ranks: np.ndarray, image_ranks: np.ndarray, owner: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    """Recall at 1, 5 and 10 under CLIP_benchmark's names.

    `image_retrieval_recall@k` is the share of texts whose image is among the first k images,
    `text_retrieval_recall@k` the share of images with any of their texts among the first k texts.

    Args:
      text_ranks: int [m], see `retrieval_ranks`.
      image_ranks: int [n].
      owner: int [m].
      weights: float [n], how often an image counts together with its texts; ones for the plain figures.
    """
    text_weights = weights[owner]
    to_image = {k: text_weights[text_ranks < k].sum() / text_weights.sum() for k in RECALL_AT}
    to_text = {k: weights[image_ranks < k].sum() / weights.sum() for k in RECALL_AT}
    named = {f"image_retrieval_recall@{k}": float(value) for k, value in to_image.items()}
    return named | {f"text_retrieval_recall@{k}": float(value) for k, value in to_text.items()}


def chance_recalls(counts: np.ndarray) -> dict[str, float]:
    """The expected `recalls` of a random order; `counts` int [n] are the texts per image.

    Text to image: min(k, n) / n. Image to text, with c of m texts right: 1 - C(m - c, k) / C(m, k),
    averaged over the images.
    """
    n, m = len(counts), int(counts.sum())
    out = {f"image_retrieval_recall@{k}": min(k, n) / n for k in RECALL_AT}
    for k in RECALL_AT:
        drawn = np.arange(min(k, m))
        # The probability that every draw misses; with fewer than k wrong texts one factor is 0.
        misses = ((m - counts[:, None] - drawn) / (m - drawn)).prod(axis=1)
        out[f"text_retrieval_recall@{k}"] = float(1 - misses.mean())
    return out
