"""Read webdataset tars as img2dataset and CLIP_benchmark write them.

A row is all members whose names are equal up to the last dot: `IMG_1.2.jpg` and `IMG_1.2.txt` are one row,
`IMG_1.jpg` and `IMG_1.txt` another. Images end in `.jpg`, `.jpeg`, `.png`, `.webp`, `.gif` or `.bmp`; `.txt` and
`.json` hold captions, `.cls` a class number. webdataset's names end at the first dot; a suffix of several parts, as in
`000.left.jpg` and `000.caption.txt`, is one where an option names it: `--image left.jpg --captions caption.txt`.
Otherwise names that agree up to the first dot only are no pair: they are skipped and counted.

Of several members with the same name the last counts, as if the tar were unpacked. A key with two images is skipped.
Members with other suffixes are not used; they are counted if they do not belong to a row. Archives one after another
in a file are read one by one.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from lit_fast.data.images.decode import MAX_IMAGE
from lit_fast.data.images.fingerprint import HEAD, image_checksum
from lit_fast.embed.sources.clip_benchmark import lines_near
from lit_fast.embed.sources.columns import (
    NO_TEXT,
    choose_columns,
    find_guess,
    nested_names,
    parse_key,
    parse_row,
    some,
    value_of,
)
from lit_fast.embed.sources.interface import (
    IMAGE_SUFFIXES,
    JUNK,
    Columns,
    Damage,
    Guess,
    Item,
    Layout,
    Note,
    Skipped,
    is_utf8,
)
from lit_fast.embed.sources.pairs import NO_JSON, TEXT_SUFFIXES, parse_texts, text_columns
from lit_fast.embed.sources.tar_members import ArchiveEnd, TarDamage, read_members
from lit_fast.errors import UserError, unreadable
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import is_junk, parent

_MAX_TEXT = 1 << 20  # bytes of one member
_MANY_ZEROS = 1 << 20  # bytes; tar itself writes fewer

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_NOT_REGULAR = "not a regular file (a link or the like)"
_REPLACED = "replaced by a later member of the same name"
_OTHER_SUFFIX = "suffix of no image, text or label"
_AMBIGUOUS = "image and text agree up to the first dot of their names only"


class _Member(NamedTuple):
    """A member that is a part of a row."""

    suffix: str
    offset: int
    size: int
    check: int = 0  # of an image
    text: bytes = b""
    problem: str = ""  # why there cannot be a row with it


@dataclass(slots=True)
class _Members:
    """The members of one key."""

    key: str
    parts: dict[str, _Member] = field(default_factory=dict)  # by name, image and texts
    others: list[str] = field(default_factory=list)  # names of members with other suffixes
    problem: str = ""  # why this cannot be a row


def read_tar(path: str, options: Columns) -> Iterator[Item]:
    """Yield all rows of a tar, in the order in which their keys first appear.

    `options` name keys of the `.json`, or suffixes. Beside a `dataset_type.txt` that says `retrieval`, as in
    CLIP_benchmark's sets, each line of a `.txt` is a caption.

    Raises:
      UserError: the tar is compressed, cannot be opened, or no row has a named key.
    """
    yield Layout("tar")
    try:
        with open_read(path) as file:
            _refuse_compressed(path, file.read(6))
            yield from _TarReader(path, options).read(file)
    except OSError as error:
        raise unreadable(path, error) from None


class _TarReader:
    def __init__(self, path: str, options: Columns) -> None:
        self._path, self._options = path, options
        self._images = (f".{options.image.lower().lstrip('.')}",) if options.image else IMAGE_SUFFIXES
        self._texts = {*TEXT_SUFFIXES, *(f".{name.lower().lstrip('.')}" for name in options.names())}
        self._long = tuple(s for s in (*self._images, *self._texts) if s.count(".") > 1)
        self._lines = lines_near(parent(path), "dataset_type.txt") == ("retrieval",)
        self._names: dict[str, None] = {}  # of the values of all rows, in order
        self._notes: dict[str, None] = {}
        self._unused: set[str] = set()  # suffixes of members of rows
        self._guessed: set[tuple[tuple[tuple[str, str], ...], str]] = set()  # captions and label

    def read(self, file: IO[bytes]) -> Iterator[Item]:
        rows: dict[str, _Members] = {}
        last: _Members | None = None
        archives = 0
        for member in read_members(file):
            if isinstance(member, TarDamage):
                yield Damage(f"{self._path} {member.description}")
                if last:  # more of its members may be in the damaged part
                    last.problem = "cut off by damage of the tar"
            elif isinstance(member, ArchiveEnd):
                archives += 1
                if not member.zeros:
                    doubt = "without an end mark: it may have been cut off"
                elif member.zeros > _MANY_ZEROS:
                    doubt = (
                        f"before {member.zeros:,} bytes of zeros: its download may not have been completed"
                    )
                else:
                    doubt = ""
                if doubt:
                    yield Note(f"{self._path} ends at byte {member.position} {doubt}")
                yield from self._rows(rows)
                rows, last = {}, None
            elif member.isdir():
                continue
            elif is_junk(member.name):
                yield Skipped(member.name, JUNK)
            else:
                last, skipped = self._add(rows, member, file, last)
                if skipped:
                    yield skipped
        yield from self._rows(rows)
        if archives > 1:
            yield Note(f"{self._path} holds {archives} archives one after another, all of which are read")
        if self._unused:
            yield Guess(f"members with {some(sorted(self._unused))} = unused")
        for note in self._notes:
            yield Note(f"{self._path}: {note}")
        if self._names:
            # This refuses a name that no row has.
            choose_columns(self._options, list(self._names), self._path, image=False)

    def _add(
        self, rows: dict[str, _Members], info: tarfile.TarInfo, file: IO[bytes], last: _Members | None
    ) -> tuple[_Members | None, Skipped | None]:
        """Add one member to its row.

        Returns:
          The last row that got a member, and an entry that this member skips or replaces.
        """
        name = info.name.removeprefix("./")
        key, suffix = self._split(name)
        is_part = suffix in self._images or suffix in self._texts
        is_regular = info.isreg() and not info.issparse()
        if not is_part and not is_regular:
            return last, Skipped(name, _NOT_REGULAR)
        row = rows.get(key) or rows.setdefault(key, _Members(key))
        if not is_part:
            row.others.append(name)
            return row, None
        skipped = Skipped(name, _REPLACED) if name in row.parts else None
        row.parts[name] = self._part(key, suffix, info, file, is_regular)
        return row, skipped

    def _split(self, name: str) -> tuple[str, str]:
        """Return the key and the suffix in lower case, which is "" if there is none."""
        base = name.rpartition("/")[2]
        for suffix in self._long:
            if base.lower().endswith(suffix) and len(base) > len(suffix):
                return name[: -len(suffix)], suffix
        stem, _, rest = base.rpartition(".")
        return (name[: -len(rest) - 1], f".{rest.lower()}") if stem else (name, "")

    def _part(
        self, key: str, suffix: str, info: tarfile.TarInfo, file: IO[bytes], is_regular: bool
    ) -> _Member:
        member = _Member(suffix, info.offset_data, info.size)
        if not is_regular:
            return member._replace(problem=_NOT_REGULAR)
        file.seek(info.offset_data)  # the buffer has these bytes: they follow the header
        if suffix not in self._images:
            if info.size > _MAX_TEXT:
                return member._replace(problem=f"{suffix} above 1 MiB")
            return member._replace(text=file.read(info.size))
        if info.size == 0:
            return member._replace(problem="empty image file")
        if info.size > MAX_IMAGE:
            return member._replace(problem="image file above 256 MiB")
        if not is_utf8(key):
            return member._replace(problem="file name is not UTF-8")
        return member._replace(check=image_checksum(file.read(min(info.size, HEAD))))

    def _rows(self, rows: dict[str, _Members]) -> Iterator[Item]:
        """Yield the rows of one archive."""
        first_parts = Counter(_first_part(key) for key, members in rows.items() if members.parts)
        for key, members in rows.items():
            alike = first_parts[_first_part(key)]
            if alike:
                self._unused.update(self._split(name)[1] or "no suffix" for name in members.others)
            else:
                yield from (Skipped(name, _OTHER_SUFFIX) for name in members.others)
            if members.parts:
                yield from self._row(members, is_alone=alike == 1)

    def _row(self, members: _Members, *, is_alone: bool) -> Iterator[Item]:
        """Yield the row of one key, or a skipped entry; before it, a guess about its columns."""
        parts = members.parts.values()
        suffixes = [part.suffix for part in parts]
        images = [part for part in parts if part.suffix in self._images]
        problem = members.problem or next((part.problem for part in parts if part.problem), "")
        if not problem and len(images) > 1:
            shown = " and ".join(sorted(part.suffix for part in images))
            problem = f"two images for one key ({shown}); choose with --image"
        if not problem and (repeated := [s for s in suffixes if suffixes.count(s) > 1]):
            problem = f"two {repeated[0]} for one key"
        if not problem and not images:
            of = ", ".join(self._images[:-1]) + " or " if len(self._images) > 1 else ""
            problem = f"no image ({of}{self._images[-1]})" if is_alone else _AMBIGUOUS
        if problem:
            yield Skipped(members.key, problem)
            return
        values, is_json = self._values(members)
        if self._options.names():
            self._names |= dict.fromkeys(nested_names([values]))
        columns = text_columns(self._path, self._options, values)
        row = parse_row(values, columns)
        if not row.problem and (columns.captions, columns.label) not in self._guessed:
            self._guessed.add((columns.captions, columns.label))
            yield from find_guess(self._options, columns, list(values))
        if row.problem == NO_TEXT and not is_alone:
            yield Skipped(members.key, _AMBIGUOUS)
            return
        if not is_json:
            if row.problem == NO_TEXT or any(value_of(values, n) is None for n in columns.names()):
                yield Skipped(members.key, NO_JSON)
                return
            self._notes["a .json is not a JSON object; the row has the texts of its other members"] = None
        key = members.key
        if self._options.key and not row.problem:
            key, problem = parse_key(value_of(values, self._options.key))
        [image] = images
        yield row.item(key, image.offset, image.size, problem, members.key, image.check)

    def _values(self, members: _Members) -> tuple[dict[str, Any], bool]:
        """Return the fields of the `.json` and the other texts by suffix; and whether the `.json` can be read."""
        texts = {part.suffix: part.text for part in members.parts.values() if part.suffix in self._texts}
        values, is_object = parse_texts(texts)
        if self._lines and ".txt" in texts:
            values["txt"] = values["txt"].splitlines()
        return values, is_object


def _first_part(key: str) -> str:
    """Return webdataset's key: the path up to the first dot of the file name."""
    folder, slash, base = key.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _refuse_compressed(path: str, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {name}, where images cannot be read by their offset; decompress it"
            )
