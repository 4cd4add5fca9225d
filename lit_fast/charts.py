"""Line charts as inline SVG; `lit_fast.document` has the colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

COLOURS = 8  # classes s1 to s8; further lines begin again, dashed
_POINTS = 400  # of a line: more cannot be told apart
_NAMED = 3  # lines that are named beside their ends; more have a legend below


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: list[tuple[float, float]]
    chance: float | None = None


def chart(series: Sequence[Series], *, percent: bool = False, unit: str = "steps", zero: bool = True) -> str:
    """Lines over steps or hours, which start at zero; dashes mark chance levels.

    Args:
      percent: values are shares; the axis goes to 100 % where the half is passed.
      unit: of the horizontal axis.
      zero: whether the vertical axis has to reach zero.
    """
    series = [s._replace(points=thin([p for p in s.points if math.isfinite(p[1])])) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return '<p class="note">Nothing was recorded.</p>'
    beside = len(series) <= _NAMED
    width, height, left, top, bottom = 480, 290, 58, 14, 36
    right = (104 if percent and len(series) > 1 else 70) if beside else 16
    end = max(x for s in series for x, _ in s.points)
    values = [y for s in series for _, y in s.points] + [s.chance for s in series if s.chance is not None]
    whole = percent and min(values) >= 0 and 0.5 < max(values) <= 1
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if whole else ticks(min(values), max(values), zero or percent)
    low, high = marks[0], marks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * x / (end or 1),
            height - bottom - (height - top - bottom) * (min(y, high) - low) / (high - low),
        )

    def shown(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"

    last = ", ".join(f"{s.name} {shown(s.points[-1][1])}" for s in series)
    described = html.escape(f"Over the {unit} of training; at the end: {last}", quote=True)
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{described}">']
    for mark in marks:
        y = at(0, mark)[1]
        label = f"{100 * mark:.4g} %" if percent else _brief(mark, 10)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = at(share * end, low)[0]
        label = f"{share * end:,.0f}" if end >= 10 or share == 0 else f"{share * end:.2g}"
        label += f" {unit}" if share == 1 else ""
        out.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="{anchor}">{label}</text>')
    for number, line in enumerate(series):
        colour = _colour(number)
        points = [at(x, y) for x, y in line.points]
        if line.chance is not None:
            (x1, y1), (x2, _) = at(0, line.chance), at(end, line.chance)
            tip = f"<title>chance, {html.escape(line.name)}: {shown(line.chance)}</title>"
            out.append(
                f'<line class="chance {colour}" x1="{x1}" x2="{x2}" y1="{y1:.1f}" y2="{y1:.1f}">{tip}</line>'
            )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(points) <= 40:
            for (x, y), (when, value) in zip(points, line.points, strict=True):
                tip = f"<title>{when:,.4g} {unit}: {html.escape(line.name)} {shown(value)}</title>"
                out.append(f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    if beside:
        labels = _apart([at(*s.points[-1])[1] for s in series], 15)
        for number, (line, label_y) in enumerate(zip(series, labels, strict=True)):
            ending = f"{100 * line.points[-1][1]:.1f} %" if percent else _brief(line.points[-1][1], 3)
            text = html.escape(line.name) if percent and len(series) > 1 else ending
            place = f'x="{width - right + 8}" y="{label_y + 4:.1f}"'
            out.append(f'<text class="name {_colour(number)}" {place}>{text}</text>')
    out.append("</svg>")
    if len(series) > 1 and not (beside and percent):
        names = [
            f'<li class="{_colour(number)}"><i></i>{html.escape(line.name)} {shown(line.points[-1][1])}</li>'
            for number, line in enumerate(series)
        ]
        out.append(f'<ul class="legend">{"".join(names)}</ul>')
    return "".join(out)


def thin(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """At most so many of the points, in their order; the first, the last and every peak stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 2) / ((most - 2) // 2))
    kept = [0]
    for _, group in groupby(range(1, len(points) - 1), lambda i: (i - 1) // size):
        inside = list(group)
        extremes = {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
        kept += sorted(extremes)
    return [points[i] for i in [*kept, len(points) - 1]]


def ticks(low: float, high: float, zero: bool = True) -> list[float]:
    """Four to seven round numbers at equal distances that reach from `low`, or from zero, to `high`."""
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    distance = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [i * distance for i in range(first, last + 1)]


def _brief(value: float, digits: int) -> str:
    """So short that it fits beside the chart: 46.5k, 3e-06."""
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{min(digits, 2)}g}"


def _colour(number: int) -> str:
    return f"s{number % COLOURS + 1}" + (" again" if number >= COLOURS else "")


def _apart(positions: Sequence[float], least: float) -> list[float]:
    """The positions, moved down where they are closer than `least`."""
    out = list(positions)
    order = sorted(range(len(out)), key=lambda i: out[i])
    for above, below in pairwise(order):
        out[below] = max(out[below], out[above] + least)
    return out
