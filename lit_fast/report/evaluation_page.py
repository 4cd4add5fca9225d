"""The evaluation of a run as one HTML page: figures, what is confused with what, and the pictures themselves.

What is shown is drawn from a fixed seed, so that the same run gives the same page.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.images.reader import ReadPicture, picture_reader
from lit_fast.evaluation.evaluate import NAMED, captions_by_language
from lit_fast.evaluation.zeroshot import EmbedText, classifier
from lit_fast.evaluation.zeroshot_set import zero_shot_set
from lit_fast.report.gallery import STYLE, Picture, cards, strip, thumbnail
from lit_fast.report.html import bar, document, section, table

PICTURES = 180  # of a page, with thumbnails of at most 11 kB there: two megabytes
FOUND = 5  # pictures or captions shown per query
_MATRIX = 20  # classes of which the whole confusion matrix is shown
_ENDS = 20  # classes shown at either end of a longer list, and pairs of confused classes
_EXAMPLES = 12  # right pictures of a zero-shot set, and wrong ones
_QUERIES = 8  # captions of a retrieval set, and pictures
_TILE = 8192  # images scored at a time
_LONGEST = 200  # characters of a caption that are shown

_WORDS = {
    "acc1": "first guess right",
    "acc5": "right among the first 5 guesses",
    "mean_per_class_recall": "recall, mean over the classes",
    **{f"image_retrieval_recall@{k}": f"caption to picture, recall@{k}" for k in (1, 5, 10)},
    **{f"text_retrieval_recall@{k}": f"picture to caption, recall@{k}" for k in (1, 5, 10)},
    **{f"acc1_{k}shot": f"{k} image{'s' * (k > 1)} per class" for k in (1, 5, 10, 25)},
}
_FIGURES_NOTE = (
    "The tick on a bar is the chance level of blind guessing. Intervals are over the choice of images"
)
_FULL_NOTE = "With so many datasets on one page there is no room for pictures."
_ABSENT_NOTE = "A box stands for a picture that could not be read from where it was indexed."


def evaluation_page(name: str, about: str, sections: Sequence[str]) -> str:
    """The page of a run; `about` says which weights, `sections` are of the functions below."""
    header = f"<header><h1>{html.escape(name)}</h1><p>{html.escape(about)}</p></header>"
    return document(f"{name}, evaluation", [header, *sections], STYLE + _STYLE)


def remembered(embed_text: EmbedText) -> EmbedText:
    """The same function, which keeps what it returned: the page asks for the texts that were evaluated."""
    known = cache(lambda texts: embed_text(list(texts)))
    return lambda texts: known(tuple(texts))


def zero_shot_sections(
    results: Sequence[dict[str, Any]],
    dataset: Dataset,
    rows: np.ndarray,
    images: np.ndarray,
    embed_text: EmbedText,
    pictures: int = PICTURES,
    **files: Any,
) -> list[str]:
    """Figures, recall per class, confusions, and pictures that were named right and wrong.

    An image with several right classes counts for the one it was given, or for the first if it was given another.

    Args:
      results: of this dataset, as `lit-fast eval` writes them.
      dataset: where its pictures cannot be read, boxes stand for them.
      rows: int64 [n], the rows that have an embedding, rising.
      images: their normalised embeddings, float32 [n, D].
      embed_text: texts to normalised float32 [n, D].
      pictures: the most that may be shown.
      files: class names and so on in place of the dataset's, see `zero_shot_set`.
    """
    asked, read, title = zero_shot_set(dataset, **files), picture_reader(dataset), results[0]["dataset"]
    names = asked.classnames
    pairs = np.isin(asked.row_of, rows)
    counted, first, image_of = np.unique(asked.row_of[pairs], return_index=True, return_inverse=True)
    images, class_of = images[np.searchsorted(rows, counted)], asked.class_of[pairs]
    classes = classifier(names, asked.templates, embed_text)
    tiles = range(0, len(images), _TILE)
    called = np.concatenate([(images[lo : lo + _TILE] @ classes.T).argmax(axis=1) for lo in tiles])
    own, hits = class_of[first], class_of == called[image_of]
    own[image_of[hits]] = class_of[hits]
    order = np.random.default_rng(0).permutation(len(images))
    most = min(_EXAMPLES, pictures // 2)

    def examples(chosen: np.ndarray) -> str:
        shown = []
        for i in chosen[:most].tolist():
            lines = [f"{_short(names[own[i]])} {images[i] @ classes[own[i]]:.3f}"]
            if own[i] != called[i]:
                lines.append(f"called {_short(names[called[i]])} {images[i] @ classes[called[i]]:.3f}")
            source = thumbnail(read(int(counted[i])))
            shown.append(Picture(source, "\n".join(lines), "right" if own[i] == called[i] else "wrong"))
        return strip(shown) + _note_of(shown) if shown or not most else cards([])

    correct = own[order] == called[order]
    return [
        figures_section(f"{title}: zero-shot classification", results),
        section(f"{title}: recall of the classes", *_recalls(names, own, called)),
        section(f"{title}: what is called what", *_confusions(names, own, called)),
        section(f"{title}: named right", examples(order[correct]), _SCORES_NOTE),
        section(f"{title}: named wrong", examples(order[~correct]), _SCORES_NOTE),
    ]


_SCORES_NOTE = "Drawn at random; the numbers are cosines of picture and name."


class _Pool(NamedTuple):
    """The captions of one language and the images that have one: what a query may find."""

    heading: str
    captions: list[str]
    owner: np.ndarray  # int [m], the image of a caption, as a number in `images`
    texts: np.ndarray  # float32 [m, D]
    images: np.ndarray  # float32 [n, D]
    rows: np.ndarray  # int [n]


def retrieval_sections(
    results: Sequence[dict[str, Any]],
    dataset: Dataset,
    rows: np.ndarray,
    images: np.ndarray,
    embed_text: EmbedText,
    pictures: int = PICTURES,
) -> list[str]:
    """Figures, captions with the pictures that they find, and pictures with the captions that they find.

    Arguments as for `zero_shot_sections`. Of several languages, the queries are drawn from each in turn.
    """
    captions, read, title = (
        captions_by_language(dataset, rows),
        picture_reader(dataset),
        results[0]["dataset"],
    )
    pools = []
    for language, own in captions.items():
        with_text, owner = np.unique([image for image, _ in own], return_inverse=True)
        texts = [text for _, text in own]
        heading = f"{language}: " if len(captions) > 1 else ""
        pools.append(_Pool(heading, texts, owner, embed_text(texts), images[with_text], rows[with_text]))
    generator = np.random.default_rng(0)
    pools = [pools[i] for i in generator.permutation(len(pools))]
    # A caption needs the pictures that it finds and perhaps the right one; in the other list a picture needs itself.
    most = min(_QUERIES, pictures // (FOUND + 2))
    searches = [_search(pool, i, read) for pool, i in _queries(pools, most, lambda pool: len(pool.texts))]
    described = [
        _described(pool, i, read) for pool, i in _queries(pools, most, lambda pool: len(pool.images))
    ]
    shown = [picture for _, found in searches for picture in found] + [picture for picture, _ in described]
    items = [f'<li class="described">{strip([picture])}{lines}</li>' for picture, lines in described]
    return [
        figures_section(f"{title}: retrieval", results),
        section(
            f"{title}: pictures found by captions",
            (cards([(heading, strip(found)) for heading, found in searches]) if searches else "")
            + _note_of(shown),
            f"Captions drawn at random with the {FOUND} nearest pictures, nearest first, and their cosines; the "
            f"right one is framed. Where it is not among the {FOUND} it stands last, with the place it came in.",
        ),
        section(
            f"{title}: captions found by pictures",
            f'<ul class="cards">{"".join(items)}</ul>' if items else _note_of([]),
            "Pictures drawn at random with the nearest captions and their cosines; those written for the picture are "
            "green. Where none is among them, the nearest of them stands last, with the place it came in.",
        ),
    ]


def _queries(pools: Sequence[_Pool], most: int, size: Callable[[_Pool], int]) -> Iterator[tuple[_Pool, int]]:
    """Queries drawn from each pool in turn, `most` in all if there are so many."""
    generator = np.random.default_rng(0)  # one for all: languages of the same images draw different ones
    drawn = [generator.permutation(size(pool))[:most].tolist() for pool in pools]
    turns = ((pool, i) for turn in zip_longest(*drawn) for pool, i in zip(pools, turn, strict=True))
    return islice(((pool, i) for pool, i in turns if i is not None), most)


def _search(pool: _Pool, query: int, read: ReadPicture) -> tuple[str, list[Picture]]:
    """A caption and the pictures that it finds."""
    scores, right = pool.images @ pool.texts[query], int(pool.owner[query])
    order = np.argsort(-scores, kind="stable")
    rank = int(np.flatnonzero(order == right)[0])
    places = [*range(min(FOUND, len(order))), *([rank] if rank >= FOUND else [])]
    found = []
    for place in places:
        i = order[place]
        text = f"{scores[i]:.3f}" if place < FOUND else f"no. {place + 1:,}, {scores[i]:.3f}"
        found.append(Picture(thumbnail(read(int(pool.rows[i]))), text, "right" if i == right else ""))
    return pool.heading + _short(pool.captions[query]), found


def _described(pool: _Pool, query: int, read: ReadPicture) -> tuple[Picture, str]:
    """A picture and, as a list, the captions that it finds."""
    scores = pool.texts @ pool.images[query]
    order = np.argsort(-scores, kind="stable")
    rank = int(np.flatnonzero(pool.owner[order] == query)[0])
    places = [*range(min(FOUND, len(order))), *([rank] if rank >= FOUND else [])]
    items = []
    for place in places:
        i = order[place]
        text = pool.heading + _short(pool.captions[i])
        text = text if place < FOUND else f"no. {place + 1:,}: {text}"
        kind = ' class="own"' if pool.owner[i] == query else ""
        items.append(f'<li{kind}><span class="note">{scores[i]:.3f}</span> {html.escape(text)}</li>')
    return Picture(thumbnail(read(int(pool.rows[query])))), f"<ul>{''.join(items)}</ul>"


def figures_section(title: str, results: Sequence[dict[str, Any]]) -> str:
    """The figures of some results, with intervals and chance levels."""
    rows = []
    seeded = any("seeds" in result for result in results)
    for result in results:
        if len(results) > 1:
            heading = f'<th colspan="6" scope="rowgroup">{html.escape(result["language"] or result["dataset"])}</th>'
            rows.append(f"<tr>{heading}</tr>")
        for name, value in result["metrics"].items():
            chance = result["chance"][name]
            cells = [
                _percent(value),
                "{:.1f} to {:.1f} %".format(*(100 * end for end in result["interval_95"][name])),
                _percent(chance),
            ]
            if seeded:
                cells.insert(1, ", ".join(f"{100 * v:.1f}" for v in result["seeds"][name]))
            numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
            label = f'<td title="{html.escape(name, quote=True)}">{html.escape(_WORDS.get(name, name))}</td>'
            rows.append(f'<tr>{label}{numbers}<td class="bars">{bar(value, chance)}</td></tr>')
    headings = ["reached", *(["draws"] if seeded else []), "95 % interval", "chance"]
    head = "".join(f'<th class="number">{heading}</th>' for heading in headings)
    counted = ("images", "texts", "classes", "templates", "train_images")
    told = [f"{results[-1][k]:,} {k.replace('_', ' ')}" for k in counted if k in results[-1]]
    told += [f"{k.replace('_', ' ')} {results[-1][k]}" for k in NAMED if k in results[-1]]
    over = " and over the draws of those learnt from" if seeded else ""
    return section(
        title,
        f'<div class="scroll"><table class="figures"><thead><tr><th>figure</th>{head}<th class="bars"></th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>",
        f"{', '.join(told)}. {_FIGURES_NOTE}{over}, not over trainings.",
    )


def few_shot_section(result: dict[str, Any]) -> str:
    """The figures of a few-shot evaluation."""
    return figures_section(f"{result['dataset']}: few-shot from {result['train_dataset']}", [result])


def _recalls(classnames: Sequence[str], own: np.ndarray, called: np.ndarray) -> tuple[str, str]:
    """A table of the classes by rising recall, and a note on it."""
    count = len(classnames)
    seen = np.bincount(own, minlength=count)
    hits = np.bincount(own[own == called], minlength=count)
    present = np.nonzero(seen)[0]
    order = present[np.argsort(hits[present] / seen[present], kind="stable")]
    shown, note = order.tolist(), "Share of the images of a class that got its name, worst first."
    if len(order) > 2 * _ENDS:
        shown = [*order[:_ENDS].tolist(), None, *order[-_ENDS:].tolist()]
        note = f"Share of the images of a class that got its name: the {_ENDS} worst and the {_ENDS} best."
    rows = []
    for k in shown:
        if k is None:
            rows.append('<tr><td colspan="4">...</td></tr>')
            continue
        share = hits[k] / seen[k]
        rows.append(
            f'<tr><td>{_name(classnames[k])}</td><td class="number">{seen[k]:,}</td><td class="number">'
            f'{_percent(share)}</td><td class="bars">{bar(share)}</td></tr>'
        )
    head = '<th>class</th><th class="number">images</th><th class="number">recall</th><th class="bars"></th>'
    return _table(head, rows), note


def _confusions(classnames: Sequence[str], own: np.ndarray, called: np.ndarray) -> tuple[str, str]:
    """The confusion matrix, of many classes the pairs that are confused most, and a note on it."""
    seen = np.bincount(own, minlength=len(classnames))
    if len(classnames) <= _MATRIX:
        counts = np.zeros((len(classnames),) * 2, np.int64)
        np.add.at(counts, (own, called), 1)
        return _matrix(classnames, counts), "Rows: what is on the picture; columns: what it was called."
    wrong = own != called
    pairs, counts = np.unique(np.stack([own, called])[:, wrong], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_ENDS]
    rows = [
        (_short(classnames[k]), _short(classnames[other]), f"{counts[i]:,}", _percent(counts[i] / seen[k]))
        for i in order
        for k, other in [pairs[:, i]]
    ]
    header = ("on the picture", "called", "times", "of its images")
    return table(header, rows), f"The {_ENDS} pairs that are confused most."


def _matrix(classnames: Sequence[str], counts: np.ndarray) -> str:
    rows = []
    for k, name in enumerate(classnames):
        cells = []
        for other in range(len(classnames)):
            share = counts[k, other] / max(1, counts[k].sum())
            colour = "var(--good)" if k == other else "var(--bad)"
            shade = f' style="background:color-mix(in srgb,{colour} {70 * share:.0f}%,transparent)"'
            tip = html.escape(f"{name}, called {classnames[other]}", quote=True)
            text = f"{counts[k, other]:,}" if counts[k, other] else ""
            cells.append(f'<td class="number" title="{tip}"{shade if share else ""}>{text}</td>')
        rows.append(f"<tr><td>{k + 1} {_name(name)}</td>{''.join(cells)}</tr>")
    head = "<th></th>" + "".join(
        f'<th class="number" title="{html.escape(name, quote=True)}">{k + 1}</th>'
        for k, name in enumerate(classnames)
    )
    return _table(head, rows, "figures matrix")


def _table(head: str, rows: Sequence[str], kind: str = "figures") -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _note_of(shown: Sequence[Picture]) -> str:
    note = _FULL_NOTE if not shown else _ABSENT_NOTE if any(p.source is None for p in shown) else ""
    return f'<p class="note">{note}</p>' if note else ""


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _name(text: str) -> str:
    return html.escape(_short(text))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


_STYLE = """
.matrix { width:auto } .matrix .number { padding:.32rem .5rem; min-width:2.6rem }
.described { display:flex; gap:1rem } .described figure img { width:128px }
.described ul { list-style:none; margin:0; padding:0 } .described .own { color:var(--good); font-weight:600 }
.described .note { font-variant-numeric:tabular-nums }
@media (max-width:480px) { .described figure { width:96px } }
@media (max-width:640px) { .figures { font-size:.84rem } .figures th,.figures td { padding-right:.5rem } }
"""
