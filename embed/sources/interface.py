"""The interface of a source format: options and items of its reader.

To add a format, write a module beside this one and add a line to `lit_fast.embed.sources.formats.FORMATS`. If its
images are located in a new manner, add a kind to `lit_fast.data.dataset.Source` and its reader to
`lit_fast/data/images/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_CAPTION = 1 << 20  # characters

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
NO_IMAGE_FILE = "no image file (.jpg, .jpeg, .png, .webp, .gif or .bmp)"

OTHER_SPLIT = "of the split "  # beginning of the reason; such rows are counted but not listed

JUNK = "hidden file or leftover of another program"  # see `lit_fast.storage.paths.is_junk`


@dataclass(frozen=True)
class Columns:
    """The columns, JSON keys or features of a source by their role.

    As options of `lit-fast index`, "" or () = guess, unless the role is among `declined`; of a source, it has none.
    """

    captions: tuple[tuple[str, str], ...] = ()  # (language or "", name)
    image: str = ""
    key: str = ""
    label: str = ""
    language: str = ""
    images: str = ""  # directory of the image files; an option only
    split: str = ""  # rows of other splits are skipped: "train+restval"; an option only
    declined: tuple[str, ...] = ()  # roles whose column is not guessed; an option only
    lists: bool = False  # captions are lists written as text; of a source only

    def names(self) -> list[str]:
        """Return all columns but the image's, each once."""
        split = "split" if self.split else ""
        names = [*(name for _, name in self.captions), self.key, self.label, self.language, split]
        return [name for name in dict.fromkeys(names) if name]

    def as_options(self) -> tuple[str, ...]:
        """Return `name=value` for each option that was given."""
        values = vars(self) | {"captions": ",".join(f"{l}={n}" if l else n for l, n in self.captions)}
        declined = values.pop("declined")
        return tuple(f"{n}={v}" for n, v in values.items() if v or n in declined)


@dataclass(frozen=True)
class Layout:
    """How the images of a source are located: fields of `lit_fast.data.dataset.Source`."""

    kind: str
    image: str = ""
    images: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of a source; the fields are those of `lit_fast.data.dataset.Row`."""

    key: str
    offset: int
    size: int
    captions: tuple[str, ...]
    label: int = -1
    languages: tuple[str, ...] = ()
    check: int = 0
    dropped: str = ""  # why its label, or one of several captions, is not used


@dataclass(frozen=True, slots=True)
class Skipped:
    """An entry that cannot be a row, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Guess:
    """A guess of the reader, for the user to judge; the caller prints it with the first caption.

    Attributes:
      text: "image = filepath, captions = title (also: caption)", or any `property = value`.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a source cannot be read any further; the text begins with its path."""

    description: str


@dataclass(frozen=True, slots=True)
class Note:
    """What the user should know of a source that is read; printed as a warning."""

    text: str


Item = Layout | Guess | Sample | Skipped | Damage | Note

Reader = Callable[[str, Columns], Iterator[Item]]
"""Read a source, given by its path or URL, lazily and once.

A reader yields one `Layout` before the first `Sample`, then a `Sample` or a `Skipped` for every entry, in the order of
the source. It yields a `Guess` before the first row that was read with guessed columns, and again where others are
guessed; equal ones of many files are printed once. At damage it yields `Damage` and reads no further. It
raises `UserError` if the source cannot be read at all or lacks a named column; no content of a file makes it raise
anything else.
"""


@dataclass(frozen=True)
class Format:
    """A source format: its reader, the suffixes of its files, its own class names."""

    read: Reader
    suffixes: tuple[str, ...] = ()
    class_names: Callable[[str, str], tuple[str, ...]] = (
        lambda path, label: ()
    )  # `label`: the option, "" guesses
    names_in_file: bool = False  # each file has its own class names, not each directory


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates, which file names and JSON may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
