"""The notebook writer promises: a whole fragment that brings all it needs and hides nothing."""

from __future__ import annotations

from hypothesis import given

from reports.samples import CHECK, documents
from reports.shown import Shown
from stillnorm.reports import Bar, Bars, Document, Line
from stillnorm.reports.document import Diagnostic, plain
from stillnorm.reports.notebook import write


def test_the_whole_sample() -> None:
    page = Shown(write(CHECK))
    assert page.open == []
    for word in ("SN201", "bn_6", "17.27", "sn.split_shared(model", "98.4"):
        assert word in page.text
    assert page.tags.count("details") == sum(isinstance(b, Diagnostic) for b in CHECK.blocks)


@given(documents)
def test_any_document_is_a_whole_fragment(document: Document) -> None:
    page = Shown(write(document))
    assert page.open == []
    assert not {"script", "style", "img", "iframe", "link"} & set(page.tags)
    for block in document.blocks:
        if isinstance(block, Line):
            assert "".join(plain(block.text).split()) in "".join(page.words)


def test_what_a_model_is_called_is_text() -> None:
    page = Shown(write(Document("<script>alert(1)</script>", (Line("<b onclick=x>"),))))
    assert "script" not in page.tags
    assert "<b onclick=x>" in page.text


def test_plots_are_shown_as_in_a_terminal() -> None:
    assert "21.4 %" in Shown(write(Document("", (Bars("", (Bar("eval", 21.4),), "%"),)))).text
