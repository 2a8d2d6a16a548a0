"""The HTML writer: one self-contained page, dark and light, readable on a phone, no network.

The page is `templates/page.html` with its styles and script beside it; the shapes of its plots
are computed in `charts`. What stands between backticks becomes code. The page of a check,
`templates/check.html`, is the same, and draws layers on demand from data that lie in it.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stillnorm.reports import charts
from stillnorm.reports.document import (
    Block,
    Diagnostic,
    Document,
    Heading,
    Line,
    Text,
    plain,
    spans,
)
from stillnorm.reports.json import to_jsonable
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    import jinja2
    import markupsafe

OPEN = 3  # findings of a check shown in full; the rest take a line each
LINKED = 12  # layers that a finding leads to by name

_NAME = re.compile(r"[\w.*…\[\]]*[a-z][\w.*…\[\]]*[._\d\]][\w.*…\[\]]*")  # bn1, layer1.*.bn2


def write(document: Document) -> str:
    """Write the document as one page that needs no other file.

    Returns: The page's source. The same document gives the same page, byte for byte.

    Example:
        >>> "<h1>Net: 1 finding</h1>" in write(Document("Net: 1 finding", ()))
        True
    """
    return (
        _environment()
        .get_template("page.html")
        .render(title=document.title, sections=_sections(document))
    )


def write_check(
    page: object, diagnostics: tuple[Diagnostic, ...], data: Mapping[str, object]
) -> str:
    """Write the page of a check.

    Args:
        page: What the template reads: a `diagnosis.page.Page`.
        diagnostics: The findings on it.
        data: What the script reads.

    Returns: The page's source. The same report gives the same page, byte for byte.
    """
    n = Counter(diagnostic.severity for diagnostic in diagnostics)
    numbers = ((n["error"], "error"), (n["warning"], "warning"), (n["info"], "note"))
    return (
        _environment()
        .get_template("check.html")
        .render(
            page=page,
            data=_embedded(data),
            summary=", ".join(count(k, noun) for k, noun in numbers if k) or "Nothing found",
            open=OPEN,
            linked=LINKED,
        )
    )


def _embedded(data: object) -> markupsafe.Markup:
    """Write data as JSON that can stand in a script element, whatever it holds."""
    from markupsafe import Markup

    text = json.dumps(to_jsonable(data), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


@dataclass
class Section:
    """What stands under one heading of level 2; adjacent lines are one paragraph, a list."""

    heading: Heading | None
    blocks: list[Block | list[Line]] = field(default_factory=list)


def _sections(document: Document) -> list[Section]:
    sections = [Section(None)]
    for block in document.blocks:
        if isinstance(block, Heading) and block.level <= 2:
            sections.append(Section(block))
        elif isinstance(block, Line):
            _add_line(sections[-1].blocks, block)
        else:
            sections[-1].blocks.append(block)
    return [section for section in sections if section.heading or section.blocks]


def _add_line(blocks: list[Block | list[Line]], line: Line) -> None:
    """Put the line into the paragraph above it; a blank line begins a new one."""
    last = blocks[-1] if blocks else None
    if not plain(line.text).strip():
        if last:
            blocks.append([])
    elif isinstance(last, list):
        last.append(line)
    else:
        blocks.append([line])


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stillnorm.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "prose": _prose,
        "kind": lambda block: type(block).__name__,
        "bars": charts.bars,
        "histogram": charts.histogram,
        "names": lambda text: _NAME.fullmatch(plain(text)) is not None,
        "plain": plain,
    }
    return environment


def _prose(text: Text) -> markupsafe.Markup:
    """Write text with its styles, and what stands between backticks as code."""
    from markupsafe import Markup, escape

    html = Markup()
    for span in spans(text):
        parts = span.text.replace(" %", "\N{NO-BREAK SPACE}%").split("`")
        if len(parts) % 2 == 0:  # an unpaired backtick is a backtick
            parts = ["`".join(parts)]
        inner = Markup().join(
            Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
            for i, part in enumerate(parts)
        )
        html += (
            Markup('<span class="{}">{}</span>').format(span.style, inner) if span.style else inner
        )
    return html
