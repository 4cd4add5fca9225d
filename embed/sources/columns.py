"""The columns, JSON keys or features of a source: choose them and parse a row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lit_fast.embed.sources.interface import MAX_CAPTION, Columns, Guess, Sample, Skipped, is_utf8
from lit_fast.errors import UserError

# Tried in this order, without regard to case.
CAPTIONS = ("captions", "caption", "title", "text", "txt", "sentences", "raw", "alt_text", "captions/text")
IMAGE = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image/encoded")
PATHS = (
    "filepath",
    "file_path",
    "image_path",
    "path",
    "file_name",
    "filename",
    "file",
    "image path",
    "image/key",
)
URLS = ("url", "image_url")
KEY = ("key", "__key__", "uid")
LABEL = ("label", "cls", "class_id")

_CANDIDATES = {
    "image": (*IMAGE, *PATHS),
    "captions": CAPTIONS,
    "key": KEY,
    "label": LABEL,
    "language": (),
}

NO_TEXT = "no caption and no label"
NO_KEY = "no key"


class ParsedRow(NamedTuple):
    """The captions and the label of one row."""

    captions: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # empty, or one per caption
    label: int = -1  # -1 = none
    problem: str = ""  # why this cannot be a row

    def item(
        self, key: str, offset: int, size: int, problem: str = "", name: str = "", check: int = 0
    ) -> Sample | Skipped:
        """Return the row of an image; where the image, the key or the row has a problem, a skipped entry.

        Args:
          problem: that of the image or the key.
          name: the name of a skipped entry without a key.
          check: `lit_fast.data.images.fingerprint.image_checksum`; 0: unknown.
        """
        if problem := problem or self.problem:
            return Skipped(key or name, problem)
        return Sample(key, offset, size, self.captions, self.label, self.languages, check)


def choose_columns(options: Columns, columns: Collection[str], where: str, *, image: bool = True) -> Columns:
    """Return the columns that `options` name; guess the others.

    Raises:
      UserError: a name is not among `columns`; or, with `image`, there is no column for the image, or neither one for
        captions nor one for labels.
    """
    for name in options.names():
        require_column(name, columns, where)
    chosen = options.image
    if image:
        require_column(chosen, columns, where)
        chosen = chosen or guess_column((*IMAGE, *PATHS), columns)
        if not chosen and (url := guess_column(URLS, columns)):
            raise UserError(
                f"{where} has only URLs ({url}); download the images with img2dataset, then index its tars"
            )
        if not chosen:
            raise UserError(
                f"{where} has no column for the image among {some(columns)}; name it with --image"
            )
    captions = options.captions
    if not captions and "captions" not in options.declined and (found := guess_column(CAPTIONS, columns)):
        captions = (("", found),)
    key = options.key or ("" if "key" in options.declined else guess_column(KEY, columns))
    label = options.label or ("" if "label" in options.declined else guess_column(LABEL, columns))
    if image and not captions and not label:
        raise UserError(
            f"{where} has no column for captions or labels among {some(columns)}; name it with --captions or --label"
        )
    return replace(options, captions=captions, image=chosen, key=key, label=label)


def find_guess(options: Columns, columns: Columns, names: Collection[str]) -> Iterator[Guess]:
    """Yield the `Guess` of a source: the `columns` that `options` do not name; none if they name all.

    Args:
      options: those of the command.
      columns: what was chosen.
      names: all columns of the source; those that could have the same role are shown, too.
    """
    taken = {columns.image.partition(".")[0], columns.image, *columns.names()}
    guesses = []
    for role, candidates in _CANDIDATES.items():
        value = getattr(columns, role)
        if not value or getattr(options, role):
            continue
        shown = [name for _, name in value] if role == "captions" else [value]
        others = [name for name in names if name.lower() in candidates and name not in taken]
        also = f" (also: {some(others)})" if others else ""
        guesses.append(f"{role} = {some(shown)}{also}")
    if guesses:
        yield Guess(", ".join(guesses))


def require_column(name: str, columns: Collection[str], where: str) -> None:
    """Raise UserError if a name is not among `columns`; list these, nearest first."""
    if name and name not in columns:
        near = difflib.get_close_matches(name, list(columns), n=len(columns) or 1, cutoff=0.0)
        raise UserError(f"{where} has no {name!r}; it has {some(near)}")


def guess_column(candidates: Collection[str], columns: Collection[str]) -> str:
    """Return the first candidate that is a column in any case, "" if none is."""
    lowered = {column.lower(): column for column in reversed(list(columns))}
    return next((lowered[c] for c in candidates if c in lowered), "")


def some(names: Collection[str]) -> str:
    """Return up to twenty names as text for a message."""
    shown = [name if name.isprintable() else ascii(name) for name in list(names)[:20]]
    return ", ".join(shown) + (", ..." if len(names) > 20 else "") if shown else "nothing"


def parse_row(values: Mapping[str, Any], columns: Columns) -> ParsedRow:
    """Parse captions, languages and label of one row.

    A caption may be a string, bytes, a list of them, or objects with `raw`, `caption` or `text`. Empty captions are
    dropped; repeated ones count, as in CLIP_benchmark.
    """
    label, problem = _parse_label(values.get(columns.label)) if columns.label else (-1, "")
    language_values = values.get(columns.language) if columns.language else None
    found: list[tuple[str, str]] = []  # caption, language
    for language, column in columns.captions:
        texts = _strings(values.get(column))
        if columns.language and not language:
            languages = _languages(language_values, len(texts))
        else:
            languages = [language] * len(texts)
        for text, code in zip(texts, languages, strict=True):
            if text is None or not is_utf8(text) or not is_utf8(code):
                return ParsedRow(problem="caption is not UTF-8")
            if len(text) > MAX_CAPTION:
                return ParsedRow(problem="caption above 1 MiB")
            if text.strip():
                found.append((text.strip(), code))
    if problem:
        return ParsedRow(problem=problem)
    if not found and label < 0:
        return ParsedRow(problem=NO_TEXT)
    codes = tuple(code for _, code in found)
    return ParsedRow(tuple(text for text, _ in found), codes if any(codes) else (), label)


def parse_key(value: Any) -> tuple[str, str]:
    """Return the key of a row, and why it cannot be one ("" = it can)."""
    value = _single(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value or len(value) > 4096:
        return "", NO_KEY
    return (value, "") if is_utf8(value) else (value, "key is not UTF-8")


def _parse_label(value: Any) -> tuple[int, str]:
    """Return a class number, -1 for none, and the problem with it."""
    value = _single(value)
    if value is None or value == "" or value != value:  # pandas writes a column with gaps as floats
        return -1, ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes | str):
        text = value.strip() if isinstance(value, bytes) else value.strip().encode("utf-8", "replace")
        value = int(text) if re.fullmatch(rb"[0-9]{1,9}", text) else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1_000_000_000:
        return -1, "label is not a number from 0 on"
    return value, ""


def _strings(value: Any) -> list[str | None]:
    """Return the texts in a value, None for one that is not UTF-8."""
    found: list[str | None] = []
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and isinstance(value.get("caption"), list):  # Crossmodal-3600
        parts = value["caption"]
    for part in parts:
        if isinstance(part, dict):
            part = next((part[n] for n in ("raw", "caption", "text") if isinstance(part.get(n), str)), None)
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, bytes):
            try:
                found.append(part.decode())
            except UnicodeDecodeError:
                found.append(None)
    return found


def _languages(value: Any, count: int) -> list[str]:
    """Return `count` languages from one for all captions or one for each; "" = unknown."""
    given = [text or "" for text in _strings(value)]
    if len(given) == count:
        return given
    return given * count if len(given) == 1 else [""] * count


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
