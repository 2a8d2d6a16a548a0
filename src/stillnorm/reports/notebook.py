"""The notebook writer: a fragment of HTML for the output of a cell.

It brings its few styles along, inline, takes the notebook's colours and fonts, and needs no script:
a finding unfolds as `<details>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from stillnorm.reports import text
from stillnorm.reports.document import (
    Block,
    Code,
    Diagnostic,
    Document,
    Heading,
    Line,
    Span,
    Style,
    Table,
    Text,
    plain,
    spans,
)

# Readable on white and on black.
_STYLES: dict[Style, str] = {
    "": "",
    "error": "color:#d9363e;font-weight:600",
    "warning": "color:#b7791f;font-weight:600",
    "info": "color:#2f81c7;font-weight:600",
    "dim": "opacity:.7",
    "strong": "font-weight:600",
}
_MONO = "font-family:ui-monospace,monospace;font-size:.92em"


def write(document: Document) -> str:
    """Write the document as a fragment.

    Example:
        >>> "<strong>Net: 1 finding</strong>" in write(Document("Net: 1 finding", ()))
        True
    """
    blocks = "".join(part for block in document.blocks for part in _block(block))
    title = f"<strong>{escape(document.title)}</strong>" if document.title else ""
    return f'<div style="max-width:64em;line-height:1.5">{title}{blocks}</div>'


def _block(block: Block) -> Iterator[str]:
    match block:
        case Line():
            if plain(block.text).strip():
                yield f'<div style="padding-left:{block.indent}ch">{_styled(block.text)}</div>'
            else:
                yield '<div style="height:.6em"></div>'
        case Heading():
            yield f'<div style="margin-top:.6em;font-weight:600">{escape(block.text)}</div>'
        case Table():
            yield _table(block)
        case Diagnostic():
            yield _diagnostic(block)
        case Code():
            yield f'<pre style="{_MONO};margin:.3em 0">{escape(block.text)}</pre>'
        case _:  # plots, as the terminal shows them
            shown = escape(text.write(Document("", (block,))))
            yield f'<pre style="{_MONO};margin:.3em 0">{shown}</pre>'


def _styled(content: Text) -> str:
    return "".join(
        f'<span style="{_STYLES[span.style]}">{escape(span.text)}</span>'
        if span.style
        else escape(span.text)
        for span in spans(content)
    )


def _table(table: Table) -> str:
    def row(cells: tuple[Text, ...], tag: str) -> str:
        return "".join(
            f'<{tag} style="text-align:{"right" if align == "r" else "left"};padding:0 .8em 0 0;'
            f'border:0;font-variant-numeric:tabular-nums">{_styled(cell)}</{tag}>'
            for cell, align in zip(cells, table.align, strict=True)
        )

    head = f"<tr>{row(table.header, 'th')}</tr>" if any(table.header) else ""
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    return f'<table style="border-collapse:collapse;margin:.3em 0;border:0">{head}{body}</table>'


def _diagnostic(block: Diagnostic) -> str:
    """Show a finding open: who wants less folds it."""
    head = _styled((Span(block.severity, block.severity), f"[{block.code}] {block.slug}: "))
    where = "".join(f'<div style="{_MONO}">{escape(line)}</div>' for line in block.where)
    evidence = "" if block.evidence is None else _table(block.evidence)
    notes = "".join(
        f"<div><em>{escape(label)}</em>: {escape(note)}</div>" for label, note in block.notes
    )
    return (
        f'<details open style="margin:.6em 0"><summary>{head}{escape(block.message)}</summary>'
        f'<div style="padding-left:1.2em">{where}{evidence}{notes}</div></details>'
    )
