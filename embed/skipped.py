"""Find repeated keys in little memory; log skipped rows for the report and for `left_out.jsonl`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lit_fast.embed.sources.interface import OTHER_SPLIT
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import remove
from lit_fast.storage.paths import StrPath, join, name

MAX_LISTED = 100_000  # lines of left_out.jsonl
_MAX_KEY = 500  # characters
_MAX_REASONS = 100  # of other splits
_SHOWN = 5  # names per reason in the report
_MAX_SHOWN = 200  # characters of such a name


class SkippedLog:
    """Counts of skipped rows by reason, names for the report, lines for the file."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self._lines: list[str] = []

    def add(self, key: str, source: str, reason: str) -> None:
        """Count one skipped row of the file `source`."""
        if reason.startswith(OTHER_SPLIT):
            if len(self.counts) > _MAX_REASONS:
                reason = f"{OTHER_SPLIT}of other names"
            self.counts[reason] = self.counts.get(reason, 0) + 1
            return
        key = key[:_MAX_KEY]
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < _SHOWN:
            shown = key if key.isprintable() else ascii(key)
            shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
            names.append(f"{shown} in {name(source)}")
        if len(self._lines) < MAX_LISTED:
            self._lines.append(json.dumps({"key": key, "file": source, "reason": reason}))

    def report(self) -> str:
        """Return one line: counts by reason with up to five names each; "" without any."""
        if not self.counts:
            return ""
        parts = (
            f"{n:,} {reason}" + (f" ({', '.join(names)}{', ...' if n > _SHOWN else ''})" if names else "")
            for reason, n in sorted(self.counts.items(), key=lambda item: -item[1])
            for names in [self._names.get(reason)]
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


class KeySet:
    """A set of (source, key) in 8 bytes each: sorted arrays of hashes, each at least twice as long as the next.

    A key is unique within its source. It is identified by 64 bits of its BLAKE2b. Of 100 million different keys two
    have the same bits with a probability of 0.03 %; then one row is skipped as a duplicate.

    Adding n keys sorts each hash about log2(n / batch) times. A look-up is a binary search in as many arrays.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    def add(self, keys: Sequence[tuple[int, str]]) -> np.ndarray:
        """Add keys, each with the number of its source.

        Returns:
          bool `[len(keys)]`: whether the key was added for the first time.
        """
        hashes = np.fromiter((_hash(source, key) for source, key in keys), np.uint64, len(keys))
        unique, first = np.unique(hashes, return_index=True)
        is_new = np.ones(len(unique), bool)
        for known in self._sorted:
            position = np.searchsorted(known, unique)
            is_new &= known[np.minimum(position, len(known) - 1)] != unique
        result = np.zeros(len(keys), bool)
        result[first[is_new]] = True
        self._insert(unique[is_new])
        return result

    def _insert(self, hashes: np.ndarray) -> None:
        if not len(hashes):
            return
        self._sorted.append(hashes)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            merged = np.concatenate([self._sorted.pop(), self._sorted.pop()])
            merged.sort(kind="stable")  # a radix or merge sort, since two parts are sorted already
            self._sorted.append(merged)


def _hash(source: int, key: str) -> int:
    data = source.to_bytes(4, "little") + key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
