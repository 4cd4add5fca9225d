"""Examples for the demo's page: pictures found by sentences, and confusions between classes."""

from __future__ import annotations

import os

import numpy as np

from lit_fast.data.dataset import open_dataset
from lit_fast.data.images.reader import ImageReader
from lit_fast.demo.page import Query
from lit_fast.evaluation.zeroshot import classifier
from lit_fast.report.gallery import nearest_images
from lit_fast.runs.run import Run

MAX_QUERIES = 8  # of each kind


def gallery(run: Run, path: str | os.PathLike[str]) -> tuple[list[Query], list[Query]]:
    """Draw sentences that found their own picture first, and sentences that did not; one per picture."""
    dataset = open_dataset(path)
    read = ImageReader(dataset).read_or_none
    rows, images = run.image_embeddings(dataset)
    captions = [texts for block in dataset.iter_captions() for texts in block]
    owner = np.repeat(np.arange(len(rows)), [len(captions[row]) for row in rows])
    texts = [text for row in rows for text in captions[row]]
    scores = run.embed_text(texts) @ images.T
    right: list[Query] = []
    wrong: list[Query] = []
    used: set[int] = set()
    for query in np.random.default_rng(0).permutation(len(texts)).tolist():
        image = int(owner[query])
        queries = right if scores[query].argmax() == image else wrong
        if image not in used and len(queries) < MAX_QUERIES:
            used.add(image)
            queries.append((texts[query], nearest_images(scores[query], image, rows, read)))
    return right, wrong


def confusions(run: Run, path: str | os.PathLike[str]) -> list[tuple[str, dict[str, float]]]:
    """Return each class with the shares of its images by predicted class, largest first."""
    dataset = open_dataset(path)
    rows, images = run.image_embeddings(dataset)
    labels = np.concatenate([np.array(block.labels) for block in dataset.iter_blocks()])[rows]
    names = dataset.classnames
    predicted = (images @ classifier(names, dataset.templates, run.embed_text).T).argmax(axis=1)
    found = []
    for label in np.unique(labels).tolist():
        counts = np.bincount(predicted[labels == label], minlength=len(names))
        order = np.argsort(-counts, kind="stable")
        found.append((names[label], {names[k]: counts[k] / counts.sum() for k in order if counts[k]}))
    return found
