"""Read the rows of sources in groups, in a shuffled order of the sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lit_fast.data.dataset import SHARD, Source
from lit_fast.data.dataset_writer import Row
from lit_fast.data.images.sources import find_change
from lit_fast.embed.skipped import SkippedLog
from lit_fast.embed.sources.formats import FORMATS
from lit_fast.embed.sources.interface import Columns, Damage, Guess, Layout, Note, Sample, Skipped
from lit_fast.errors import UserError
from lit_fast.storage.paths import name
from lit_fast.utils.output import status
from lit_fast.utils.permutation import permutation
from lit_fast.utils.progress import Progress

GROUP_ROWS = 4 * SHARD  # a group is complete after the source that reaches this number


class RowReader:
    """The rows of sources; each source is read once.

    Attributes:
      sources: the sources, with the layout of their images once they are read.
      skipped: the rows that were skipped so far.
      damages: descriptions of the damage found so far.
      notes: further warnings for the user.
      labels: the distinct class numbers found so far, those above the number of classes as one.
    """

    def __init__(
        self, sources: Sequence[Source], options: Columns, first_source: int, num_classes: int
    ) -> None:
        """Set up the reader; nothing is read yet.

        Args:
          sources: `kind` of each is the name of its format.
          first_source: number of the first source in the dataset.
          num_classes: rows with a label of this or above are skipped; 0: none are.
        """
        self.sources = list(sources)
        self.skipped = SkippedLog()
        self.damages: list[str] = []
        self.notes: list[str] = []
        self.labels: set[int] = set()
        self._options, self._first, self._num_classes = options, first_source, num_classes
        self._outside = f"label outside the {num_classes} class names"
        self._dropped = Counter[str]()  # reason -> rows without one of their values
        self._printed: set[tuple[str, str]] = set()  # format of a source, its guesses

    def source_of(self, row: Row) -> Source:
        """Return the source of a row."""
        return self.sources[row.source - self._first]

    def skip(self, row: Row, reason: str) -> None:
        """Log a row of a group as skipped."""
        self.skipped.add(row.key, self.source_of(row).path, reason)

    def groups(self, seed: int) -> Iterator[list[Row]]:
        """Yield all rows in groups; the seed decides the order of the sources.

        A group ends after the source with which it reaches `GROUP_ROWS`, and within a source at twice this number, so
        that no more rows are in memory.

        Raises:
          UserError: a source cannot be read, or was written meanwhile.
        """
        progress = Progress("index", len(self.sources), "files")
        group: dict[object, list[Row]] = {}  # rows of one image
        count = grouped = 0  # rows of this group, and of earlier groups
        for number in permutation(len(self.sources), seed, 0).tolist():
            for row in self._rows(number):
                # A folder may have several rows of one image: merge their captions.
                key = (row.source, row.key) if self.sources[number].kind == "folder" else len(group)
                group.setdefault(key, []).append(row)
                count += 1
                if count >= 2 * GROUP_ROWS:
                    grouped, count = grouped + len(group), 0
                    yield list(map(self._merge, group.values()))
                    group.clear()
                    progress.advance(0, f"{grouped:,} rows")
            progress.advance(1, f"{grouped + len(group):,} rows")
            if count >= GROUP_ROWS:
                grouped, count = grouped + len(group), 0
                yield list(map(self._merge, group.values()))
                group.clear()
        if group:
            yield list(map(self._merge, group.values()))
        progress.close()
        for reason, count in self._dropped.items():
            self.notes.append(f"{count:,} rows were taken without one value: {reason}")

    def _rows(self, number: int) -> Iterator[Row]:
        source, guesses = self.sources[number], list[str]()
        for item in FORMATS[source.kind].read(source.path, self._options):
            if isinstance(item, Sample) and item.label >= 0:
                self.labels.add(min(item.label, self._num_classes + 1))
            match item:
                case Layout(kind, image, images):
                    self.sources[number] = replace(source, kind=kind, image=image, images=images)
                case Guess(text):
                    guesses.append(text)
                case Skipped(key, reason):
                    self.skipped.add(key, source.path, reason)
                case Damage(description):
                    self.damages.append(description)
                    self.skipped.add("the rest", source.path, "file damaged or cut off")
                case Note(text):
                    self.notes.append(text)
                case Sample() if self._is_outside(item.label) and not item.captions:
                    self.skipped.add(item.key, source.path, self._outside)
                case Sample(key, offset, size, captions, label, languages, check, dropped):
                    if self._is_outside(label):
                        label, dropped = -1, self._outside
                    if dropped:
                        self._dropped[dropped] += 1
                    if guesses and captions:
                        self._print(source, guesses, captions[0])
                        guesses = []
                    yield Row(key, self._first + number, offset, size, captions, label, languages, check)
        self._print(source, guesses)
        if change := find_change(source):
            raise UserError(
                f"source {source.path} {change}: it was written while it was read; rerun the same command"
            )

    def _merge(self, rows: list[Row]) -> Row:
        """Return one row with the captions of several rows of one image, and the first of their labels."""
        if len(rows) == 1:
            return rows[0]
        # A row without languages has captions of unknown ones.
        languages = tuple(language for row in rows for language in row.languages or ("",) * len(row.captions))
        labels = [row.label for row in rows if row.label >= 0]
        if len(set(labels)) > 1:
            self._dropped["another label of the same image"] += 1
        return replace(
            rows[0],
            captions=tuple(caption for row in rows for caption in row.captions),
            languages=languages if any(languages) else (),
            label=labels[0] if labels else -1,
        )

    def _is_outside(self, label: int) -> bool:
        return bool(self._num_classes) and label >= self._num_classes

    def _print(self, source: Source, guesses: list[str], caption: str = "") -> None:
        """Print the guesses about a source, once for all sources of its format."""
        line = f"guessed {', '.join(guesses)}"
        if not guesses or (source.kind, line) in self._printed:
            return
        self._printed.add((source.kind, line))
        shown = caption if len(caption) <= 80 else f"{caption[:77]}..."
        shown = shown if shown.isprintable() else ascii(shown)[1:-1]
        status(f"{name(source.path)}: {line}" + (f'; first caption: "{shown}"' if caption else ""))
