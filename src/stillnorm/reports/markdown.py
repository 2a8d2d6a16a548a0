"""The Markdown writer, for pull requests and job summaries: GitHub's Markdown, findings folded.

What a model's names or an exception's text contain is shown as it is: it can neither format nor
close what is around it, and it mentions nobody.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from stillnorm.reports import text
from stillnorm.reports.document import (
    Block,
    Code,
    Diagnostic,
    Document,
    Heading,
    Line,
    Quote,
    Table,
    Text,
    plain,
    spans,
)

_SPECIAL = re.compile(r"([\\`*_\[\]|~$]|^[#+=-])")
_NUMBERED = re.compile(r"^(\d+)([.)])(?= |$)")  # begins a list
_NOT_A_MENTION = "@\N{ZERO WIDTH SPACE}"
_ALIGN = {"l": ":--", "r": "--:"}
_FENCE = re.compile(r"`{3,}")


def write(document: Document) -> str:
    """Write the document as Markdown.

    Returns: The text, without a newline at the end.

    Example:
        >>> print(write(Document("Net: 1 finding", (Table((), (("eval", "21.4 %"),), "lr"),))))
        ### Net: 1 finding
        <BLANKLINE>
        | | |
        |:--|--:|
        | eval | 21.4 % |
    """
    parts = [f"### {escape(document.title)}"] if document.title else []
    paragraph: list[str] = []
    for block in (*document.blocks, Line("")):
        if isinstance(block, Line) and plain(block.text).strip():
            paragraph.append(_styled(block.text))
            continue
        if paragraph:
            parts.append("  \n".join(paragraph))
            paragraph = []
        parts += _block(block)
    return "\n\n".join(parts)


def escape(content: str) -> str:
    r"""Write text so that Markdown shows it as it is, on one line.

    Example:
        >>> print(escape("layer_1 <b> *2*"))
        layer\_1 &lt;b&gt; \*2\*
    """
    one_line = " ".join(content.split())
    safe = _SPECIAL.sub(r"\\\1", html.escape(one_line, quote=False))
    return _NUMBERED.sub(r"\1\\\2", safe).replace("@", _NOT_A_MENTION)


def _styled(content: Text) -> str:
    return "".join(
        f"<strong>{escape(span.text)}</strong>"
        if span.style in ("error", "strong")
        else _spaced(span.text)
        for span in spans(content)
    )


def _spaced(content: str) -> str:
    """Escape a part of a line: what separates it from the next one stays."""
    before = " " if content[:1].isspace() else ""
    after = " " if content[-1:].isspace() and content.strip() else ""
    return f"{before}{escape(content)}{after}"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Line():
            return
        case Heading():
            yield f"{'#' * (block.level + 2)} {escape(block.text)}"
        case Table():
            yield _table(block)
        case Diagnostic():
            yield from _diagnostic(block)
        case Quote():
            yield f"> {escape(block.text)}  \n> {escape(block.source)}"
        case Code():
            yield _code(block.text, block.language)
        case _:  # plots, as the terminal shows them
            yield _code(text.write(Document("", (block,))), "text")


def _table(table: Table) -> str:
    header = table.header or ("",) * len(table.align)
    rows = [_row(tuple(escape(name) for name in header))]
    rows.append("|" + "|".join(_ALIGN[align] for align in table.align) + "|")
    rows += [_row(tuple(_styled(cell) for cell in row)) for row in table.rows]
    return "\n".join(rows)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |" if any(cells) else "|" + " |" * len(cells)


def _diagnostic(block: Diagnostic) -> Iterator[str]:
    """Fold a finding: its severity, name and message are the line that unfolds it."""
    name = html.escape(f"{block.severity}[{block.code}] {block.slug}")
    one_line = " ".join(block.message.split())
    message = html.escape(one_line, quote=False).replace("@", _NOT_A_MENTION)
    yield f"<details><summary><code>{name}</code> {message}</summary>"
    for where in block.where:
        yield escape(where)
    if block.evidence is not None:
        yield _table(block.evidence)
    if block.notes:
        yield "\n".join(f"- *{escape(label)}:* {escape(note)}" for label, note in block.notes)
    yield "</details>"


def _code(content: str, language: str) -> str:
    longest = max((len(fence) for fence in _FENCE.findall(content)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"
