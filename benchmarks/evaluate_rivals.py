"""Figures of embeddings by the code of open_clip and CLIP_benchmark, for benchmarks.evaluate.

Each function prepares the inputs of its package and returns the evaluation, which the benchmark times.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch

from tests.torch_packages import load_torchvision

load_torchvision()

from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval  # noqa: E402
from open_clip_train import zero_shot as open_clip_zero_shot  # noqa: E402
from open_clip_train.train import get_clip_metrics  # noqa: E402

# Both call `float` on arrays of one element, which numpy 2.4 refuses.
for module in (open_clip_zero_shot, zeroshot_classification):
    module.float = lambda value: float(np.asarray(value).item())

BATCH, RETRIEVAL_BATCH = 1024, 64
RECALL_AT = [1, 5, 10]
RECALLS = [f"{target}_retrieval_recall@{k}" for target in ("image", "text") for k in RECALL_AT]

Figures = dict[str, float]
Evaluation = Callable[[], Figures]


class Identity:
    """A model for CLIP_benchmark whose inputs are embeddings."""

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return x

    encode_text = encode_image


class Batches:
    """A data loader of (images, labels or lists of texts)."""

    def __init__(self, images: torch.Tensor, others: Any, batch: int, classes: int = 0) -> None:
        self.images, self.others, self.batch = images, others, batch
        self.dataset = SimpleNamespace(classes=range(classes))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        for lo in range(0, len(self.images), self.batch):
            yield self.images[lo : lo + self.batch], self.others[lo : lo + self.batch]


def open_clip_accuracies(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Return open_clip's evaluation in batches of 1024; it has no recall per class."""
    loader = Batches(torch.from_numpy(images), torch.from_numpy(labels), BATCH)
    args = SimpleNamespace(device="cpu", precision="fp32", batch_size=BATCH)
    classifier = torch.from_numpy(classes).T.contiguous()

    def evaluate() -> Figures:
        acc1, acc5 = open_clip_zero_shot.run(lambda image: (image,), classifier, loader, args)
        return {"acc1": acc1, "acc5": acc5}

    return evaluate


def clip_benchmark_accuracies(
    images: np.ndarray, classes: np.ndarray, labels: np.ndarray, file: Path
) -> Evaluation:
    """Return CLIP_benchmark's evaluation in batches of 1024; its classifier is written to `file`."""
    loader = Batches(torch.from_numpy(images), torch.from_numpy(labels), BATCH, len(classes))
    torch.save(torch.from_numpy(classes).T.contiguous(), file)
    return lambda: zeroshot_classification.evaluate(
        Identity(), loader, None, None, None, "cpu", amp=False, load_clfs=[str(file)]
    )


def open_clip_recalls(images: np.ndarray, texts: np.ndarray) -> Evaluation:
    """Return open_clip's evaluation; the i-th text belongs to the i-th image."""
    theirs = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in RECALL_AT]

    def evaluate() -> Figures:
        got = get_clip_metrics(torch.from_numpy(images), torch.from_numpy(texts), 100.0)
        return {name: float(got[their]) for name, their in zip(RECALLS, theirs, strict=True)}

    return evaluate


def clip_benchmark_recalls(
    images: np.ndarray, texts: np.ndarray, texts_of: Sequence[Sequence[int]]
) -> Evaluation:
    """Return CLIP_benchmark's evaluation in its default batches of 64 images; `texts_of` lists texts by image."""
    loader = Batches(torch.from_numpy(images), texts_of, RETRIEVAL_BATCH)
    their_texts = torch.from_numpy(texts)
    return lambda: zeroshot_retrieval.evaluate(
        Identity(), loader, lambda numbers: their_texts[numbers], "cpu", amp=False, recall_k_list=RECALL_AT
    )
