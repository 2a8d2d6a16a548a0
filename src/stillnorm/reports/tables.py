"""Tables in a terminal: numbers under each other, and nothing wider than the page.

What does not fit is narrowed in this order: prose in the last column wraps, to a third of the page;
paths are shortened in the middle, where they say least; the prose wraps further; other text is
shortened; and a table with more columns than the page can hold goes on below, its first column
repeated. Numbers are never cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text as Styled

from stillnorm.reports.document import Span, Table, plain
from stillnorm.reports.lines import rstripped, shortened, styled, wrap

_NARROWEST = 12  # a text column is not cut below this
_PROSE = 24  # a wider last column of text is prose; it is not wrapped below this


def lay_out(table: Table, width: int) -> Iterator[Styled]:
    """Yield the lines of a table on a page of `width` characters."""
    header = [tuple(Span(name) for name in table.header)] if any(table.header) else []
    cells = [[styled(cell) for cell in row] for row in (*header, *table.rows)]
    if not cells:
        return
    room = width - table.indent
    natural = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    prose = table.align.endswith("l") and natural[-1] > _PROSE
    fitted = _fit(natural, table, room, prose)
    columns = len(natural)
    if _extent(fitted, table) > room and columns > 2:
        fitting = [n for n in range(2, columns) if _extent(natural[:n], table) <= room]
        n = max(fitting, default=2)
        yield from lay_out(_part(table, range(n)), width)
        yield Styled()
        yield from lay_out(_part(table, (0, *range(n, columns))), width)
        return
    for row in cells:
        last = wrap(row[-1], fitted[-1]) if prose else [row[-1]]
        yield _row([*row[:-1], last[0]], fitted, table)
        for line in last[1:]:
            yield _row([Styled()] * (len(row) - 1) + [line], fitted, table)


def _extent(widths: Sequence[int], table: Table) -> int:
    return sum(widths) + table.gap * (len(widths) - 1)


def _fit(natural: Sequence[int], table: Table, room: int, prose: bool) -> list[int]:
    """Narrow the text columns until the table fits, or as far as may be."""
    fitted = list(natural)
    last = len(fitted) - 1
    text = [i for i, align in enumerate(table.align) if align == "l" and not (prose and i == last)]
    paths = [i for i in text if not any(" " in plain(row[i]) for row in table.rows)]
    steps = [(paths, _NARROWEST), (text, _NARROWEST)]
    if prose:
        steps = [([last], max(_PROSE, room // 3)), steps[0], ([last], _PROSE), steps[1]]
    for columns, narrowest in steps:
        while columns and _extent(fitted, table) > room:
            widest = max(columns, key=lambda i: fitted[i])
            if fitted[widest] <= narrowest:
                break
            fitted[widest] -= 1
    return fitted


def _part(table: Table, columns: Sequence[int]) -> Table:
    return Table(
        header=tuple(table.header[i] for i in columns) if table.header else (),
        rows=tuple(tuple(row[i] for i in columns) for row in table.rows),
        align="".join(table.align[i] for i in columns),
        indent=table.indent,
        gap=table.gap,
    )


def _row(cells: list[Styled], widths: list[int], table: Table) -> Styled:
    line = Styled(" " * table.indent)
    for i, (cell, width, align) in enumerate(zip(cells, widths, table.align, strict=True)):
        shown = cell if cell.cell_len <= width else shortened(cell, width)
        padding = " " * (width - shown.cell_len)
        line.append(" " * table.gap if i else "")
        line = Styled.assemble(line, *((padding, shown) if align == "r" else (shown, padding)))
    return rstripped(line)
