"""`stillnorm explain` promises: all that a rule's documentation says."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from stillnorm.diagnosis import CODES

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_explain_lists_every_rule(run):
    result = run("explain")
    assert result.exit_code == 0
    for code, rule in CODES.items():
        assert f"{code}  {rule.slug}" in result.stdout


@pytest.mark.parametrize("code", CODES)
def test_explain_prints_all_of_a_rule(run, code):
    by_code = run("explain", code)
    assert by_code.exit_code == 0
    assert by_code.stdout.startswith(f"{code} {CODES[code].slug} ({CODES[code].severity})")
    for heading, content in CODES[code].sections().items():
        assert heading in by_code.stdout
        assert " ".join(content.split()) in " ".join(by_code.stdout.split())
    assert run("explain", CODES[code].slug).stdout == by_code.stdout


def test_explain_lists_a_family(run):
    listed = run("explain", "SN2").stdout
    assert "SN201" in listed
    assert "SN101" not in listed


def test_explain_of_nothing_known(fails):
    fact, help = fails("explain", "shared-layr")
    assert fact == "no rule is called 'shared-layr'"
    assert "shared-layer" in help


def test_the_page_of_rules_is_current(run):
    told = "stillnorm explain --markdown > docs/rules.md"
    assert run("explain", "--markdown").stdout == PAGE.read_text(), told


def test_the_page_has_every_rule_and_its_links_lead_there():
    page = PAGE.read_text()
    rendered = MarkdownIt("commonmark").enable("table").render(page)
    for code, rule in CODES.items():
        assert f"<h2>{code} {rule.slug}</h2>" in rendered
        assert f'<a href="#{code.lower()}-{rule.slug}">{code}</a>' in rendered


def test_one_rule_as_a_page(run):
    page = run("explain", "SN201", "--markdown").stdout
    assert "## SN201 shared-layer" in page
    assert "SN202" not in page
