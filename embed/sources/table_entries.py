"""The entries of a text table, in the order of its lines."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_fast.embed.sources.interface import Damage, Guess, Note, Skipped


class TableRow(NamedTuple):
    """One row of a text table."""

    number: int  # of its first line, from 1 on; of the object in JSON that spans lines
    values: dict[str, Any]
    lines: int = 1
    unit: str = "line"

    @property
    def name(self) -> str:
        """Name of the row for messages."""
        return f"{self.unit} {self.number}"


class Header(NamedTuple):
    """The names of a table's columns in order; without a header line they are "1", "2", ..."""

    names: list[str]
    is_numbered: bool = False


Entry = Header | TableRow | Guess | Note | Skipped | Damage
