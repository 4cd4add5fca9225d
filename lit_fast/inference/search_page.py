"""What a search has found, for the terminal, for a file and as a page with the pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_fast.data.images.reader import ReadPicture
from lit_fast.inference.search import Hit
from lit_fast.report.gallery import STYLE, Picture, strip, thumbnail
from lit_fast.report.html import document, section

_MOST_SHOWN = 100  # pictures of a query on the page
_MOST_CAPTION = 500  # characters


@dataclass(frozen=True)
class Answer:
    """A query and the rows that were found for it, the best first."""

    query: str  # the text, or the image's file
    kind: str  # "text" or "image"
    hits: tuple[Hit, ...]
    probabilities: tuple[float, ...] = ()  # one per hit, where the model has one


def format_answers(answers: Sequence[Answer], columns: int) -> str:
    """A table per query: rank, cosine, probability, row, key and the first caption, cut at `columns`."""
    return "\n\n".join(_table(answer, columns) for answer in answers)


def _table(answer: Answer, columns: int) -> str:
    header = ["rank", "cosine", *(["probability"] if answer.probabilities else []), "row", "key", "caption"]
    table = [header]
    for i, hit in enumerate(answer.hits):
        probability = [f"{100 * answer.probabilities[i]:.3g} %"] if answer.probabilities else []
        table.append(
            [f"{i + 1}", f"{hit.cosine:.4f}", *probability, f"{hit.row}", _plain(hit.key)[:40], _first(hit)]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = [_heading(answer)]
    for line in table:
        cells = [
            cell.ljust(width) if column >= len(header) - 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells)[:columns].rstrip())
    return "\n".join(lines)


def _heading(answer: Answer) -> str:
    return f"{'image ' * (answer.kind == 'image')}{_plain(answer.query)}"


def _first(hit: Hit) -> str:
    return _plain(hit.captions[0][:_MOST_CAPTION]) if hit.captions else ""


def _plain(text: str) -> str:
    """In one line, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """An object per query."""
    return [
        {
            "query": answer.query,
            "kind": answer.kind,
            "results": [
                {"rank": i + 1, "row": hit.row, "key": hit.key, "cosine": hit.cosine}
                | ({"probability": answer.probabilities[i]} if answer.probabilities else {})
                | {"captions": list(hit.captions)}
                for i, hit in enumerate(answer.hits)
            ],
        }
        for answer in answers
    ]


def search_page(title: str, note: str, answers: Sequence[Answer], read: ReadPicture) -> str:
    """A page with the pictures that were found; `read` gives the image file of a row."""
    parts = [f"<header><h1>{html.escape(title)}</h1><p>{html.escape(note)}</p></header>"]
    for answer in answers:
        pictures = []
        if answer.kind == "image":
            pictures.append(Picture(thumbnail(Path(answer.query).read_bytes()), "the query", "right"))
        for i, hit in enumerate(answer.hits[:_MOST_SHOWN]):
            lines = [f"{i + 1}. cosine {hit.cosine:.3f}", hit.key, _first(hit)]
            if answer.probabilities:
                lines.insert(1, f"probability {100 * answer.probabilities[i]:.2g}\N{NO-BREAK SPACE}%")
            text = "\n".join(line for line in lines if line)
            pictures.append(Picture(thumbnail(read(hit.row)), text))
        more = len(answer.hits) - _MOST_SHOWN
        rest = f"The first {_MOST_SHOWN} of {len(answer.hits):,}." if more > 0 else ""
        parts.append(section(_heading(answer), strip(pictures), rest))
    return document(title, parts, STYLE)
