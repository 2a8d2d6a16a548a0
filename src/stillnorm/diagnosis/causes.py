"""One finding per cause: who explains whose symptoms, and where it happened."""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import TopologicalSorter
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillnorm.diagnosis.rule import Rule


class Causes:
    """What has been found so far, for rules that would only report its consequences."""

    def __init__(self) -> None:
        self._cause: dict[tuple[str, str], str] = {}  # (symptom's code, path): the cause's code
        self._hits: dict[str, dict[str, list[str]]] = {}  # cause: symptom: paths

    def add(self, code: str, symptoms: Iterable[str], paths: Iterable[str]) -> None:
        """Note that a finding accounts for these symptoms on these layers."""
        for symptom, path in product(symptoms, paths):
            self._cause.setdefault((symptom, path), code)

    def explain(self, symptom: str, path: str) -> bool:
        """Tell whether a layer's symptom has a known cause; note that it would have been found."""
        cause = self._cause.get((symptom, path))
        if cause is not None:
            self._hits.setdefault(cause, {}).setdefault(symptom, []).append(path)
        return cause is not None

    def told_by(self, code: str) -> str:
        """Return what findings of this code explain: "SN105 on bn_2, bn_6 (not repeated)"."""
        parts = [
            f"{symptom} on {_listed(paths)}" for symptom, paths in self._hits.get(code, {}).items()
        ]
        return f"{'; '.join(parts)} (not repeated)" if parts else ""


def causes_first(rules: Iterable[type[Rule]]) -> list[type[Rule]]:
    """Order rules so that each comes after those that explain it."""
    rules = list(rules)
    explained_by = {
        rule.code: [cause.code for cause in rules if rule.code in cause.explains] for rule in rules
    }
    by_code = {rule.code: rule for rule in rules}
    return [by_code[code] for code in TopologicalSorter(explained_by).static_order()]


def _listed(paths: list[str], most: int = 5) -> str:
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
