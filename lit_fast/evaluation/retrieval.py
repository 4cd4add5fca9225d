"""Image-text retrieval: ranks in both directions and recall.

The definitions are big_vision's (evaluators/proj/image_text/image_text_retrieval.py) and CLIP_benchmark's
(metrics/zeroshot_retrieval.py), which agree. Where they leave the order to the sorting routine, the candidate with the
lower index comes first of two with equal scores.
"""

from __future__ import annotations

import numpy as np

from lit_fast.evaluation.ranks import chance_of_hit, ranks

RECALL_AT = (1, 5, 10)
COLUMNS = 2 + 2 * len(RECALL_AT)  # of `recall_table`


def retrieval_ranks(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rank in both directions.

    Args:
      images: normalized float32 [n, D], finite.
      texts: normalized float32 [m, D], finite.
      owner: int [m], non-decreasing: the image that a text belongs to. Every image has at least one text.

    Returns:
      int64 [m], the rank of a text's image among the images, and int64 [n], the rank of the best of an image's texts
      among the texts; 0 = first.
    """
    numbers = np.arange(len(texts))
    return ranks(texts, images, numbers, owner), ranks(images, texts, owner, numbers)


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
