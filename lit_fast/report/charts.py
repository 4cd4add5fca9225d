"""Line charts as inline SVG: the figures of a run over steps or hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

from lit_fast.report.page import fragment

COLOURS = 8  # classes s1 to s8 of style.css; further lines repeat them, dashed

# Headings of metrics, in the order of the charts. Others follow under their own names.
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "temperature": "Temperature",
    "bias": "Bias",
    "grad_norm": "Norm of the gradients",
    "update_norm": "Norm of the updates",
    "param_norm": "Norm of the parameters",
    "pairs_per_second": "Pairs per second",
    "images_per_second": "Decoded images per second",
    "unreadable_images": "Rows with unreadable images",
    "data_wait_share": "Share of the time that waits for data",
    "mfu": "MFU: share of the chips' peak",
}
_SHARES = ("data_wait_share", "mfu")
# Metrics whose changes are small beside their distance from zero: their axis does not start there.
_FAR_FROM_ZERO = ("temperature", "bias", "param_norm")

_MAX_POINTS = 400  # per line; more are indistinguishable
_MAX_DOTS = 40  # points are drawn as dots up to this number
_MAX_LABELS = 3  # lines that are labelled at their ends
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480, 290, 68, 14, 36
_LABEL_DISTANCE = 17.0
_MIN_RANGE = 0.02  # of an axis without zero, as a share of its largest value


class Series(NamedTuple):
    """A line of a chart: points (x, y), and the chance level, if there is one."""

    name: str
    points: list[tuple[float, float]]
    chance: float | None = None


class Panel(NamedTuple):
    """A chart below its heading, with an optional note."""

    heading: str
    chart: Markup
    note: str = ""


def panel(
    heading: str, metric: str, series: Sequence[Series], *, hours: bool = False, covers: Sequence[float] = ()
) -> Panel:
    """Draw a metric of one or several runs; the metric decides the axis, which also covers these values."""
    share = "/" in metric or metric in _SHARES  # names of evaluation metrics have a slash
    unit = "hours" if hours else "steps"
    zero = metric not in _FAR_FROM_ZERO
    return Panel(heading, chart(series, percent=share, unit=unit, zero=zero, covers=covers))


def title(metric: str) -> str:
    """Return the heading of a metric's chart."""
    return TITLES.get(metric, metric if "/" in metric else metric.replace("_", " ").capitalize())


def chart(
    series: Sequence[Series],
    *,
    percent: bool = False,
    unit: str = "steps",
    zero: bool = True,
    covers: Sequence[float] = (),
) -> Markup:
    """Draw lines over steps or hours, which start at 0.

    Args:
      series: values that are not finite are left out.
      percent: values are shares; above 50 % the axis ends at 100 %, and larger values are drawn there.
      unit: of the horizontal axis, "steps" or "hours".
      zero: whether the vertical axis includes zero.
      covers: values that the vertical axis includes too, so that charts of one unit can share it.
    """
    series = [s._replace(points=thin([p for p in s.points if math.isfinite(p[1])])) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return fragment("chart.html", lines=[])
    few = len(series) <= _MAX_LABELS
    right = _WIDTH - (76 if few else 16)
    marks = _y_marks(series, percent, zero, covers)
    end = max(x for s in series for x, _ in s.points) or 1

    def to_x(x: float) -> float:
        return _LEFT + (right - _LEFT) * x / end

    def to_y(y: float) -> float:
        return (
            _HEIGHT
            - _BOTTOM
            - (_HEIGHT - _TOP - _BOTTOM) * (min(y, marks[-1]) - marks[0]) / (marks[-1] - marks[0])
        )

    def value(y: float) -> str:
        return f"{100 * y:.1f} %" if percent else _brief(y, 4)

    def line(number: int, s: Series) -> dict[str, Any]:
        at = "step {:,.0f}" if unit == "steps" else "{:.3g} hours"
        tips = [f"{at.format(x)}: {s.name} {value(y)}" for x, y in s.points]
        points = [(to_x(x), to_y(y)) for x, y in s.points]
        return {
            "name": s.name,
            "colour": f"s{number % COLOURS + 1}" + (" again" if number >= COLOURS else ""),
            "last": value(s.points[-1][1]),
            "points": points,
            "dots": list(zip(points, tips, strict=True)) if len(points) <= _MAX_DOTS else [],
            "chance": None if s.chance is None else (to_y(s.chance), value(s.chance)),
        }

    lines = [line(i, s) for i, s in enumerate(series)]
    labels = []
    if few:
        ys = _spread([to_y(s.points[-1][1]) for s in series], _LABEL_DISTANCE)
        for s, drawn, y in zip(series, lines, ys, strict=True):
            last = drawn["last"] if percent else _brief(s.points[-1][1], 3)
            labels.append((y, last, drawn["colour"]))
    return fragment(
        "chart.html",
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=right,
        unit=unit,
        y_marks=[(to_y(m), f"{100 * m:.4g} %" if percent else _brief(m, 10)) for m in marks],
        x_marks=[
            (to_x(0), "0", "start"),
            (to_x(end / 2), _x_label(end / 2), "middle"),
            (to_x(end), f"{_x_label(end)} {unit}", "end"),
        ],
        lines=lines,
        end_labels=labels,
        legend=len(series) > 1,
    )


def _y_marks(series: Sequence[Series], percent: bool, zero: bool, covers: Sequence[float]) -> list[float]:
    values = [y for s in series for _, y in s.points] + [s.chance for s in series if s.chance is not None]
    values += [y for y in covers if math.isfinite(y)]
    if percent and min(values) >= 0 and max(values) > 0.5:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    low, high = min(values), max(values)
    if not (zero or percent):  # marks of a narrow range would have many digits
        margin = max(0.0, _MIN_RANGE * max(abs(low), abs(high)) - (high - low)) / 2
        low, high = low - margin, high + margin
    return ticks(low, high, zero or percent)


def _x_label(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def thin(points: Sequence[tuple[float, float]], most: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` of the points in order; the first, the last and all peaks are kept."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 2) / ((most - 2) // 2))
    kept = [0]
    for _, group in groupby(range(1, len(points) - 1), lambda i: (i - 1) // size):
        inside = list(group)
        kept += sorted({min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])})
    return [points[i] for i in [*kept, len(points) - 1]]


def ticks(low: float, high: float, zero: bool = True) -> list[float]:
    """Return two to eight round, equidistant numbers that cover `low` (or zero) to `high`."""
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-300):  # a constant
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if size > 1e-299 else (math.floor(low), 1.0)
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    distance = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [i * distance for i in range(first, last + 1)]


def _brief(value: float, digits: int) -> str:
    """Return a short number: 46.5k, 1,012, 3e-06."""
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:.{digits}g}{letter}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{min(digits, 2)}g}"


def _spread(positions: Sequence[float], distance: float) -> list[float]:
    """Move positions down where two are closer than `distance`."""
    out = list(positions)
    for above, below in pairwise(sorted(range(len(out)), key=lambda i: out[i])):
        out[below] = max(out[below], out[above] + distance)
    return out
