"""Annotations of GitHub Actions promise: what is in them arrives, and starts no other command."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillnorm.reports.github import Annotation, write

COMMAND = re.compile(r"::(error|warning|notice) ([^\n]*?)::([^\n\r]*)")
TEXTS = st.text(st.sampled_from("ab%:,\r\n=ü 2A0D5C"))


def read(line: str) -> Annotation:
    """Read one command as the runner does: https://github.com/actions/runner, ActionCommand.cs."""
    found = COMMAND.fullmatch(line)
    assert found is not None, line
    properties = dict(part.split("=", 1) for part in found[2].split(","))
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        properties = {name: value.replace(code, char) for name, value in properties.items()}
    message = found[3].replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")
    severity = {"error": "error", "warning": "warning", "notice": "info"}[found[1]]
    return Annotation(
        severity,  # type: ignore[arg-type]
        properties["title"],
        message,
        properties.get("file", ""),
        int(properties.get("line", 0)),
    )


@given(TEXTS, TEXTS, TEXTS.filter(bool), st.integers(1, 9))
def test_what_is_written_is_what_is_read(title: str, message: str, file: str, line: int) -> None:
    annotation = Annotation("error", title, message, file, line)
    assert read(write([annotation])) == annotation


@pytest.mark.parametrize(
    ("severity", "command"), [("error", "error"), ("warning", "warning"), ("info", "notice")]
)
def test_severities(severity: str, command: str) -> None:
    annotation = Annotation(severity, "t", "m")  # type: ignore[arg-type]
    assert write([annotation]) == f"::{command} title=t::m"


def test_one_a_line_and_none_is_nothing() -> None:
    two = [Annotation("error", "a", "first\nsecond"), Annotation("info", "b", "third")]
    assert [read(line) for line in write(two).split("\n")] == two
    assert write([]) == ""
