"""One line of a terminal: its styles, where it may break, how it is shortened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rich.text import Text as Styled

from stillnorm.reports.document import Style, Text, spans

_STYLES: dict[Style, str] = {
    "": "",
    "error": "bold red",
    "warning": "bold yellow",
    "info": "bold cyan",
    "dim": "dim",
    "strong": "bold",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # C0, C1, lines, no text
_GAP = re.compile(r"(?<=\S) +(?=[^\s%])")  # where a line may break: not before a percent sign


def styled(text: Text) -> Styled:
    """Return the text as rich writes it; nothing in a name reaches the terminal as a command."""
    return Styled.assemble(*((escaped(part.text), _STYLES[part.style]) for part in spans(text)))


def escaped(text: str) -> str:
    r"""Write out control characters: names in foreign files may hold any.

    Example:
        >>> escaped("layer\n::error::x")
        'layer\\n::error::x'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def wrap(line: Styled, width: int, hanging: int = 0) -> list[Styled]:
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
    return [*lines, rstripped(Styled.assemble(" " * indent, line))]


def shortened(line: Styled, width: int) -> Styled:
    """Leave out the middle, two thirds of what stays is the end: a path's end says most."""
    head = (width - 1) // 3
    tail = width - 1 - head
    return Styled.assemble(line[:head], "…", line[len(line) - tail :])


def indented(lines: Iterable[Styled], indent: int) -> Iterator[Styled]:
    """Move lines to the right."""
    for line in lines:
        yield Styled.assemble(" " * indent, line) if line else line


def rstripped(line: Styled) -> Styled:
    """Return the line without spaces at its end."""
    line = line.copy()
    line.rstrip()
    return line
