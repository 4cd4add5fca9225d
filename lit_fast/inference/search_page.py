"""Format the rows found by a search as a table, as JSON and as an HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_fast.inference.search import Hit
from lit_fast.inference.searcher import Answer
from lit_fast.report.gallery import Figure, ReadImage, thumbnail
from lit_fast.report.page import render
from lit_fast.storage.files import read_bytes
from lit_fast.utils.format import format_table

_MAX_PICTURES = 100  # per query on the page
_MAX_CAPTION = 500  # characters
_MAX_KEY = 40  # characters in the table


def format_answers(answers: Sequence[Answer], width: int) -> str:
    """Return a table per query, cut at `width` characters."""
    return "\n\n".join(f"{_heading(answer)}\n{_table(answer, width)}" for answer in answers)


def as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return an object per query."""
    return [
        {
            "query": answer.query,
            "kind": answer.kind,
            "results": [
                {"rank": i + 1, "row": hit.row, "key": hit.key, "source": hit.source, "cosine": hit.cosine}
                | ({"probability": answer.probabilities[i]} if answer.probabilities else {})
                | {"captions": list(hit.captions)}
                for i, hit in enumerate(answer.hits)
            ],
        }
        for answer in answers
    ]


def search_page(title: str, note: str, answers: Sequence[Answer], read: ReadImage) -> str:
    """Render a page with the pictures that were found.

    `read` returns the image file of a row.
    """
    sections = [section(answer, read, read_bytes) for answer in answers]
    return render("search.html", title=title, note=note, sections=sections)


def section(
    answer: Answer, read: ReadImage, read_query: Callable[[str], bytes], link: str = ""
) -> tuple[str, str, list[Figure]]:
    """Return the heading, a note and the pictures of an answer.

    Args:
      answer: a query and its hits.
      read: returns the image file of a row.
      read_query: returns the image file of a query, by its name.
      link: target of a picture's link, before the number of its row; "": no links.
    """
    figures = []
    if answer.kind == "image":
        figures.append(Figure(thumbnail(read_query(answer.query)), "the query", "right"))
    for i, hit in enumerate(answer.hits[:_MAX_PICTURES]):
        lines = [
            f"{i + 1}. cosine {hit.cosine:.3f}",
            _printable(hit.key),
            _printable(hit.source),
            _first_caption(hit),
        ]
        if answer.probabilities:
            lines.insert(1, f"probability {100 * answer.probabilities[i]:.2g}\N{NO-BREAK SPACE}%")
        text = "\n".join(line for line in lines if line)
        figures.append(Figure(thumbnail(read(hit.row)), text, link=link and f"{link}{hit.row}"))
    count = len(answer.hits)
    rest = f"The first {_MAX_PICTURES} of {count:,}." if count > _MAX_PICTURES else ""
    return _heading(answer), rest, figures


def _table(answer: Answer, width: int) -> str:
    probability = ["probability"] if answer.probabilities else []
    sources = ["source"] if any(hit.source for hit in answer.hits) else []
    rows = [["rank", "cosine", *probability, "row", "key", *sources, "caption"]]
    for i, hit in enumerate(answer.hits):
        probability = [f"{100 * answer.probabilities[i]:.3g} %"] if answer.probabilities else []
        key = _printable(hit.key)[:_MAX_KEY]
        source = [_printable(hit.source)] if sources else []
        texts = [f"{hit.row}", key, *source, _first_caption(hit)]
        rows.append([f"{i + 1}", f"{hit.cosine:.4f}", *probability, *texts])
    columns = len(rows[0])
    return format_table(rows, left=tuple(range(columns - 2 - bool(sources), columns)), width=width)


def _heading(answer: Answer) -> str:
    return f"{'image ' * (answer.kind == 'image')}{_printable(answer.query)}"


def _first_caption(hit: Hit) -> str:
    return _printable(hit.captions[0][:_MAX_CAPTION]) if hit.captions else ""


def _printable(text: str) -> str:
    """Return the text in one line without control characters; joiners, which emoji consist of, are kept."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "?" for c in " ".join(text.split()))
