"""`stillnorm demo` promises: the story on stdout, the page in a file, whole or not at all."""

from __future__ import annotations

import json

import pytest

import stillnorm.demo
from stillnorm.errors import StillnormError
from stillnorm.reports import Document, Line


class Told:
    """Stands for the demo, which takes minutes and has tests of its own."""

    def document(self) -> Document:
        return Document("", (Line("eval 21.4 %"),))

    def page(self) -> Document:
        return Document("Five threads", (Line("the plots"),))

    def to_json(self) -> str:
        return json.dumps({"eval": 0.214})


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(stillnorm.demo, "run", Told)


def test_the_story_is_printed_and_the_page_written(run, project):
    result = run("demo")
    assert (result.exit_code, result.stdout) == (0, "eval 21.4 %\n")
    assert result.stderr == "the page: report.html\n"
    assert "<h1>Five threads</h1>" in (project / "report.html").read_text("utf-8")


def test_the_page_goes_where_it_should(run, project):
    assert run("demo", "--page", "other.html").exit_code == 0
    assert (project / "other.html").exists()
    assert not (project / "report.html").exists()


def test_the_numbers_as_json(run):
    assert json.loads(run("demo", "--format", "json").stdout) == {"eval": 0.214}


def test_a_demo_without_drama_fails_and_writes_no_page(fails, project, monkeypatch):
    def dull():
        raise StillnormError("eval is within five points of train mode", help="tell us")

    monkeypatch.setattr(stillnorm.demo, "run", dull)
    fact, _ = fails("demo")
    assert fact == "eval is within five points of train mode"
    assert not (project / "report.html").exists()


def test_a_page_that_cannot_be_written_is_said_before_the_work(run, project, monkeypatch):
    monkeypatch.setattr(stillnorm.demo, "run", lambda: pytest.fail("the work began"))
    (project / "folder").mkdir()
    for page in ("folder", "nowhere/report.html"):
        result = run("demo", "--page", page)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
