"""One finding per cause: rules that explain run first, and say what they explain."""

from __future__ import annotations

from itertools import combinations

from stillnorm.diagnosis.causes import Causes, causes_first
from stillnorm.diagnosis.codes import CODES


def test_every_rule_comes_after_those_that_explain_it() -> None:
    ordered = causes_first(CODES.values())
    assert set(ordered) == set(CODES.values())
    for earlier, later in combinations(ordered, 2):
        assert earlier.code not in later.explains


def test_a_symptom_is_explained_on_the_layers_of_its_cause_only() -> None:
    causes = Causes()
    causes.add("SN201", ("SN105",), ("a", "b"))
    assert causes.explain("SN105", "a")
    assert not causes.explain("SN105", "c")
    assert not causes.explain("SN101", "a")


def test_only_symptoms_that_were_there_are_told() -> None:
    causes = Causes()
    causes.add("SN201", ("SN105",), ("a", "b"))
    assert causes.told_by("SN201") == ""
    causes.explain("SN105", "b")
    assert causes.told_by("SN201") == "SN105 on b (not repeated)"
    assert causes.told_by("SN102") == ""


def test_the_first_cause_found_keeps_the_symptom() -> None:
    causes = Causes()
    causes.add("SN201", ("SN105",), ("a",))
    causes.add("SN102", ("SN105",), ("a",))
    causes.explain("SN105", "a")
    assert causes.told_by("SN102") == ""


def test_many_layers_are_counted() -> None:
    causes = Causes()
    paths = [f"l{i}" for i in range(8)]
    causes.add("SN201", ("SN105",), paths)
    for path in paths:
        causes.explain("SN105", path)
    assert causes.told_by("SN201") == "SN105 on l0, l1, l2, l3, l4 and 3 more (not repeated)"
