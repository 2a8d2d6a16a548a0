"""The HTML writer: one self-contained page, dark and light, readable on a phone, no network.

The page is `templates/page.html` with its styles and script beside it; the shapes of its plots
are computed in `charts`. What stands between backticks becomes code.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stillnorm.reports import charts
from stillnorm.reports.document import Block, Document, Heading, Line, Text, plain, spans

if TYPE_CHECKING:
    import jinja2
    import markupsafe

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
