"""What `lit-fast verify` finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SHOWN = 5  # rows or keys that a finding names


@dataclass(frozen=True)
class Finding:
    """Something wrong, or, as a note, something that could not be checked or that a user may want to know."""

    part: str  # index, captions, tokens <name> or features <name>
    what: str
    remedy: str = ""
    shard: int | None = None
    wrong: bool = True

    def line(self) -> str:
        """For the terminal."""
        where = self.part if self.shard is None else f"{self.part}, shard {self.shard}"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{'WRONG' if self.wrong else 'note'}  {where}: {self.what}{remedy}"


def some(names: Iterable[object]) -> str:
    """The first few, and how many more."""
    texts = [f"{n:,}" if isinstance(n, int) else str(n) for n in names]
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
