"""The table of rules: permanent, complete, documented, found by every name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import stillnorm.diagnosis.rules as rules_room
from stillnorm.diagnosis.codes import CODES, choose, lookup
from stillnorm.diagnosis.rule import HEADINGS, Rule
from stillnorm.errors import RuleError

# Append only. A line here that has to change is a broken promise to whoever selects by name.
RELEASED = {
    "SN001": "drifting-frozen-layer",
    "SN002": "zero-momentum-freeze",
    "SN003": "unheld-eval",
    "SN004": "frozen-initial-statistics",
    "SN101": "initial-statistics",
    "SN102": "non-finite-statistics",
    "SN105": "mismatched-statistics",
    "SN107": "batch-statistics-at-eval",
    "SN108": "keras-momentum",
    "SN114": "unreached-layer",
    "SN201": "shared-layer",
    "SN203": "normalized-output",
    "SN206": "single-value-channel",
    "SN207": "small-batch-statistics",
}
RULES = list(CODES.values())


def test_codes_and_slugs_are_those_released() -> None:
    assert {code: rule.slug for code, rule in CODES.items()} == RELEASED
    assert list(CODES) == sorted(CODES)


def test_every_rule_file_is_in_the_table_and_named_after_its_slug() -> None:
    folder = Path(rules_room.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {rule.slug.replace("-", "_") for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.slug)
class TestEveryRule:
    def test_says_the_same_name_everywhere(self, rule: type[Rule]) -> None:
        assert CODES[rule.code] is rule
        assert rule.__module__.rpartition(".")[2] == rule.slug.replace("-", "_")
        assert re.sub(r"(?<!^)(?=[A-Z])", "-", rule.__name__).lower() == rule.slug

    def test_has_documentation_under_every_heading_in_order(self, rule: type[Rule]) -> None:
        sections = rule.sections()
        assert list(sections) == ["", *HEADINGS]
        assert sections[""].endswith(".")
        assert "\n" not in sections[""]
        for heading in HEADINGS:
            assert len(sections[heading]) > 20, f"{heading} of {rule.code} says nothing"
        assert ">>> " in sections["Example"], "an example that runs"

    def test_explains_only_codes_that_exist(self, rule: type[Rule]) -> None:
        assert set(rule.explains) <= set(CODES) - {rule.code}

    def test_has_a_test_of_its_own(self, rule: type[Rule]) -> None:
        name = f"test_{rule.slug.replace('-', '_')}.py"
        assert (Path(__file__).parent / "rules" / name).is_file()

    def test_is_found_by_code_and_by_slug_in_any_case(self, rule: type[Rule]) -> None:
        for name in (rule.code, rule.code.lower(), rule.slug, f" {rule.slug.upper()} "):
            assert lookup(name) == (rule,)


def test_the_beginning_of_a_code_names_a_family() -> None:
    assert [rule.code for rule in lookup("SN00")] == ["SN001", "SN002", "SN003", "SN004"]
    assert lookup("SN") == tuple(RULES)


@pytest.mark.parametrize(
    ("wrong", "near"), [("SN999", "SN"), ("shared-layers", "shared-layer"), ("", "SN001")]
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(RuleError, match="no rule is called") as raised:
        lookup(wrong)
    assert near in raised.value.help


def test_select_and_ignore_take_names_lists_and_commas() -> None:
    assert [rule.code for rule in choose("SN00", ["SN001", "unheld-eval"])] == ["SN002", "SN004"]
    assert choose("SN101,shared-layer") == (*lookup("SN101"), *lookup("SN201"))
    assert choose() == tuple(RULES)
