"""What did not become a row, and why: for the report and for `left_out.jsonl`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from lit_fast.storage.files import write_atomic
from lit_fast.storage.read import name

MAX_LISTED = 100_000  # lines of left_out.jsonl
_MAX_KEY = 500  # characters

damaged = "file damaged or cut off"


class LeftOut:
    """Counts by reason, names for the report and for left_out.jsonl."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}
        self.lines: list[str] = []

    def add(self, key: str, source: str, reason: str) -> None:
        """Count one and remember its name."""
        key = key[:_MAX_KEY]
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < 5:
            names.append(f"{key if key.isprintable() else ascii(key)} in {name(source)}")
        if len(self.lines) < MAX_LISTED:
            self.lines.append(json.dumps({"key": key, "file": source, "reason": reason}))

    def report(self) -> str:
        """One line: counts by reason with up to five names each."""
        parts = (
            f"{n:,} {reason} ({', '.join(self.names[reason])}{', ...' if n > 5 else ''})"
            for reason, n in sorted(self.counts.items(), key=lambda item: -item[1])
        )
        return f"left out {sum(self.counts.values()):,}: {'; '.join(parts)}"

    def why(self) -> str:
        """The report as the end of a message; "" if there is nothing to report."""
        return f"; {self.report()}" if self.counts else ""

    def together(self, earlier: dict[str, int]) -> dict[str, int]:
        """The counts with those of earlier generations."""
        return dict(Counter(earlier) + Counter(self.counts))

    def write(self, out: Path, generation: int) -> None:
        """`left_out.jsonl`, or `left_out-1.jsonl` for what the first growing left out, and so on."""
        file = out / (f"left_out-{generation}.jsonl" if generation else "left_out.jsonl")
        if self.lines:
            write_atomic(file, ("\n".join(self.lines) + "\n").encode())
        else:
            file.unlink(missing_ok=True)
