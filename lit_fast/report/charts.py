"""Line charts as inline SVG; `lit_fast.report.html` has the colours."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

COLOURS = 8  # classes s1 to s8; further lines begin again, dashed
_POINTS = 400  # of a line: more cannot be told apart
_DOTS = 40  # a line of so few points shows them
_FEW = 3  # lines that are labelled at their ends
_SHORT = 15  # characters that fit there; longer names, and more lines, have a legend below
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480, 290, 58, 14, 36


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: list[tuple[float, float]]
    chance: float | None = None


class _Frame(NamedTuple):
    """Where the values of a chart lie in the picture."""

    right: float  # margin, which holds the labels of the lines
    end: float  # largest horizontal value; the smallest is zero
    low: float
    high: float
    percent: bool
    unit: str

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - self.right) * x / (self.end or 1),
            _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - self.low) / (self.high - self.low),
        )

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


def chart(series: Sequence[Series], *, percent: bool = False, unit: str = "steps", zero: bool = True) -> str:
    """Lines over steps or hours, which start at zero; dots mark chance levels.

    Args:
      percent: values are shares; the axis goes to 100 % where the half is passed.
      unit: of the horizontal axis, "steps" or "hours".
      zero: whether the vertical axis has to reach zero.
    """
    series = [s._replace(points=thin([p for p in s.points if math.isfinite(p[1])])) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return '<p class="note">Nothing was recorded.</p>'
    few = len(series) <= _FEW
    named = percent and few and len(series) > 1 and all(len(s.name) <= _SHORT for s in series)
    values = [y for s in series for _, y in s.points] + [s.chance for s in series if s.chance is not None]
    whole = percent and min(values) >= 0 and 0.5 < max(values) <= 1
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if whole else ticks(min(values), max(values), zero or percent)
    right = 104 if named else 70 if few else 16
    end = max(x for s in series for x, _ in s.points)
    frame = _Frame(right, end, marks[0], marks[-1], percent, unit)
    last = ", ".join(f"{s.name} {frame.shown(s.points[-1][1])}" for s in series)
    described = html.escape(f"Over the {unit} of training; at the end: {last}", quote=True)
    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{described}">']
    out += _grid(frame, marks)
    for number, line in enumerate(series):
        out += _line(frame, line, _colour(number))
    if few:
        out += _ends(frame, series, named)
    out.append("</svg>")
    if len(series) > 1 and not named:
        entries = [
            f'<li class="{_colour(number)}"><i></i>{html.escape(line.name)} {frame.shown(line.points[-1][1])}</li>'
            for number, line in enumerate(series)
        ]
        out.append(f'<ul class="legend">{"".join(entries)}</ul>')
    return "".join(out)


def _grid(frame: _Frame, marks: Sequence[float]) -> Iterator[str]:
    for mark in marks:
        x, y = frame.at(frame.end or 1, mark)
        label = f"{100 * mark:.4g} %" if frame.percent else _brief(mark, 10)
        yield f'<line class="grid" x1="{_LEFT}" x2="{x:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = share * frame.end
        x = frame.at(value, frame.low)[0]
        label = f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"
        label += f" {frame.unit}" if share == 1 else ""
        yield f'<text x="{x:.1f}" y="{_HEIGHT - 14}" text-anchor="{anchor}">{label}</text>'


def _line(frame: _Frame, line: Series, colour: str) -> Iterator[str]:
    name = html.escape(line.name)
    points = [frame.at(x, y) for x, y in line.points]
    if line.chance is not None:
        (x1, y), (x2, _) = frame.at(0, line.chance), frame.at(frame.end, line.chance)
        tip = f"<title>chance, {name}: {frame.shown(line.chance)}</title>"
        yield f'<line class="chance {colour}" x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}">{tip}</line>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline class="line {colour}{"" if len(points) <= _DOTS else " dense"}" points="{path}"/>'
    if len(points) > _DOTS:
        return
    for (x, y), (when, value) in zip(points, line.points, strict=True):
        place = f"step {when:,.0f}" if frame.unit == "steps" else f"{when:.3g} {frame.unit}"
        tip = f"<title>{place}: {name} {frame.shown(value)}</title>"
        yield f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>'


def _ends(frame: _Frame, series: Sequence[Series], named: bool) -> Iterator[str]:
    """The names of the lines or their last values, beside their ends."""
    places = _apart([frame.at(*s.points[-1])[1] for s in series], 15)
    for number, (line, y) in enumerate(zip(series, places, strict=True)):
        value = line.points[-1][1]
        text = line.name if named else frame.shown(value) if frame.percent else _brief(value, 3)
        place = f'x="{_WIDTH - frame.right + 8}" y="{y + 4:.1f}"'
        yield f'<text class="name {_colour(number)}" {place}>{html.escape(text)}</text>'


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


# How the figures of a run are drawn: headings, axes and order.


# In the order in which they are shown; what is not here has its own name for a heading and comes last.
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "temperature": "Temperature",
    "bias": "Bias",
    "grad_norm": "Norm of the gradients",
    "update_norm": "Norm of the updates",
    "param_norm": "Norm of the parameters",
    "pairs_per_second": "Pairs per second",
    "data_wait_share": "Share of the time that waits for data",
    "mfu": "MFU: share of the chips' peak",
}
_SHARES = ("data_wait_share", "mfu")
# They move little about a value of their own, which is not zero.
_FAR_FROM_ZERO = ("temperature", "bias", "param_norm")


def title(name: str) -> str:
    """The heading of a figure's chart."""
    return TITLES.get(name, name if "/" in name else name.replace("_", " ").capitalize())


def panel(heading: str, name: str, series: Sequence[Series], *, hours: bool = False) -> str:
    """A chart of the figure `name`, of one run or of several, under a heading (text)."""
    share = "/" in name or name in _SHARES  # figures of evaluations have a slash
    unit = "hours" if hours else "steps"
    drawn = chart(series, percent=share, unit=unit, zero=name not in _FAR_FROM_ZERO)
    return f"<div><h2>{html.escape(heading)}</h2>{drawn}</div>"
