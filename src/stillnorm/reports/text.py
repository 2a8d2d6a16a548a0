"""The text writer: what people see in a terminal and paste into a forum.

Numbers aligned, no box drawing, nothing wider than the page unless it is a number. Colour stands
on the severity word and the worst number only.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator

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
    Style,
    Table,
    Text,
    spans,
)
from stillnorm.reports.numbers import number, span

_STYLES: dict[Style, str] = {
    "": "",
    "error": "bold red",
    "warning": "bold yellow",
    "info": "bold cyan",
    "dim": "dim",
    "strong": "bold",
}
_GAP = re.compile(r"(?<=\S) +(?=[^\s%])")  # where a line may break: not before a percent sign
_NARROWEST = 12  # a text column is not cut below this
_PROSE = 24  # nor is a last column of prose wrapped below this, or below a third of the page


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
        yield from _wrap(_styled(document.title), width, 2)
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
            yield from _indented(_wrap(_styled(block.text), width - block.indent, 2), block.indent)
        case Heading():
            yield from _wrap(_styled(Span(block.text, "strong")), width)
        case Table():
            yield from _table(block, width)
        case Diagnostic():
            yield from _diagnostic(block, width)
        case Bars():
            yield from _titled(block.title, _bars(block), width)
        case Histogram():
            yield from _titled(block.title, _histogram(block), width)
        case Quote():
            yield from _quote(block, width)
        case Code():
            yield from _indented((_styled(line) for line in block.text.splitlines()), 4)


def _titled(title: str, table: Table, width: int) -> Iterator[Styled]:
    if title:
        yield from _wrap(_styled(title), width)
    yield from _table(table, width)


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
    lines = _wrap(_styled(f'"{block.text}"'), width, 1)
    room = width - lines[-1].cell_len - len(block.source)
    if room >= 2:
        lines[-1].append(" " * room + block.source)
    else:
        lines.append(_styled(block.source.rjust(width)))
    yield from lines


def _diagnostic(block: Diagnostic, width: int) -> Iterator[Styled]:
    head = (Span(block.severity, block.severity), f"[{block.code}] {block.slug}: {block.message}")
    yield from _wrap(_styled(head), width, 4)
    for where in block.where:
        yield from _wrap(_styled(f"  --> {where}"), width, 6)
    if block.evidence is not None:
        for line in _table(block.evidence, width - 6):
            yield _rstripped(Styled.assemble("   |  ", line))
    for label, text in block.notes:
        opening = f"   = {label}: "
        yield from _wrap(_styled(opening + text), width, len(opening))


# ------------------------------------------------------------------------------- tables


def _table(table: Table, width: int) -> Iterator[Styled]:
    header = [tuple(Span(name) for name in table.header)] if any(table.header) else []
    cells = [[_styled(cell) for cell in row] for row in (*header, *table.rows)]
    if not cells:
        return
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    prose = table.align.endswith("l") and widths[-1] > _PROSE
    widths = _fit(widths, table, width - table.indent, prose)
    for row in cells:
        last = _wrap(row[-1], widths[-1]) if prose else [row[-1]]
        yield _row([*row[:-1], last[0]], widths, table)
        for line in last[1:]:
            yield _row([Styled()] * (len(row) - 1) + [line], widths, table)


def _fit(widths: list[int], table: Table, room: int, prose: bool) -> list[int]:
    """Narrow the text columns until the table fits: prose wraps first, then the widest is cut."""
    fitted = list(widths)

    def excess() -> int:
        return sum(fitted) + table.gap * (len(fitted) - 1) - room

    if prose and excess() > 0:
        fitted[-1] = min(fitted[-1], max(_PROSE, room // 3, fitted[-1] - excess()))
    cut = [i for i, align in enumerate(table.align) if align == "l"]
    while excess() > 0 and cut:
        widest = max(cut, key=lambda i: fitted[i])
        if fitted[widest] <= _NARROWEST:
            break
        fitted[widest] -= 1
    return fitted


def _row(cells: list[Styled], widths: list[int], table: Table) -> Styled:
    line = Styled(" " * table.indent)
    for i, (cell, width, align) in enumerate(zip(cells, widths, table.align, strict=True)):
        shown = cell if cell.cell_len <= width else _shortened(cell, width)
        padding = " " * (width - shown.cell_len)
        line.append(" " * table.gap if i else "")
        line = Styled.assemble(line, *((padding, shown) if align == "r" else (shown, padding)))
    return _rstripped(line)


def _shortened(cell: Styled, width: int) -> Styled:
    """Leave out the middle, two thirds of what stays is the end: a path's end says most."""
    head = (width - 1) // 3
    tail = width - 1 - head
    return Styled.assemble(cell[:head], "…", cell[len(cell) - tail :])


# ------------------------------------------------------------------------------- lines


def _styled(text: Text) -> Styled:
    return Styled.assemble(*((part.text, _STYLES[part.style]) for part in spans(text)))


def _wrap(line: Styled, width: int, hanging: int = 0) -> list[Styled]:
    """Break at spaces; further lines are indented by `hanging`. A long word is not broken."""
    lines: list[Styled] = []
    indent = 0
    while line.cell_len > width - indent:
        gaps = [gap.span() for gap in _GAP.finditer(line.plain)]
        fitting = [gap for gap in gaps if gap[0] <= width - indent] or gaps
        if not fitting:
            break
        end, start = fitting[-1] if fitting is not gaps else gaps[0]
        lines.append(Styled.assemble(" " * indent, line[:end]))
        line = line[start:]
        indent = hanging
    return [*lines, _rstripped(Styled.assemble(" " * indent, line))]


def _indented(lines: Iterable[Styled], indent: int) -> Iterator[Styled]:
    for line in lines:
        yield Styled.assemble(" " * indent, line) if line else line


def _rstripped(line: Styled) -> Styled:
    line = line.copy()
    line.rstrip()
    return line
