"""What the page shows beside the figures: pictures found by sentences, and confusions of the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.demo.page import Confusion, Query
from lit_fast.evaluation.zeroshot import classifier
from lit_fast.runs.run import Run

SHOWN = 8  # queries of each kind
FOUND = 5  # pictures per query


def gallery(run: Run, path: Path) -> tuple[list[Query], list[Query]]:
    """Queries whose picture came first, and queries whose picture did not; one per picture, at random."""
    dataset = open_dataset(path)
    rows, images = run.image_embeddings(dataset)
    captions = [c for block in dataset.iter_captions() for c in block]
    owner = np.repeat(np.arange(len(rows)), [len(captions[row]) for row in rows])
    texts = [text for row in rows for text in captions[row]]
    scores = run.embed_text(texts) @ images.T
    right: list[Query] = []
    wrong: list[Query] = []
    used: set[int] = set()
    for number in np.random.default_rng(0).permutation(len(texts)):
        own = int(owner[number])
        order = np.argsort(-scores[number], kind="stable")
        rank = int(np.nonzero(order == own)[0][0])
        chosen = right if rank == 0 else wrong
        if own in used or len(chosen) == SHOWN:
            continue
        used.add(own)
        pictures = [(_image(dataset, int(rows[i])), int(i) == own) for i in order[:FOUND]]
        chosen.append(Query(texts[number], pictures, rank, _image(dataset, int(rows[own]))))
    return right, wrong


def confusion(run: Run, path: Path) -> Confusion:
    """How often the pictures of one class were given the name of another."""
    dataset = open_dataset(path)
    rows, images = run.image_embeddings(dataset)
    labels = np.concatenate([np.array(block.labels) for block in dataset.iter_blocks()])[rows]
    named = (images @ classifier(dataset.classnames, dataset.templates, run.embed_text).T).argmax(axis=1)
    counts = np.zeros((len(dataset.classnames),) * 2, np.int64)
    np.add.at(counts, (labels, named), 1)
    return Confusion(list(dataset.classnames), counts.tolist())


def _image(dataset: Dataset, row: int) -> bytes:
    """The image file of a row, as it lies in its tar."""
    number, within = divmod(row, 1024)
    block = next(b for i, b in enumerate(dataset.iter_blocks()) if i == number)
    with open(dataset.sources[block.sources[within]].path, "rb") as file:
        file.seek(block.offsets[within])
        return file.read(block.sizes[within])
