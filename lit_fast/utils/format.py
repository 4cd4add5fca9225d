"""Text for the terminal: tables, durations, sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def format_table(rows: Sequence[Sequence[str]], left: Collection[int] = (), width: int = 0) -> str:
    """Align cells in columns, two spaces apart.

    Args:
      rows: the header and the lines, equally long.
      left: numbers of the columns that are aligned to the left; the others are aligned to the right.
      width: characters at which a line is cut; 0: never.
    """
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line[: width or None].rstrip() for line in lines)


def format_duration(seconds: float) -> str:
    """Return `1m15s` for 75 seconds, and `?` for infinity or NaN."""
    if not seconds < 1e9:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_bytes(count: float) -> str:
    """Return `1.50 GiB` for 1.5 * 2**30, and MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
