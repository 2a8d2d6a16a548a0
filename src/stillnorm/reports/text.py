"""The text writer: what people see in a terminal and paste into a forum.

Numbers aligned, no box drawing, nothing wider than the page unless it is a number. Colour stands
on the severity word and the worst number only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

from rich.text import Text as Styled

from stillnorm.reports.charts import measure, moments
from stillnorm.reports.document import (
    Bars,
    Block,
    Code,
    Diagnostic,
    Document,
    Heading,
    Histogram,
    Line,
    Quote,
    Span,
    Table,
)
from stillnorm.reports.lines import escaped, indented, rstripped, styled, wrap
from stillnorm.reports.numbers import number, span
from stillnorm.reports.tables import lay_out


def write(document: Document, *, width: int = 100, color: bool = False) -> str:
    """Write the document as text.

    A table too wide for the page has its paths shortened in the middle; a last column of prose
    wraps. Numbers are never cut.

    Args:
        document: What to write.
        width: Characters per line.
        color: Whether to write ANSI colours.

    Returns: The text, without a newline at the end.

    Example:
        >>> print(write(Document("Net: 1 finding", (Table((), (("eval", "21.4 %"),), "lr"),))))
        Net: 1 finding
        <BLANKLINE>
        eval  21.4 %
    """
    lines = list(_lines(document, width))
    while lines and not lines[-1]:
        lines.pop()
    if not color:
        return "\n".join(line.plain for line in lines)
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, color_system="standard", legacy_windows=False, no_color=False
    )
    console.print(Styled("\n").join(lines), soft_wrap=True, end="")
    return out.getvalue()


def _lines(document: Document, width: int) -> Iterator[Styled]:
    """Yield the document's lines; never two blank ones in a row, none at the start."""
    blank = True  # nothing stands above the first line
    apart = False
    if document.title:
        yield from wrap(styled(document.title), width, 2)
        apart, blank = True, False
    for block in document.blocks:
        set_apart = isinstance(block, Heading | Diagnostic)
        if (apart or set_apart) and not blank:
            yield Styled()
            blank = True
        for line in _block(block, width):
            if line or not blank:
                yield line
            blank = not line
        apart = isinstance(block, Diagnostic)


def _block(block: Block, width: int) -> Iterator[Styled]:
    match block:
        case Line():
            yield from indented(wrap(styled(block.text), width - block.indent, 2), block.indent)
        case Heading():
            yield from wrap(styled(Span(block.text, "strong")), width)
        case Table():
            yield from lay_out(block, width)
        case Diagnostic():
            yield from _diagnostic(block, width)
        case Bars():
            yield from _titled(block.title, _bars(block), width)
        case Histogram():
            yield from _titled(block.title, _histogram(block), width)
        case Quote():
            yield from _quote(block, width)
        case Code():
            yield from indented((styled(line) for line in block.text.splitlines()), 4)


def _titled(title: str, table: Table, width: int) -> Iterator[Styled]:
    if title:
        yield from wrap(styled(title), width)
    yield from lay_out(table, width)


def _bars(block: Bars) -> Table:
    rows = tuple(
        (bar.label, Span(measure(bar.value, block.unit), bar.style), bar.aside)
        for bar in block.bars
    )
    return Table((), rows, "lrl", indent=2, gap=3)


def _histogram(block: Histogram) -> Table:
    rows = []
    for series in block.series:
        low, high, mean, deviation = moments(series)
        if math.isnan(mean):
            rows.append((series.label, "no values", "-", "-"))
        else:
            rows.append((series.label, span(low, high), number(mean), number(deviation)))
    return Table(("", f"range {block.unit}".rstrip(), "mean", "sd"), tuple(rows), "lrrr", indent=2)


def _quote(block: Quote, width: int) -> Iterator[Styled]:
    """Yield the words in quotation marks, the source at the right edge."""
    lines = wrap(styled(f'"{block.text}"'), width, 1)
    source = escaped(block.source)
    room = width - lines[-1].cell_len - len(source)
    if room >= 2:
        lines[-1].append(" " * room + source)
    else:
        lines.append(styled(source.rjust(width)))
    yield from lines


def _diagnostic(block: Diagnostic, width: int) -> Iterator[Styled]:
    head = (Span(block.severity, block.severity), f"[{block.code}] {block.slug}: {block.message}")
    yield from wrap(styled(head), width, 4)
    for where in block.where:
        yield from wrap(styled(f"  --> {where}"), width, 6)
    if block.evidence is not None:
        for line in lay_out(block.evidence, width - 6):
            yield rstripped(Styled.assemble("   |  ", line))
    for label, text in block.notes:
        opening = f"   = {label}: "
        yield from wrap(styled(opening + text), width, len(opening))
