"""Plots promise: lengths in proportion, areas in proportion, nothing outside the frame."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillnorm.reports import Bar, Bars, Histogram, Series
from stillnorm.reports.charts import bars, histogram, moments

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=8))
def test_bars_are_as_long_as_their_values(values):
    shapes = bars(Bars("", tuple(Bar("x", v) for v in values)))
    longest = max(abs(v) for v in values)
    for value, shape in zip(values, shapes, strict=True):
        assert 0 <= shape.start <= 100
        assert 0 <= shape.start + shape.length <= 100 + 1e-9
        if longest > 1e-3:
            reference = max(s.length for s in shapes)
            assert shape.length == pytest.approx(reference * abs(value) / longest)


def test_percent_reach_to_one_hundred():
    assert [shape.length for shape in bars(Bars("", (Bar("eval", 25.0),), "%"))] == [25.0]


def test_no_bar_for_what_is_not_a_number():
    shapes = bars(Bars("", (Bar("a", math.nan), Bar("b", math.inf), Bar("c", 2.0))))
    assert [shape.length for shape in shapes] == [0.0, 0.0, 100.0]
    assert [shape.value for shape in shapes] == ["nan", "inf", "2.00"]


def steps(outline: str) -> list[tuple[float, float]]:
    """Read (height, right edge) of every step out of an SVG path."""
    return [(100 - float(y), float(x)) for y, x in re.findall(r"V([\d.]+)H([\d.]+)", outline)]


def test_an_outline_shows_densities_not_counts():
    """Twice the count in twice the width is the same height."""
    shape = histogram(Histogram("", (Series("x", (0.0, 1.0, 3.0, 4.0), (1, 2, 2)),)))
    assert steps(shape.series[0].outline) == [(48.0, 25.0), (48.0, 75.0), (96.0, 100.0)]


def test_series_share_one_axis():
    narrow, wide = Series("a", (0.0, 1.0), (1,)), Series("b", (0.0, 10.0), (1,))
    shape = histogram(Histogram("", (narrow, wide)))
    assert [steps(s.outline)[-1][1] for s in shape.series] == [10.0, 100.0]
    assert [s.mean for s in shape.series] == [5.0, 50.0]
    assert [text for _, text in shape.ticks] == ["0", "5", "10"]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), finite, st.floats(1e-3, 1e3))
def test_moments_are_those_of_the_bin_centres(counts, low, width):
    edges = np.linspace(low, low + width * len(counts), len(counts) + 1)
    got = moments(Series("x", tuple(edges), tuple(counts)))
    if not any(counts):
        assert all(map(math.isnan, got))
        return
    values = np.repeat((edges[:-1] + edges[1:]) / 2, counts)
    assert got[2:] == pytest.approx((values.mean(), values.std()), rel=1e-9, abs=1e-6 * width)
    assert got[0] <= values.min()
    assert got[1] >= values.max()


@given(st.lists(st.tuples(finite, st.floats(1e-3, 1e3)), min_size=1, max_size=4))
def test_the_axis_has_a_few_round_ticks_inside_the_frame(ranges):
    series = tuple(Series("x", (low, low + width), (1,)) for low, width in ranges)
    ticks = histogram(Histogram("", series)).ticks
    assert 3 <= len(ticks) <= 8
    assert all(-1e-6 <= place <= 100 + 1e-6 for place, _ in ticks)


def test_nothing_counted_is_said():
    shape = histogram(Histogram("", (Series("x", (0.0, 1.0), (0,)),)))
    assert shape.series[0].summary == ("no values",)
    assert shape.series[0].outline == ""
