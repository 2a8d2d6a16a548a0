"""Numbers as people read them: few digits, the same everywhere."""

from __future__ import annotations

import math


def number(x: float, digits: int = 2) -> str:
    """Write a number for a column: `digits` decimals, or that many figures when it is small.

    Example:
        >>> [number(x) for x in (0.812, 17.271, 0.00123, 4e-9, 0, 250240, float("nan"))]
        ['0.81', '17.27', '0.0012', '4.0e-09', '0.00', '250240', 'nan']
    """
    if not math.isfinite(x):
        return str(x)
    magnitude = abs(x)
    if magnitude == 0:
        return f"{0:.{digits}f}"
    if magnitude < 1e-4 or magnitude >= 1e7:
        return f"{x:.{digits - 1}e}"
    if magnitude < 0.1:
        return f"{x:.{digits - 1 - math.floor(math.log10(magnitude))}f}"
    return f"{x:.{digits if magnitude < 1000 else 0}f}"


def short(x: float, digits: int = 2) -> str:
    """Write a number for running text: `digits` significant figures, no trailing zeros.

    Example:
        >>> [short(x) for x in (0.0912, 4.13, 17.27, 1.0, 25024, 3e-9)]
        ['0.091', '4.1', '17', '1', '25024', '3e-09']
    """
    if math.isfinite(x) and 10**digits <= abs(x) < 1e7:
        return f"{x:.0f}"
    return f"{x:.{digits}g}" if x else "0"


def span(low: float, high: float) -> str:
    """Write a range.

    Example:
        >>> span(0.0912, 4.13)
        '0.091 .. 4.1'
    """
    return f"{short(low)} .. {short(high)}"


def percent(fraction: float) -> str:
    """Write a fraction in percent, with one decimal.

    Example:
        >>> percent(0.984)
        '98.4 %'
    """
    return f"{100 * fraction:.1f} %"


def count(n: int, noun: str) -> str:
    """Write a number of things.

    Example:
        >>> count(1, "layer"), count(3, "layer"), count(0, "batch")
        ('1 layer', '3 layers', '0 batches')
    """
    if n == 1:
        return f"1 {noun}"
    return f"{n} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def size(n: int) -> str:
    """Write a number of bytes.

    Example:
        >>> size(512), size(1_258_291)
        ('512 B', '1.2 MiB')
    """
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
