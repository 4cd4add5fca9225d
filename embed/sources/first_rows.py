"""Look at the first rows of a table: are the chosen columns what they seem?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lit_fast.embed.sources.columns import caption_texts, parse_label, parse_list, value_of
from lit_fast.embed.sources.interface import Columns, Guess, Note
from lit_fast.errors import UserError

FIRST_ROWS = 100

_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)*")
_UNLIKELY = {
    "numbers": _NUMBER,
    "WordNet ids": re.compile(r"n\d{8}"),
    "lists that cannot be read": re.compile(r"\[.*\]", re.DOTALL),
    "URLs": re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://\S+"),
    "paths": re.compile(r"\S*[/\\]\S*|\S+\.(?:jpe?g|png|webp|gif|bmp|txt|json)", re.IGNORECASE),
}


def refine_columns(
    where: str, options: Columns, columns: Columns, rows: Sequence[Mapping[str, Any]]
) -> Columns:
    """Return the columns without a guessed label that is none; decide whether captions are lists written as text.

    Raises:
      UserError: without captions, the labels are words.
    """
    labels = _labels(columns, rows)
    if labels and not any(number >= 0 for number, _ in labels.values()):
        if columns.captions and not options.label:
            columns = replace(columns, label="")
        elif not columns.captions and not any(_NUMBER.fullmatch(label) for label in labels):
            raise UserError(
                f"{where}: label {columns.label} has {_shown(labels)}, where a class number from 0 on is needed; "
                "number the classes, and list their names in classnames.txt beside the file"
            )
    texts = _texts(columns, rows)
    return replace(columns, lists=bool(texts) and all(parse_list(text) is not None for text in texts))


def describe_refinement(
    where: str, before: Columns, columns: Columns, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Guess | Note]:
    """Yield the decisions of `refine_columns`, and a doubt about captions that seem to be something else."""
    if before.label and not columns.label:
        yield Guess(f"label = none ({before.label} has {_shown(_labels(before, rows))})")
    if columns.lists:
        yield Guess("captions are a list in one cell")
        return
    texts = [text.strip() for text in _texts(columns, rows)]
    for kind, pattern in _UNLIKELY.items():
        if texts and all(pattern.fullmatch(text) for text in texts):
            names = ", ".join(name for _, name in columns.captions)
            yield Note(
                f"{where}: the captions in {names} look like {kind} ({texts[0][:80]!a}); see --captions"
            )
            return


def _texts(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the captions of the rows that are text."""
    plain = replace(columns, lists=False)
    found = (caption_texts(value_of(row, name)) for row in rows for _, name in plain.captions)
    return [text for texts in found for text, _ in texts if text.strip()]


def _labels(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Return the labels as text, and what `parse_label` says of each; none for empty ones."""
    if not columns.label:
        return {}
    values = [value_of(row, columns.label) for row in rows]
    return {str(value): parse_label(value) for value in values if value is not None and value != ""}


def _shown(labels: Mapping[str, object]) -> str:
    return ascii(next(iter(labels))[:80])
