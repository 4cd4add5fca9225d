"""Charts: the axis holds the values, and thinning loses no peak."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.report.charts import COLOURS, Series, chart, thin, ticks

finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(finite, finite, st.booleans())
def test_ticks_are_few_and_cover_the_values(a: float, b: float, zero: bool) -> None:
    low, high = sorted((a, b))
    marks = ticks(low, high, zero)
    assert 2 <= len(marks) <= 8
    slack = 1e-6 * max(abs(low), abs(high))  # of ticks that are equal but for rounding
    assert marks[0] <= low + slack
    assert high - slack <= marks[-1]
    if zero:
        assert marks[0] <= slack
        assert marks[-1] >= -slack
    distances = [y - x for x, y in pairwise(marks)]
    assert min(distances) > 0
    assert max(distances) == pytest.approx(min(distances), rel=1e-3)


@given(st.lists(finite, max_size=3000), st.integers(10, 500))
def test_thin_keeps_ends_order_and_extremes(values: list[float], most: int) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        assert max(v for _, v in kept) == max(values)
        assert min(v for _, v in kept) == min(values)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=9), st.booleans(), st.booleans())
def test_chart_draws_every_point_inside_the_picture(
    values: list[tuple[float, float]], percent: bool, zero: bool
) -> None:
    series = [Series(f"<{i}>", [(0.0, a), (7.0, b)]) for i, (a, b) in enumerate(values)]
    text = chart(series, percent=percent, zero=zero, unit="hours")
    width, height = (float(v) for v in re.findall(r'viewBox="0 0 (\d+) (\d+)"', text)[0])
    drawn = re.findall(r'points="([^"]*)"', text)
    assert len(drawn) == len(values)
    for x, y in (pair.split(",") for line in drawn for pair in line.split()):
        assert 0 <= float(x) <= width
        assert math.isfinite(float(y))
        assert -1 <= float(y) <= height + 1
    assert "<0>" not in text  # a name is text


def test_chart_of_more_lines_than_colours_repeats_them_dashed() -> None:
    text = chart([Series(f"run {i}", [(0, i), (1, i)]) for i in range(COLOURS + 1)])
    assert text.count('class="line s1"') == text.count('class="line s1 again"') == 1
    assert f"run {COLOURS}" in text


@pytest.mark.parametrize("points", [[], [(1.0, 0.0)], [(0.0, 3.0), (5.0, float("nan")), (9.0, 1e-5)]])
def test_chart_of_degenerate_series_is_valid(points: list[tuple[float, float]]) -> None:
    text = chart([Series("loss", points)], percent=False)
    assert "nan" not in text
    coordinates = re.findall(r'points="([^"]*)"', text)
    assert len(coordinates) == bool(points)


def test_chart_is_drawn_to_scale() -> None:
    text = chart([Series("first", [(0, 0.0), (100, 1.0)], chance=0.5)], percent=True)
    (start, end) = re.findall(r"([\d.]+),([\d.]+)", re.findall(r'points="([^"]*)"', text)[0])
    middle = re.findall(r'class="chance s1" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)"', text)[0]
    assert (float(start[0]), float(end[0])) == (float(middle[0]), float(middle[1]))
    assert float(middle[2]) == pytest.approx((float(start[1]) + float(end[1])) / 2)


@pytest.mark.parametrize("value", [0.51, 1.0, 1 + 1e-12, 1.7])
def test_chart_of_shares_has_no_mark_above_100_percent(value: float) -> None:
    text = chart([Series("mfu", [(0, 0.1), (9, value)])], percent=True)
    marks = [float(mark) for mark in re.findall(r'text-anchor="end">([\d.]+) %<', text)]
    assert marks == [0, 25, 50, 75, 100]
    assert f"{100 * value:.1f} %" in text


def test_charts_that_cover_the_same_values_share_the_axis() -> None:
    low, high = [(0, 0.0), (9, 0.05)], [(0, 0.1), (9, 0.42)]
    values = [y for _, y in low + high]
    marks = [
        re.findall(r'text-anchor="end">([\d.]+) %<', chart([Series("r", p)], percent=True, covers=values))
        for p in (low, high)
    ]
    assert marks[0] == marks[1] == ["0", "10", "20", "30", "40", "50"]
