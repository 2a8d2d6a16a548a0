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
    "SN005": "stuck-in-eval",
    "SN006": "train-mode-inference",
    "SN007": "ignored-eval",
    "SN008": "toggled-tracking",
    "SN101": "initial-statistics",
    "SN102": "non-finite-statistics",
    "SN103": "negative-variance",
    "SN104": "exploding-gain",
    "SN105": "mismatched-statistics",
    "SN106": "wrong-input-scale",
    "SN107": "batch-statistics-at-eval",
    "SN108": "keras-momentum",
    "SN109": "cumulative-momentum",
    "SN110": "misencoded-variance",
    "SN111": "dominant-eps",
    "SN112": "unmaterialized-statistics",
    "SN113": "inference-tensor-statistics",
    "SN114": "unreached-layer",
    "SN115": "unconverged-statistics",
    "SN201": "shared-layer",
    "SN202": "aliased-statistics",
    "SN203": "normalized-output",
    "SN204": "redundant-bias",
    "SN205": "dropout-before-norm",
    "SN206": "single-value-channel",
    "SN207": "small-batch-statistics",
    "SN208": "wrong-channel-axis",
    "SN209": "padded-statistics",
    "SN210": "uninitialized-lazy-norm",
    "SN301": "recomputed-update",
    "SN302": "extra-forward-updates",
    "SN303": "moving-frozen-affine",
    "SN304": "orphaned-parameter",
    "SN305": "decayed-affine",
    "SN306": "update-without-gradient",
    "SN307": "accumulated-micro-batches",
    "SN308": "mixed-domains",
    "SN309": "ordered-batches",
    "SN310": "batch-leak",
    "SN311": "coupled-gradient-penalty",
    "SN401": "low-precision-statistics",
    "SN402": "overflowing-input",
    "SN403": "cancelling-mean",
    "SN501": "diverged-ranks",
    "SN503": "stripped-subclass",
    "SN601": "missing-statistics",
    "SN602": "unmatched-average",
    "SN603": "foreign-frozen-layer",
    "SN701": "training-mode-artifact",
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
    assert [rule.code for rule in lookup("SN00")] == [c for c in RELEASED if c.startswith("SN00")]
    assert lookup("SN") == tuple(RULES)


@pytest.mark.parametrize(
    ("wrong", "near"), [("SN999", "SN"), ("shared-layers", "shared-layer"), ("", "SN001")]
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(RuleError, match="no rule is called") as raised:
        lookup(wrong)
    assert near in raised.value.help


def test_select_and_ignore_take_names_lists_and_commas() -> None:
    family = [rule.code for rule in choose("SN00")]
    assert [rule.code for rule in choose("SN00", ["SN001", "unheld-eval"])] == [
        code for code in family if code not in ("SN001", "SN003")
    ]
    assert choose("SN101,shared-layer") == (*lookup("SN101"), *lookup("SN201"))
    assert choose() == tuple(rule for rule in RULES if not rule.preview)
