"""The evaluation of a run as one HTML page: figures, confusions and pictures.

Examples are drawn from a fixed seed, so the same run gives the same page.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from lit_fast.data.dataset import Dataset
from lit_fast.data.images.reader import ImageReader
from lit_fast.evaluation.evaluate import captions_by_language
from lit_fast.evaluation.zeroshot import EmbedText, classifier
from lit_fast.evaluation.zeroshot_set import zero_shot_set
from lit_fast.report.figures import figures_section
from lit_fast.report.gallery import SHOWN, Figure, nearest, nearest_images, thumbnail
from lit_fast.report.page import Cell, Table, fragment, percent, render

MAX_PICTURES = 180  # per page, at most 11 kB each: two megabytes
_MATRIX = 20  # classes up to which the whole confusion matrix is shown
_ENDS = 20  # classes at either end of a longer list, and pairs of confused classes
_EXAMPLES = 12  # right pictures of a zero-shot set, and wrong ones
_QUERIES = 8  # captions of a retrieval set, and pictures
_TILE = 8192  # images scored at a time
_MAX_TEXT = 200  # characters of a caption or class name


class _Pool(NamedTuple):
    """The captions of one language and the images that have one: the candidates of a query."""

    prefix: str  # the language, where there are several
    captions: list[str]
    owner: np.ndarray  # int64 [m], the image of a caption, as an index of `images`
    texts: np.ndarray  # float32 [m, D]
    images: np.ndarray  # float32 [n, D]
    rows: np.ndarray  # int64 [n]


def evaluation_page(name: str, about: str, sections: Sequence[Markup]) -> str:
    """Render the page of a run.

    Args:
      name: of the run.
      about: which weights were evaluated.
      sections: as returned by the functions below.
    """
    return render("evaluation.html", name=name, about=about, sections=sections)


def memoized(embed_text: EmbedText) -> EmbedText:
    """Cache `embed_text`: the page asks for the texts that the evaluation has embedded already."""
    cached = cache(lambda texts: embed_text(list(texts)))
    return lambda texts: cached(tuple(texts))


def zero_shot_section(
    results: Sequence[dict[str, Any]],
    dataset: Dataset,
    rows: np.ndarray,
    images: np.ndarray,
    embed_text: EmbedText,
    max_pictures: int = MAX_PICTURES,
    **files: Any,
) -> Markup:
    """Render figures, recall per class, confusions, and pictures that were named right and wrong.

    An image with several right classes counts for the one predicted, or for the first if another was predicted.

    Args:
      results: of this dataset, as `lit-fast eval` writes them.
      dataset: boxes replace pictures that cannot be read from its sources.
      rows: int64 [n], the rows that have an embedding, increasing.
      images: their normalized embeddings, float32 [n, D].
      embed_text: texts to normalized float32 [n, D].
      max_pictures: shown at most.
      files: class names and so on in place of the dataset's, see `zero_shot_set`.
    """
    task, read = zero_shot_set(dataset, **files), ImageReader(dataset).read_or_none
    names = task.classnames
    pairs = np.isin(task.row_of, rows)
    labelled, first, image_of = np.unique(task.row_of[pairs], return_index=True, return_inverse=True)
    images, class_of = images[np.searchsorted(rows, labelled)], task.class_of[pairs]
    classes = classifier(names, task.templates, embed_text)
    tiles = range(0, len(images), _TILE)
    predicted = np.concatenate([(images[lo : lo + _TILE] @ classes.T).argmax(axis=1) for lo in tiles])
    labels, hits = class_of[first], class_of == predicted[image_of]
    labels[image_of[hits]] = class_of[hits]
    order = np.random.default_rng(0).permutation(len(images))
    most = min(_EXAMPLES, max_pictures // 2)

    def figure(i: int) -> Figure:
        lines = [f"{_shorten(names[labels[i]])} {images[i] @ classes[labels[i]]:.3f}"]
        right = labels[i] == predicted[i]
        if not right:
            lines.append(f"called {_shorten(names[predicted[i]])} {images[i] @ classes[predicted[i]]:.3f}")
        return Figure(thumbnail(read(int(labelled[i]))), "\n".join(lines), "right" if right else "wrong")

    def examples(chosen: np.ndarray) -> tuple[list[Figure], str]:
        figures = [figure(i) for i in chosen[:most].tolist()]
        return figures, _pictures_note(figures) if figures or not most else "There is none."

    correct = labels[order] == predicted[order]
    title = results[0]["dataset"]
    return figures_section(f"{title}: zero-shot classification", results) + fragment(
        "zero_shot.html",
        name=title,
        recalls=_recalls(names, labels, predicted),
        confusions=_confusions(names, labels, predicted),
        examples={"named right": examples(order[correct]), "named wrong": examples(order[~correct])},
    )


def retrieval_section(
    results: Sequence[dict[str, Any]],
    dataset: Dataset,
    rows: np.ndarray,
    images: np.ndarray,
    embed_text: EmbedText,
    max_pictures: int = MAX_PICTURES,
) -> Markup:
    """Render figures, captions with their nearest pictures, and pictures with their nearest captions.

    Arguments as for `zero_shot_section`. Of several languages, the queries alternate between them.
    """
    captions, read = captions_by_language(dataset, rows), ImageReader(dataset).read_or_none
    pools = []
    for language, pairs in captions.items():
        captioned, owner = np.unique([image for image, _ in pairs], return_inverse=True)
        texts = [text for _, text in pairs]
        prefix = f"{language}: " if len(captions) > 1 else ""
        pools.append(_Pool(prefix, texts, owner, embed_text(texts), images[captioned], rows[captioned]))
    pools = [pools[i] for i in np.random.default_rng(0).permutation(len(pools))]
    # A caption shows its nearest pictures and perhaps the right one; in the other list a picture shows itself.
    most = min(_QUERIES, max_pictures // (SHOWN + 2))
    by_caption = [
        (
            pool.prefix + _shorten(pool.captions[i]),
            nearest_images(pool.images @ pool.texts[i], int(pool.owner[i]), pool.rows, read),
        )
        for pool, i in _queries(pools, [len(pool.texts) for pool in pools], most)
    ]
    by_picture = [
        (Figure(thumbnail(read(int(pool.rows[i])))), _nearest_captions(pool, i))
        for pool, i in _queries(pools, [len(pool.images) for pool in pools], most)
    ]
    figures = [f for _, found in by_caption for f in found] + [f for f, _ in by_picture]
    title = results[0]["dataset"]
    return figures_section(f"{title}: retrieval", results) + fragment(
        "retrieval.html",
        name=title,
        shown=SHOWN,
        by_caption=by_caption,
        by_picture=by_picture,
        note=_pictures_note(figures),
    )


def few_shot_section(result: dict[str, Any]) -> Markup:
    """Render the figures of a few-shot evaluation."""
    return figures_section(f"{result['dataset']}: few-shot from {result['train_dataset']}", [result])


def _queries(pools: Sequence[_Pool], sizes: Sequence[int], most: int) -> list[tuple[_Pool, int]]:
    """Draw up to `most` queries, alternating between the pools."""
    generator = np.random.default_rng(0)  # one for all: languages of the same images draw different ones
    drawn = [generator.permutation(size)[:most].tolist() for size in sizes]
    queries = [(pool, i) for numbers in zip_longest(*drawn) for pool, i in zip(pools, numbers, strict=True)]
    return [(pool, i) for pool, i in queries if i is not None][:most]


def _nearest_captions(pool: _Pool, image: int) -> list[tuple[str, str, bool]]:
    """Return (caption, cosine, whether it is of the image) of the nearest captions of an image."""
    scores, relevant = pool.texts @ pool.images[image], pool.owner == image
    captions = []
    for rank, i in nearest(scores, relevant):
        text = pool.prefix + _shorten(pool.captions[i])
        text = text if rank < SHOWN else f"no. {rank + 1:,}: {text}"
        captions.append((text, f"{scores[i]:.3f}", bool(relevant[i])))
    return captions


def _recalls(classnames: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> tuple[Table, str]:
    """Return a table of the classes by increasing recall, and a note."""
    images = np.bincount(labels, minlength=len(classnames))
    right = np.bincount(labels[labels == predicted], minlength=len(classnames))
    present = np.flatnonzero(images)
    order = present[np.argsort(right[present] / images[present], kind="stable")].tolist()

    def row(k: int) -> tuple[str | Cell, ...]:
        share = float(right[k] / images[k])
        return (
            _shorten(classnames[k]),
            f"{images[k]:,}",
            percent(share),
            Cell(classes="bars", bar=(share, None)),
        )

    header = ("class", "images", "recall", Cell(classes="bars"))
    note = "Share of the images of a class that got its name"
    if len(order) <= 2 * _ENDS:
        return Table(header, [row(k) for k in order]), f"{note}, worst first."
    ends = [[row(k) for k in part] for part in (order[:_ENDS], order[-_ENDS:])]
    return Table(header, [*ends[0], ("...",), *ends[1]]), f"{note}: the {_ENDS} worst and the {_ENDS} best."


def _confusions(classnames: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> tuple[Table, str]:
    """Return the confusion matrix, or of many classes the most frequent confusions, and a note."""
    if len(classnames) <= _MATRIX:
        note = "Rows: the class of the picture; columns: the predicted class."
        return _matrix(classnames, labels, predicted), note
    images = np.bincount(labels, minlength=len(classnames))
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels, predicted])[:, wrong], axis=1, return_counts=True)
    rows = []
    for i in np.argsort(-counts, kind="stable")[:_ENDS].tolist():
        label, other = pairs[:, i].tolist()
        share = percent(counts[i] / images[label])
        rows.append((_shorten(classnames[label]), _shorten(classnames[other]), f"{counts[i]:,}", share))
    return Table(("on the picture", "called", "times", "of its images"), rows), (
        f"The {_ENDS} pairs that are confused most."
    )


def _matrix(classnames: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> Table:
    counts = np.zeros((len(classnames),) * 2, np.int64)
    np.add.at(counts, (labels, predicted), 1)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))

    def cell(k: int, other: int) -> Cell:
        tooltip = f"{classnames[k]}, called {classnames[other]}"
        if not counts[k, other]:
            return Cell("", "number", tooltip)
        colour = f"var(--{'good' if k == other else 'bad'}-cell) {70 * shares[k, other]:.0f}%"
        style = f"background:color-mix(in srgb,{colour},transparent)"
        return Cell(f"{counts[k, other]:,}", "number", tooltip, style)

    rows: list[list[str | Cell]] = []
    for k, name in enumerate(classnames):
        rows.append([f"{k + 1} {_shorten(name)}", *(cell(k, other) for other in range(len(classnames)))])
    header: list[str | Cell] = ["", *(Cell(f"{k + 1}", "number", name) for k, name in enumerate(classnames))]
    return Table(header, rows, "matrix")


def _pictures_note(figures: Sequence[Figure]) -> str:
    if not figures:
        return "With so many datasets on one page there is no room for pictures."
    if any(figure.source is None for figure in figures):
        return "A box replaces a picture that could not be read from its source."
    return ""


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
