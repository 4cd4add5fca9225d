"""What every reader of a source yields, lazily: one `Layout`, then rows, what is left out, damage."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CAPTION = 1 << 20  # bytes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Names:
    """The options of `lit-fast index` that name columns, JSON keys or features; "" = guess."""

    captions: tuple[tuple[str, str], ...] = ()  # (language or "", name)
    image: str = ""
    key: str = ""
    label: str = ""
    language: str = ""
    images: str = ""  # directory

    def told(self) -> tuple[str, ...]:
        """Those that were given, for comparison with a later call."""
        captions = ",".join(f"{l}={n}" if l else n for l, n in self.captions)
        given = {"captions": captions} | {
            n: getattr(self, n) for n in ("image", "key", "label", "language", "images")
        }
        return tuple(f"{name}={value}" for name, value in given.items() if value)


@dataclass(frozen=True)
class Layout:
    """How the images of a source are found: the fields of `lit_fast.data.dataset.Source` with these names."""

    kind: str
    image: str = ""
    images: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as a source has it; fields as in `lit_fast.data.dataset.Row`."""

    key: str
    offset: int
    size: int
    captions: tuple[str, ...]
    label: int = -1
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that cannot become a row, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Damage:
    """Where the rest of a source could not be read; the text begins with its path."""

    where: str


Item = Layout | Sample | LeftOut | Damage


def is_text(text: str) -> bool:
    """False for lone surrogates, which file names and JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
