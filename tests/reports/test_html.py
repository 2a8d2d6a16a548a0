"""The page promises: one file, well formed, everything in it, nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import get_args

from hypothesis import given, settings

from reports.samples import CHECK, EVERY_BLOCK, documents
from stillnorm.reports import Block, Code, Document, Heading, Line, Span, Table, html
from stillnorm.reports.document import plain

VOID = {"meta", "link", "br", "img", "rect", "path"}


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in order; collects text, ids, links, tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_sample_has_every_kind_of_block():
    assert {type(block) for block in EVERY_BLOCK.blocks} == set(get_args(Block))


def test_everything_of_every_block_is_on_the_page():
    page = Page(html.write(EVERY_BLOCK))
    for piece in (
        "Every block <once> & again",
        "eval (running statistics)",
        "21.4 %",
        "what you ship",
        "bn_6 normalises two different inputs",
        "net.py:31, net.py:33",
        "17.27",
        "fits neither",
        "write one norm per call, or sn.split_shared(model, batches)",
        "model.eval() only 10 %",
        "thread 003, post 4",
        "a line with code",
        "an indented line",
        "inputs of layer 3",
        "mean 6.00",
        "no values",
        "sn.is_frozen(model)",
    ):
        assert piece in page.words, piece


def test_the_page_needs_nothing_else():
    """No other file, no address, no import: what a browser would fetch is not there."""
    source = html.write(EVERY_BLOCK)
    page = Page(source)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", source)
    assert all(not {"src", "srcset", "data"} & attrs.keys() for _, attrs in page.tags)
    assert not page.all("link")
    assert all(attrs["href"].startswith("#") for attrs in page.all("a"))


def test_the_page_reads_in_the_dark_and_on_a_phone():
    source = html.write(CHECK)
    assert "prefers-color-scheme: dark" in source
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(
        source
    ).all("meta")


def test_links_to_sections_lead_somewhere():
    page = Page(html.write(EVERY_BLOCK))
    links = [attrs["href"][1:] for attrs in page.all("a")]
    assert len(links) == 3
    assert links == [attrs["id"] for attrs in page.all("section") if "id" in attrs]


def test_what_scrolls_is_reachable_by_keyboard():
    page = Page(html.write(EVERY_BLOCK))
    boxes = [a for a in page.all("div") if a.get("class") == "scroll"] + page.all("pre")
    assert boxes
    assert all(attrs["tabindex"] == "0" for attrs in boxes)


def test_long_code_is_folded_and_short_code_is_not():
    page = Page(html.write(Document("", (Code("x = 1\n" * 30), Code("x = 1\n" * 31)))))
    assert len(page.all("pre")) == 2
    assert len(page.all("details")) == 1
    assert "31 lines of python" in page.words


def test_text_is_never_markup():
    """Whatever a layer is called, it cannot write into the page."""
    evil = "<script>alert(1)</script>`<img onerror=x>`"
    document = Document(evil, (Line(Span(evil, "error")), Table((), ((evil,),), "l")))
    source = html.write(document)
    assert "<script>alert" not in source
    assert "<img" not in source
    assert Page(source).text.count("alert(1)") == 4  # title, headline, line, cell


def test_lines_are_one_paragraph_until_a_blank_one():
    source = html.write(Document("", (Line("a"), Line("b"), Line(""), Line("c"))))
    assert source.count('class="lines"') == 2


def test_an_unpaired_backtick_is_a_backtick():
    assert "it`s" in Page(html.write(Document("", (Line("it`s"),)))).text


def test_the_same_document_gives_the_same_page():
    assert html.write(EVERY_BLOCK) == html.write(EVERY_BLOCK)


@settings(max_examples=60)
@given(documents)
def test_any_document_makes_a_well_formed_page(document):
    page = Page(html.write(document))
    for block in document.blocks:
        if isinstance(block, Heading):
            assert " ".join(block.text.replace("`", "").split()) in page.words.replace("`", "")
        if isinstance(block, Table):
            for row in block.rows:
                for cell in row:
                    assert plain(cell).replace("`", "") in page.text.replace(
                        "\N{NO-BREAK SPACE}", " "
                    ).replace("`", "")
