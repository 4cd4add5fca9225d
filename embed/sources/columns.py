"""The columns, JSON keys or features of a source: choose them and parse a row."""

from __future__ import annotations

import ast
import difflib
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

from lit_fast.embed.sources.interface import (
    MAX_CAPTION,
    OTHER_SPLIT,
    Columns,
    Guess,
    Sample,
    Skipped,
    is_utf8,
)
from lit_fast.errors import UserError

# Tried in this order, without regard to case.
CAPTIONS = (
    "captions",
    "caption",
    "title",
    "text",
    "txt",
    "sentences",
    "raw",
    "alt_text",
    "captions/text",
    "sentence",
    "comment",
    "description",
    "alt",
    "caption_str",
)
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
    "image_name",
    "image_file",
    "image_filename",
    "img_path",
)
URLS = ("url", "image_url")
KEY = ("key", "__key__", "uid")
LABEL = ("label", "cls", "class_id", "class")

_CANDIDATES = {
    "image": (*IMAGE, *PATHS),
    "captions": CAPTIONS,
    "key": KEY,
    "label": LABEL,
    "language": (),
}

NO_TEXT = "no caption and no label"
NO_KEY = "no key"
NO_LABEL = "label is not a number from 0 on"

NO_UTF8 = "caption is not UTF-8"
NOT_TEXT = "caption is not text"

_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_NUMBERED = re.compile(r"(caption|title|text|sentence|comment|description)[ _]?[0-9]{1,2}", re.ASCII)
# Strings and commas alone: the value is flat, and neighbours are not joined as in `["a" "b"]`.
_PYTHON_LIST = re.compile(rf"""\[\s*(?:({_STRING})\s*(?:,\s*({_STRING})\s*)*,?\s*)?\]""")
_TEXT_FIELDS = ("raw", "caption", "captions", "text", "sentence")  # of an object that is a caption
_MAX_DEPTH = 5
_MAX_NAMES = 1000


class ParsedRow(NamedTuple):
    """The captions and the label of one row."""

    captions: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # empty, or one per caption
    label: int = -1  # -1 = none
    problem: str = ""  # why this cannot be a row
    dropped: str = ""  # why its label, or one of several captions, is not used

    def item(
        self, key: str, offset: int, size: int, problem: str = "", name: str = "", check: int = 0
    ) -> Sample | Skipped:
        """Return the row of an image; where the image, the key or the row has a problem, a skipped entry.

        Args:
          problem: that of the image or the key.
          name: the name of a skipped entry without a key.
          check: `lit_fast.data.images.fingerprint.image_checksum`; 0: unknown.
        """
        if self.problem.startswith(OTHER_SPLIT) or not problem:
            problem = self.problem
        if problem:
            return Skipped(key or name, problem)
        return Sample(key, offset, size, self.captions, self.label, self.languages, check, self.dropped)


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
    if not captions and "captions" not in options.declined:
        named = {options.image, *options.names()}
        captions = tuple(("", name) for name in _guess_captions([c for c in columns if c not in named]))
    key = options.key or ("" if "key" in options.declined else guess_column(KEY, columns))
    label = options.label or ("" if "label" in options.declined else guess_column(LABEL, columns))
    if image and not captions and not label:
        raise UserError(
            f"{where} has no column for captions or labels among {some(columns)}; name it with --captions or --label"
        )
    return replace(options, captions=captions, image=chosen, key=key, label=label)


def _guess_captions(columns: Collection[str]) -> list[str]:
    """Return the column of the captions, or several like `caption_0`, `caption_1`; else a field in a column."""
    if found := guess_column(CAPTIONS, columns):
        return [found]
    stems = [match[1] for name in columns if (match := _NUMBERED.fullmatch(name.lower()))]
    if stems:
        return [n for n in columns if (m := _NUMBERED.fullmatch(n.lower())) and m[1] == stems[0]]
    inner: dict[str, str] = {}
    for name in sorted(columns, key=lambda name: name.count(".")):
        if "." in name:
            inner.setdefault(name.rpartition(".")[2], name)
    found = guess_column(CAPTIONS, inner)
    return [inner[found]] if found else []


def nested_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns of rows, then the dotted ones of the fields in them."""
    levels: list[dict[str, None]] = [{} for _ in range(_MAX_DEPTH)]
    for row in rows:
        _add_names(row, "", levels)
    return list(islice(chain.from_iterable(levels), _MAX_NAMES))


def _add_names(value: Any, prefix: str, levels: Sequence[dict[str, None]]) -> None:
    value = _json_object(value) if isinstance(value, str) and prefix else value
    if isinstance(value, list):
        for part in value[:10]:
            if isinstance(part, dict):
                _add_names(part, prefix, levels)
    elif isinstance(value, Mapping) and levels and len(levels[0]) < _MAX_NAMES:
        levels[0].update((f"{prefix}{name}", None) for name in value)
        for name, inner in value.items():
            _add_names(inner, f"{prefix}{name}.", levels[1:])


def value_of(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or of the field that a dotted name is; None if there is none.

    Of a list of objects, it is the list of the field's values. A text that is a JSON object counts as that object.
    """
    if name in values:
        return values[name]
    dot = name.find(".")
    while dot >= 0:
        if name[:dot] in values:
            return _field(values[name[:dot]], name[dot + 1 :])
        dot = name.find(".", dot + 1)
    return None


def _field(value: Any, name: str) -> Any:
    if isinstance(value, str):
        value = _json_object(value)
    if isinstance(value, Mapping):
        return value_of(value, name)
    if isinstance(value, list):
        return [_field(part, name) for part in value if isinstance(part, Mapping)]
    return None


def _json_object(text: str) -> Any:
    if text.lstrip()[:1] != "{" or len(text) > MAX_CAPTION:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


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
    if "split" in names and not options.split:
        guesses.append("split = all (--split chooses)")
    if guesses:
        yield Guess(", ".join(guesses))


def require_column(name: str, columns: Collection[str], where: str) -> None:
    """Raise UserError if a name is not among `columns`; list these, nearest first."""
    if name and name not in columns:
        near = difflib.get_close_matches(name, list(columns), n=len(columns) or 1, cutoff=0.0)
        raise UserError(f"{where} has no {name!r}; choose from {some(near)}")


def guess_column(candidates: Collection[str], columns: Collection[str]) -> str:
    """Return the first candidate that is a column in any case, "" if none is."""
    lowered = {column.lower(): column for column in reversed(list(columns))}
    return next((lowered[c] for c in candidates if c in lowered), "")


def some(names: Collection[str]) -> str:
    """Return up to twenty names as text for a message, each cut at 80 characters."""
    escaped = [name if name.isprintable() else ascii(name) for name in list(names)[:20]]
    shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in escaped]
    return ", ".join(shown) + (", ..." if len(names) > 20 else "") if shown else "nothing"


def parse_row(values: Mapping[str, Any], columns: Columns) -> ParsedRow:
    """Parse captions, languages and label of one row.

    A caption may be a string, bytes, a list of them, or objects with `raw`, `caption` or `text`. Empty captions are
    dropped; repeated ones count, as in CLIP_benchmark. A label that is no class number costs a row with captions only
    the label.
    """
    if other := find_split(values, columns):
        return ParsedRow(problem=other)
    label, no_label = parse_label(value_of(values, columns.label)) if columns.label else (-1, "")
    language_values = value_of(values, columns.language) if columns.language else None
    found: list[tuple[str, str]] = []  # caption, language
    dropped = no_label
    for language, column in columns.captions:
        texts = list(caption_texts(value_of(values, column), columns.lists))
        if columns.language and not language:
            languages = _languages(language_values, len(texts))
        else:
            languages = [language] * len(texts)
        for (text, problem), code in zip(texts, languages, strict=True):
            if problem == NOT_TEXT:
                dropped = dropped or problem
                continue
            if problem or not is_utf8(text) or not is_utf8(code):
                return ParsedRow(problem=problem or NO_UTF8)
            if len(text) > MAX_CAPTION:
                return ParsedRow(problem="caption above 1 MiB")
            if text.strip():
                found.append((text.strip(), code))
    if not found and label < 0:
        return ParsedRow(problem=dropped or NO_TEXT)
    codes = tuple(code for _, code in found)
    texts_only = tuple(text for text, _ in found)
    return ParsedRow(texts_only, codes if any(codes) else (), label, dropped=dropped)


def find_split(values: Mapping[str, Any], columns: Columns) -> str:
    """Return the reason to skip a row of another split than `columns.split`, "" for none."""
    if not columns.split:
        return ""
    value = _single(values.get("split"))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    split = value.strip() if isinstance(value, str) else "none"
    return "" if split in columns.split.split("+") else f"{OTHER_SPLIT}{split[:40]}"


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


def parse_label(value: Any) -> tuple[int, str]:
    """Return a class number, -1 for none, and the problem with it."""
    value = _single(value)
    if value is None or value == "" or value != value:  # pandas writes a column with gaps as floats
        return -1, ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes | str):
        text = value.strip() if isinstance(value, bytes) else value.strip().encode("utf-8", "replace")
        match = re.fullmatch(rb"([0-9]{1,9})(\.0+)?", text)
        value = int(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1_000_000_000:
        return -1, NO_LABEL
    return value, ""


def caption_texts(value: Any, lists: bool = False, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the texts in a value, each with the problem with it ("" = none).

    Args:
      value: a string, bytes, an object with a text, or lists of them; None is no text.
      lists: a string is a list of texts, see `parse_list`.
      depth: of the value inside the column's.
    """
    if depth > _MAX_DEPTH:
        yield "", NOT_TEXT
    elif isinstance(value, list):
        for part in value:
            yield from caption_texts(part, lists, depth + 1)
    elif isinstance(value, Mapping):
        is_known = any(name in value for name in _TEXT_FIELDS)
        inner = next((value[n] for n in _TEXT_FIELDS if value.get(n) is not None), None if is_known else ...)
        yield from caption_texts(inner, lists, depth + 1)
    elif isinstance(value, bytes):
        try:
            yield from caption_texts(value.decode(), lists, depth)
        except UnicodeDecodeError:
            yield "", NO_UTF8
    elif isinstance(value, str):
        if not lists or not value.strip():
            yield value, ""
        elif (texts := parse_list(value)) is None:
            yield "", "captions are not a list, as in the first rows"
        else:
            yield from ((text, "") for text in texts)
    elif value is not None and value == value:  # pandas writes gaps as NaN
        yield "", NOT_TEXT


def parse_list(text: str) -> list[str] | None:
    """Return the strings of a text that is a list of them in JSON or as Python prints it; None if it is none."""
    text = text.strip()
    if not text.startswith("[") or len(text) > MAX_CAPTION:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not _PYTHON_LIST.fullmatch(text):
            return None
        try:
            with warnings.catch_warnings(action="ignore"):  # unknown escapes
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return value if is_list else None


def _languages(value: Any, count: int) -> list[str]:
    """Return `count` languages from one for all captions or one for each; "" = unknown."""
    given = [text for text, _ in caption_texts(value)]
    if len(given) == count:
        return given
    return given * count if len(given) == 1 else [""] * count


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
