"""The shapes of the plots: where a bar begins and ends, the outline of a histogram.

Shapes are in percent of the plot's width and height; labels stand beside the plot as text, so
that they are readable at every width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stillnorm.reports.document import Bar, Bars, Histogram, Series
from stillnorm.reports.numbers import number, short


def measure(value: float, unit: str) -> str:
    """Write a value with its unit; percent take one decimal.

    Example:
        >>> measure(21.4, "%"), measure(0.4, "mIoU"), measure(3, "")
        ('21.4 %', '0.40 mIoU', '3.00')
    """
    shown = f"{value:.1f}" if unit == "%" else number(value)
    return f"{shown} {unit}".rstrip()


def moments(series: Series) -> tuple[float, float, float, float]:
    r"""Return (low, high, mean, deviation): the filled range and the moments of the bin centres.

    .. math:: \mu = \frac{\sum_i n_i c_i}{\sum_i n_i}, \quad
              \sigma^2 = \frac{\sum_i n_i (c_i - \mu)^2}{\sum_i n_i}

    All are NaN when nothing was counted.

    Example:
        >>> moments(Series("x", edges=(-3.0, -1.0, 1.0, 3.0), counts=(0, 1, 1)))
        (-1.0, 3.0, 1.0, 1.0)
    """
    n = series.counts
    filled = [i for i, count in enumerate(n) if count > 0]
    if not filled:
        return math.nan, math.nan, math.nan, math.nan
    c = [(a + b) / 2 for a, b in zip(series.edges[:-1], series.edges[1:], strict=True)]
    total = math.fsum(n)
    mean = math.fsum(ni * ci for ni, ci in zip(n, c, strict=True)) / total
    var = math.fsum(ni * (ci - mean) ** 2 for ni, ci in zip(n, c, strict=True)) / total
    return series.edges[filled[0]], series.edges[filled[-1] + 1], mean, math.sqrt(var)


# -------------------------------------------------------------------------------- bars


@dataclass(frozen=True)
class BarShape:
    """One bar: the value as text, the bar from `start` for `length` percent of the width."""

    bar: Bar
    value: str
    start: float
    length: float


def bars(block: Bars) -> list[BarShape]:
    """Lay the bars out on one scale from zero; percent reach to 100. No bar for NaN or infinity.

    Example:
        >>> [(b.start, b.length) for b in bars(Bars("", (Bar("a", 2), Bar("b", -2))))]
        [(50.0, 50.0), (0.0, 50.0)]
    """
    finite = [bar.value for bar in block.bars if math.isfinite(bar.value)]
    low = min(0.0, *finite, 0.0)
    high = max(0.0, *finite, 100.0 if block.unit == "%" else 0.0)
    width = (high - low) or 1.0

    def shape(bar: Bar) -> BarShape:
        value = bar.value if math.isfinite(bar.value) else 0.0
        start = 100 * (min(value, 0.0) - low) / width
        return BarShape(bar, measure(bar.value, block.unit), start, 100 * abs(value) / width)

    return [shape(bar) for bar in block.bars]


# -------------------------------------------------------------------------------- histograms


@dataclass(frozen=True)
class SeriesShape:
    """One histogram: an SVG path of its outline and the place of its mean, in percent."""

    label: str
    outline: str
    mean: float | None
    summary: tuple[str, ...]


@dataclass(frozen=True)
class HistogramShape:
    """Histograms under each other on one axis, whose ticks are (place in percent, text)."""

    series: list[SeriesShape]
    ticks: list[tuple[float, str]]


def histogram(block: Histogram) -> HistogramShape:
    """Lay the series out on one axis over all that was counted, each scaled to its own peak."""
    ranges = [moments(series)[:2] for series in block.series]
    finite = [r for r in ranges if all(map(math.isfinite, r))]
    low = min((a for a, _ in finite), default=0.0)
    high = max((b for _, b in finite), default=1.0)
    width = (high - low) or 1.0

    def place(x: float) -> float:
        return 100 * (min(max(x, low), high) - low) / width

    shapes = []
    for series in block.series:
        _, _, mean, deviation = moments(series)
        counted = math.isfinite(mean)
        shapes.append(
            SeriesShape(
                series.label,
                _outline(series, place) if counted else "",
                place(mean) if counted else None,
                (f"mean {number(mean)}", f"sd {number(deviation)}") if counted else ("no values",),
            )
        )
    return HistogramShape(shapes, [(place(x), short(x)) for x in _ticks(low, high)])


def _outline(series: Series, place: Callable[[float], float]) -> str:
    """Draw the densities (counts per width of the bin) as steps, 4 percent below the top."""
    bins = list(zip(series.counts, series.edges[:-1], series.edges[1:], strict=True))
    density = [n / (b - a) if b > a else 0.0 for n, a, b in bins]
    peak = max(density) or 1.0
    steps = "".join(
        f"V{100 - 96 * d / peak:.2f}H{place(b):.2f}"
        for d, (_, _, b) in zip(density, bins, strict=True)
    )
    return f"M{place(series.edges[0]):.2f} 100{steps}V100Z"


def _ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers from low to high, as far apart as can be."""
    decade = 10.0 ** math.floor(math.log10((high - low) or 1.0))
    ticks: list[float] = []
    for step in (5 * decade, 2 * decade, decade, decade / 2, decade / 5):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = [i * step for i in range(first, last + 1)]
        if len(ticks) >= 3:
            break
    return ticks
