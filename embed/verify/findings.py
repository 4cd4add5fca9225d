"""The findings of `lit-fast verify`, and the remedies that they name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lit_fast.data.features import Features, embed_command

_SHOWN = 5  # rows or keys that a finding names


@dataclass(frozen=True)
class Finding:
    """Damage; with `wrong=False`, a note on something unusual or not checked."""

    part: str  # index, captions, tokens <name> or features <name>
    what: str
    remedy: str = ""
    shard: int | None = None
    wrong: bool = True

    def line(self) -> str:
        """Return the finding as one line for the terminal."""
        where = self.part if self.shard is None else f"{self.part}, shard {self.shard}"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{'WRONG' if self.wrong else 'note'}  {where}: {self.what}{remedy}"


def some(names: Iterable[object]) -> str:
    """Return the first names as text, and the number of the others."""
    texts = [f"{n:,}" if isinstance(n, int) else str(n) for n in names]
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def repair_remedy(features: Features) -> str:
    """Return the remedy for damaged features."""
    if "imported" in features.provenance:
        return f"delete {features.path} and {finish_remedy(features)}"
    return f"repair it with: lit-fast verify {features.dataset.path} --tower {features.tower} --repair"


def finish_remedy(features: Features) -> str:
    """Return the remedy for missing features."""
    return f"finish it with: {embed_command(features.dataset, features.provenance, features.tower)}"
