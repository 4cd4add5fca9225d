"""Rank towers by the results of the same training on the features of each, with the noise of the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_fast.errors import UserError
from lit_fast.report.compare import Record, comparison_page
from lit_fast.report.page import Table
from lit_fast.utils.format import format_table

_PREFERRED = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1")


@dataclass(frozen=True)
class Standing:
    """The results of one tower.

    Attributes:
      tower: name of its features.
      records: its runs, by seed.
      figures: of the last evaluation of each run, by name; only those that all runs have.
    """

    tower: str
    records: tuple[Record, ...]
    figures: dict[str, list[float]]

    def mean(self, name: str) -> float:
        """Return the mean of a figure over the seeds."""
        return sum(self.figures[name]) / len(self.figures[name])

    def deviation(self, name: str) -> float:
        """Return the standard deviation of a figure over the seeds, NaN with one seed."""
        values, mean = self.figures[name], self.mean(name)
        if len(values) < 2:
            return math.nan
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def rank(runs: dict[str, Sequence[Record]], by: str = "") -> tuple[list[Standing], str]:
    """Return the towers from best to worst, and the figure that they are ranked by.

    Args:
      runs: finished runs of each tower.
      by: name of a figure, or an end of it; by default the first accuracy or recall@1.

    Raises:
      UserError: the runs were not evaluated, or have no such figure.
    """
    standings = [Standing(tower, tuple(records), _common(records)) for tower, records in runs.items()]
    shared = [name for name in standings[0].figures if all(name in s.figures for s in standings)]
    if not shared:
        raise UserError(
            "the runs have no figure in common; add --evaluate.retrieval E or --evaluate.zero_shot E"
        )
    ends = (by,) if by else (*_PREFERRED, "")
    chosen = next((name for end in ends for name in shared if name.endswith(end)), None)
    if chosen is None:
        raise UserError(f"--by {by!r} is not a figure of the runs; choose from {', '.join(shared)}")
    return sorted(standings, key=lambda s: -s.mean(chosen)), chosen


def table_of(standings: Sequence[Standing], by: str) -> list[list[str]]:
    """Return the head and the rows of the ranking: a column per tower, the best first, and a row per figure.

    A cell is the mean over the seeds in percent, and their standard deviation. The name of the evaluation set is in
    the first cell if there is only one.
    """
    shared = [name for name in standings[0].figures if all(name in s.figures for s in standings)]
    names = [by, *(name for name in shared if name != by)]
    prefix = by.rpartition("/")[0] + "/"
    is_only = prefix != "/" and all(name.startswith(prefix) for name in names)
    rows = [[f"on {prefix[:-1]}" if is_only else "", *(s.tower for s in standings)]]
    for name in names:
        cells = [_percent(standing, name) for standing in standings]
        rows.append([f"{name.removeprefix(prefix) if is_only else name}, %", *cells])
    seeds = [" ".join(f"{100 * v:.1f}" for v in standing.figures[by]) for standing in standings]
    rows.insert(2, ["by seed", *seeds])
    return rows


def verdict(standings: Sequence[Standing], by: str) -> str:
    """Return whether the best two towers differ beyond the noise of the seeds; "" with one tower or seed."""
    if len(standings) < 2 or len(standings[0].records) < 2:
        return ""
    first, second = standings[:2]
    gap = first.mean(by) - second.mean(by)
    error = math.hypot(*(s.deviation(by) / math.sqrt(len(s.records)) for s in (first, second)))
    size = "more than" if gap > 2 * error else "within"
    return (
        f"{first.tower} leads {second.tower} by {100 * gap:.1f}, {size} twice the standard error of the "
        f"seeds ({100 * error:.1f})"
    )


def format_race(standings: Sequence[Standing], by: str) -> str:
    """Format the ranking for a terminal, and whether the best two differ beyond the noise."""
    table = format_table(table_of(standings, by), left=(0,))
    return f"{table}\n{verdict(standings, by)}".rstrip()


def as_json(standings: Sequence[Standing], by: str) -> dict[str, Any]:
    """Return the ranking as plain values from 0 to 1."""
    return {
        "by": by,
        "towers": [
            {"tower": s.tower, "runs": [r.path for r in s.records], "figures": s.figures} for s in standings
        ],
    }


def race_page(standings: Sequence[Standing], by: str) -> str:
    """Render the ranking and the curves of all runs as one HTML page."""
    records = [record for standing in standings for record in standing.records]
    head, *rows = table_of(standings, by)
    return comparison_page(records, "lit-fast race", Table(head, rows, "runs"), verdict(standings, by))


def _common(records: Sequence[Record]) -> dict[str, list[float]]:
    names = [name for name in records[0].final if all(name in r.final for r in records)]
    return {name: [r.final[name] for r in records] for name in names}


def _percent(standing: Standing, name: str) -> str:
    deviation = standing.deviation(name)
    noise = "" if math.isnan(deviation) else f" ± {100 * deviation:.1f}"
    return f"{100 * standing.mean(name):.1f}{noise}"
