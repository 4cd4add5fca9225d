"""The log of skipped rows, with reasons: for the report and for `left_out.jsonl`."""

from __future__ import annotations

import json
from collections import Counter

from lit_fast.storage.files import remove, write_atomic
from lit_fast.storage.paths import StrPath, join, name

MAX_LISTED = 100_000  # lines of left_out.jsonl
_MAX_KEY = 500  # characters
_SHOWN = 5  # names per reason in the report


class SkippedLog:
    """Counts of skipped rows by reason, names for the report, lines for the file."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self._lines: list[str] = []

    def add(self, key: str, source: str, reason: str) -> None:
        """Count one skipped row of the file `source`."""
        key = key[:_MAX_KEY]
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < _SHOWN:
            names.append(f"{key if key.isprintable() else ascii(key)} in {name(source)}")
        if len(self._lines) < MAX_LISTED:
            self._lines.append(json.dumps({"key": key, "file": source, "reason": reason}))

    def report(self) -> str:
        """Return one line: counts by reason with up to five names each; "" without any."""
        if not self.counts:
            return ""
        parts = (
            f"{n:,} {reason} ({', '.join(self._names[reason])}{', ...' if n > _SHOWN else ''})"
            for reason, n in sorted(self.counts.items(), key=lambda item: -item[1])
        )
        return f"left out {sum(self.counts.values()):,}: {'; '.join(parts)}"

    def total_counts(self, earlier: dict[str, int]) -> dict[str, int]:
        """Return the counts by reason, with those of earlier generations of the dataset."""
        return dict(Counter(earlier) + Counter(self.counts))

    def write(self, out: StrPath, generation: int) -> None:
        """Write `left_out.jsonl` of a dataset; `left_out-1.jsonl` for its first growth."""
        file = join(out, f"left_out-{generation}.jsonl" if generation else "left_out.jsonl")
        if self._lines:
            write_atomic(file, ("\n".join(self._lines) + "\n").encode())
        else:
            remove(file)
