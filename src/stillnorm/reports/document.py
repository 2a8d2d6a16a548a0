"""The document model: what a report says, apart from how it is written.

All of it is frozen data. Blocks follow each other without a gap, except that every `Heading` and
every `Diagnostic` is set apart; ``Line("")`` makes a blank line anywhere else. In a page, blank
lines separate paragraphs and are otherwise of no account.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
Style = Literal["", "error", "warning", "info", "dim", "strong"]


@dataclass(frozen=True)
class Span:
    """A run of text in one style. Colour is for the severity word and the worst number only."""

    text: str
    style: Style = ""


Text = str | Span | tuple[str | Span, ...]


def spans(text: Text) -> tuple[Span, ...]:
    """Return the text as spans.

    Example:
        >>> spans(("eval ", Span("21.4 %", "error")))
        (Span(text='eval ', style=''), Span(text='21.4 %', style='error'))
    """
    parts = text if isinstance(text, tuple) else (text,)
    return tuple(part if isinstance(part, Span) else Span(part) for part in parts)


def plain(text: Text) -> str:
    """Return the text without its styles.

    Example:
        >>> plain(("eval ", Span("21.4 %", "error")))
        'eval 21.4 %'
    """
    return "".join(span.text for span in spans(text))


@dataclass(frozen=True)
class Line:
    """One line of prose, `indent` characters from the left. ``Line("")`` is a blank line."""

    text: Text
    indent: int = 0


@dataclass(frozen=True)
class Heading:
    """A heading; `level` 2 opens a section, 3 a part of one."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Args:
        header: One name per column; ``()`` for a table without a header row.
        rows: One cell per column in each row.
        align: One letter per column: ``l`` for text, ``r`` for numbers, which are never cut.
        indent: Characters from the left, in text.
        gap: Characters between columns, in text.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    align: str
    indent: int = 0
    gap: int = 2


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    Args:
        severity: ``error``, ``warning`` or ``info``.
        code: The rule's code, ``SN201``.
        slug: The rule's name, ``shared-layer``.
        message: What is the case, lower case, without a full stop; never what to do about it.
        where: One line per place, the first most important.
        evidence: The numbers.
        notes: Pairs of a label (``note``, ``also``, ``explains``, ``help``, ``fix``) and a text.
    """

    severity: Severity
    code: str
    slug: str
    message: str
    where: tuple[str, ...] = ()
    evidence: Table | None = None
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Bar:
    """One value to compare; `aside` says in a few words what it means."""

    label: str
    value: float
    aside: str = ""
    style: Style = ""


@dataclass(frozen=True)
class Bars:
    """Values of one quantity side by side, each in `unit`: 98.4 with the unit ``%``."""

    title: str
    bars: tuple[Bar, ...]
    unit: str = ""


@dataclass(frozen=True)
class Series:
    """One distribution: `counts[i]` lie between `edges[i]` and `edges[i + 1]`."""

    label: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Histogram:
    """Distributions of one quantity, under each other on one axis."""

    title: str
    series: tuple[Series, ...]
    unit: str = ""


@dataclass(frozen=True)
class Quote:
    """What somebody wrote, and where."""

    text: str
    source: str


@dataclass(frozen=True)
class Code:
    """Source text, written as it is."""

    text: str
    language: str = "python"


Block = Line | Heading | Table | Diagnostic | Bars | Histogram | Quote | Code


@dataclass(frozen=True)
class Document:
    """A report: its title is the first line of the text and the headline of the page."""

    title: str
    blocks: tuple[Block, ...]
