"""`stillnorm demo` promises: the story on stdout, the page in a file, whole or not at all."""

from __future__ import annotations

import json

import pytest

import stillnorm.demo
from stillnorm.errors import StillnormError
from stillnorm.reports import Document, Line


class Told:
    """Stands for the demo, which takes minutes and has tests of its own."""

    def __init__(self, seed: int, *, tell) -> None:
        self.seed = seed
        if tell is not None:
            tell(Document("1  Right in training", (Line("eval 21.4 %"),)))

    def summary(self) -> Document:
        return Document("", (Line("Ten numbers"),))

    def page(self) -> Document:
        return Document("Five threads", (Line("the plots"),))

    def to_json(self) -> str:
        return json.dumps({"seed": self.seed, "eval": 0.214})


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(stillnorm.demo, "run", Told)


def test_the_chapters_are_printed_and_the_page_and_the_numbers_written(run, project):
    result = run("demo")
    assert result.exit_code == 0
    assert result.stdout.split("\n") == [
        "1  Right in training",
        "",
        "eval 21.4 %",
        "",
        "Ten numbers",
        "",
    ]
    assert result.stderr == "the page: report.html\n"
    assert "<h1>Five threads</h1>" in (project / "report.html").read_text("utf-8")
    assert json.loads((project / "demo.json").read_text("utf-8")) == {"seed": 0, "eval": 0.214}


def test_the_page_goes_where_it_should(run, project):
    assert run("demo", "--out", "other.html").exit_code == 0
    assert (project / "other.html").exists()
    assert not (project / "report.html").exists()


def test_the_numbers_as_json(run):
    stdout = run("demo", "--format", "json", "--seed", "3").stdout
    assert json.loads(stdout) == {"seed": 3, "eval": 0.214}


def test_a_demo_without_drama_fails_and_writes_no_page(fails, project, monkeypatch):
    def dull(seed, *, tell):
        raise StillnormError("eval is within five points of train mode", help="tell us")

    monkeypatch.setattr(stillnorm.demo, "run", dull)
    fact, _ = fails("demo")
    assert fact == "eval is within five points of train mode"
    assert not (project / "report.html").exists()


def test_a_page_that_cannot_be_written_is_said_before_the_work(run, project, monkeypatch):
    monkeypatch.setattr(stillnorm.demo, "run", lambda *_, **__: pytest.fail("the work began"))
    (project / "folder").mkdir()
    for page in ("folder", "nowhere/report.html"):
        result = run("demo", "--out", page)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
