"""Which columns, JSON keys or features of a source hold what, and the captions and label in one row of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lit_fast.embed.sources.items import MAX_CAPTION, Names, is_text
from lit_fast.errors import UserError

# Tried in this order, whatever their case.
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


@dataclass(frozen=True)
class Fields:
    """The columns of one source; "" or empty = it has none."""

    image: str = ""
    captions: tuple[tuple[str, str], ...] = ()  # (language or "", column)
    key: str = ""
    label: str = ""
    language: str = ""

    def columns(self) -> list[str]:
        """All but the image's, each once."""
        names = [*(name for _, name in self.captions), self.key, self.label, self.language]
        return [name for name in dict.fromkeys(names) if name]


def choose(names: Names, columns: Collection[str], where: str, *, image: bool = True) -> Fields:
    """The columns that `names` mean, guessed where it says nothing.

    Raises:
      UserError: a name is not among `columns`, or with `image` there is no column for the image or none for
        captions and labels.
    """
    for name in [*(n for _, n in names.captions), names.key, names.label, names.language]:
        require(name, columns, where)
    chosen = names.image
    if image:
        require(chosen, columns, where)
        chosen = chosen or guess((*IMAGE, *PATHS), columns)
        if not chosen and (url := guess(URLS, columns)):
            raise UserError(
                f"{where} has only URLs ({url}); download the images with img2dataset, then index its tars"
            )
        if not chosen:
            raise UserError(
                f"{where} has no column for the image among {some(columns)}; name it with --image"
            )
    captions = names.captions
    if not captions and (found := guess(CAPTIONS, columns)):
        captions = (("", found),)
    key, label = names.key or guess(KEY, columns), names.label or guess(LABEL, columns)
    if image and not captions and not label:
        raise UserError(
            f"{where} has no column for captions or labels among {some(columns)}; name it with --captions or --label"
        )
    return Fields(chosen, captions, key, label, names.language)


def require(name: str, columns: Collection[str], where: str) -> None:
    """Refuse a name that is not there, with the names that are, nearest first."""
    if name and name not in columns:
        near = difflib.get_close_matches(name, list(columns), n=len(columns) or 1, cutoff=0.0)
        raise UserError(f"{where} has no {name!r}; it has {some(near)}")


def guess(candidates: Collection[str], columns: Collection[str]) -> str:
    """The first candidate that is a column, whatever its case; "" if none is."""
    lowered = {column.lower(): column for column in reversed(list(columns))}
    return next((lowered[c] for c in candidates if c in lowered), "")


def some(names: Collection[str]) -> str:
    """Up to twenty names for a message."""
    shown = [name if name.isprintable() else ascii(name) for name in list(names)[:20]]
    return ", ".join(shown) + (", ..." if len(names) > 20 else "") if shown else "nothing"


def texts(values: Mapping[str, Any], fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...], int, str]:
    """Captions, languages, label (-1 = none) and why the row cannot be one ("" = it can).

    A caption may be a string, bytes, a list of them, or objects with `raw`, `caption` or `text`.
    """
    label, problem = -1, ""
    if fields.label:
        label, problem = label_number(values.get(fields.label))
    spoken = values.get(fields.language) if fields.language else None
    found: dict[str, str] = {}
    for language, name in fields.captions:
        given = strings(values.get(name))
        spoken_of = (
            _languages(spoken, len(given)) if fields.language and not language else [language] * len(given)
        )
        for text, code in zip(given, spoken_of, strict=True):
            if text is None or not is_text(text) or not is_text(code):
                return (), (), -1, "caption is not UTF-8"
            if len(text) > MAX_CAPTION:
                return (), (), -1, "caption above 1 MiB"
            if text.strip():
                found.setdefault(text.strip(), code)
    if problem:
        return (), (), -1, problem
    if not found and label < 0:
        return (), (), -1, "no caption and no label"
    languages = tuple(found.values())
    return tuple(found), languages if any(languages) else (), label, ""


def strings(value: Any) -> list[str | None]:
    """The texts in a value, None for one that is not UTF-8; what is no text is passed over."""
    found: list[str | None] = []
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and isinstance(value.get("caption"), list):  # Crossmodal-3600's
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


def label_number(value: Any) -> tuple[int, str]:
    """A class number, -1 for none, and what is wrong with it."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
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


def key_text(value: Any) -> tuple[str, str]:
    """A row's key and what is wrong with it."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value or len(value) > 4096:
        return "", "no key"
    return (value, "") if is_text(value) else (value, "key is not UTF-8")


def _languages(value: Any, count: int) -> list[str]:
    """One language for all captions, or one each; "" where it is not said."""
    given = [text or "" for text in strings(value)]
    if len(given) == count:
        return given
    return given * count if len(given) == 1 else [""] * count
