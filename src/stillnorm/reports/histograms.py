"""What a histogram says in four numbers."""

from __future__ import annotations

import math

from stillnorm.reports.document import Series


def moments(series: Series) -> tuple[float, float, float, float]:
    r"""Return (low, high, mean, deviation): the filled range and the moments of the bin centres.

    .. math:: \mu = \frac{\sum_i n_i c_i}{\sum_i n_i}, \quad
              \sigma^2 = \frac{\sum_i n_i (c_i - \mu)^2}{\sum_i n_i}

    All are NaN when nothing was counted.

    Example:
        >>> moments(Series("x", edges=(-3.0, -1.0, 1.0, 3.0), counts=(0, 1, 1)))
        (-1.0, 3.0, 1.0, 1.0)
    """
    filled = [i for i, n in enumerate(series.counts) if n > 0]
    if not filled:
        return math.nan, math.nan, math.nan, math.nan
    total = math.fsum(series.counts)
    centres = [(low + high) / 2 for low, high in zip(series.edges, series.edges[1:], strict=False)]
    mean = math.fsum(n * c for n, c in zip(series.counts, centres, strict=True)) / total
    square = (
        math.fsum(n * (c - mean) ** 2 for n, c in zip(series.counts, centres, strict=True)) / total
    )
    return series.edges[filled[0]], series.edges[filled[-1] + 1], mean, math.sqrt(square)
