"""The Markdown writer promises: rendered, it shows what the document says, whatever is in it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from reports.samples import CHECK
from reports.shown import Shown
from stillnorm.reports import (
    Bar,
    Bars,
    Block,
    Code,
    Diagnostic,
    Document,
    Heading,
    Line,
    Quote,
    Span,
    Table,
)
from stillnorm.reports.markdown import escape, write

RENDER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NASTY = st.text(st.sampled_from("ab1._*`[]()<>&|\\~#+-!@=$:\n \t/\"'{}"), max_size=20)


def rendered(*blocks: Block, title: str = "") -> Shown:
    page = Shown(RENDER.render(write(Document(title, blocks))))
    assert page.open == []
    return page


@given(NASTY)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    for blocks in (
        (Line(("x ", text)),),
        (Line(text),),
        (Heading(text),),
        (Table(("a", "b"), (("x", text),), "ll"),),
    ):
        page = rendered(*blocks)
        assert "".join(page.words).endswith("".join(text.split()))
        assert set(page.tags) <= {"p", "h4", "table", "thead", "tbody", "tr", "th", "td", "br"}


@given(NASTY)
@example("a\n\n1. *b*\n\n<b>c")
def test_any_finding_stays_folded_and_whole(text: str) -> None:
    evidence = Table((), ((text, "1"),), "lr")
    finding = Diagnostic(
        "error", "SN201", "shared-layer", text, (text,), evidence, (("help", text),)
    )
    page = rendered(finding, Line("after"))
    assert page.tags.count("details") == page.tags.count("summary") == 1
    assert "".join(page.words).count("".join(text.split())) >= 4 or not text.split()
    assert not {"script", "a", "img", "strong", "h1", "h2", "h3"} & set(page.tags)


def test_nobody_is_mentioned() -> None:
    assert "@someone" not in write(Document("@someone", (Line("@someone"),)))


def test_the_whole_sample() -> None:
    page = rendered(*CHECK.blocks, title=CHECK.title)
    for word in ("SN201", "bn_6", "17.27", "sn.split_shared(model,", "98.4"):
        assert word in page.text
    assert page.tags.count("details") == sum(isinstance(b, Diagnostic) for b in CHECK.blocks)


def test_numbers_stand_right_and_lines_stay_apart() -> None:
    written = write(
        Document("", (Line("one"), Line("two"), Line(""), Table(("a", "b"), (("x", "1"),), "lr")))
    )
    assert written == "one  \ntwo\n\n| a | b |\n|:--|--:|\n| x | 1 |"


def test_colour_is_bold_for_errors_only() -> None:
    table = Table((), (((Span("1", "error"), Span("2", "dim")),),), "l")
    assert "<strong>1</strong>2" in write(Document("", (table,)))


@pytest.mark.parametrize("text", ["x = 1", "x = '```'", "````\nx"])
def test_code_is_shown_as_it_is(text: str) -> None:
    page = rendered(Code(text))
    assert page.text.strip() == text
    assert page.tags == ["pre", "code"]


def test_plots_and_quotes_are_shown() -> None:
    page = rendered(Bars("", (Bar("eval", 21.4),), "%"), Quote("is *it*?", "thread"))
    assert "21.4 %" in page.text
    assert "is *it*?" in page.text


def test_a_table_without_rows_is_a_table() -> None:
    assert rendered(Table(("a",), (), "l")).words == ["a"]


def test_escape_keeps_one_line() -> None:
    assert escape("a\n# b") == "a # b"
