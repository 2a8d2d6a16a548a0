"""The table of codes. Append only: a code or slug once released keeps its meaning for ever."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.rules.batch_statistics_at_eval import BatchStatisticsAtEval
from stillnorm.diagnosis.rules.drifting_frozen_layer import DriftingFrozenLayer
from stillnorm.diagnosis.rules.frozen_initial_statistics import FrozenInitialStatistics
from stillnorm.diagnosis.rules.initial_statistics import InitialStatistics
from stillnorm.diagnosis.rules.keras_momentum import KerasMomentum
from stillnorm.diagnosis.rules.mismatched_statistics import MismatchedStatistics
from stillnorm.diagnosis.rules.non_finite_statistics import NonFiniteStatistics
from stillnorm.diagnosis.rules.normalized_output import NormalizedOutput
from stillnorm.diagnosis.rules.shared_layer import SharedLayer
from stillnorm.diagnosis.rules.single_value_channel import SingleValueChannel
from stillnorm.diagnosis.rules.small_batch_statistics import SmallBatchStatistics
from stillnorm.diagnosis.rules.unheld_eval import UnheldEval
from stillnorm.diagnosis.rules.unreached_layer import UnreachedLayer
from stillnorm.diagnosis.rules.zero_momentum_freeze import ZeroMomentumFreeze
from stillnorm.errors import RuleError

CODES: dict[str, type[Rule]] = {
    "SN001": DriftingFrozenLayer,
    "SN002": ZeroMomentumFreeze,
    "SN003": UnheldEval,
    "SN004": FrozenInitialStatistics,
    "SN101": InitialStatistics,
    "SN102": NonFiniteStatistics,
    "SN105": MismatchedStatistics,
    "SN107": BatchStatisticsAtEval,
    "SN108": KerasMomentum,
    "SN114": UnreachedLayer,
    "SN201": SharedLayer,
    "SN203": NormalizedOutput,
    "SN206": SingleValueChannel,
    "SN207": SmallBatchStatistics,
}

Names = str | Iterable[str]
ALL, DEFAULT = "ALL", "DEFAULT"


def lookup(name: str) -> tuple[type[Rule], ...]:
    """Return the rules that a code, a slug or the beginning of a code names, in order of code.

    Raises:
        RuleError: It names none. The message tells the nearest.

    Example:
        >>> [rule.slug for rule in lookup("SN00")][:2]
        ['drifting-frozen-layer', 'zero-momentum-freeze']
        >>> lookup("shared-layer")[0].code
        'SN201'
    """
    wanted = name.strip()
    found = tuple(
        rule
        for code, rule in CODES.items()
        if wanted.lower() == rule.slug or (wanted and code.startswith(wanted.upper()))
    )
    if found:
        return found
    known = {**{code.lower(): code for code in CODES}, **{r.slug: r.slug for r in CODES.values()}}
    near = get_close_matches(wanted.lower(), known, n=3, cutoff=0.4) or list(CODES.keys())[:3]
    raise RuleError(
        f"no rule is called {name!r}", help=f"nearest: {', '.join(known.get(n, n) for n in near)}"
    )


def choose(select: Names | None = None, ignore: Names | None = None) -> tuple[type[Rule], ...]:
    """Return the rules that `select` names without those that `ignore` names.

    None, like ``"DEFAULT"``, selects every rule that is not in preview; ``"ALL"`` every rule. The
    beginning of a code leaves out previews; their own code or slug selects them.
    """
    chosen = _named(DEFAULT if select is None else select)
    dropped = (
        set() if ignore is None else {rule for name in _split(ignore) for rule in lookup(name)}
    )
    return tuple(rule for rule in CODES.values() if rule in chosen - dropped)


def _named(names: Names) -> set[type[Rule]]:
    """Return the rules that names select: a preview rule by its own name, or by ALL."""
    chosen: set[type[Rule]] = set()
    for name in map(str.strip, _split(names)):
        if name.upper() in (ALL, DEFAULT):
            chosen |= {r for r in CODES.values() if name.upper() == ALL or not r.preview}
        else:
            chosen |= {r for r in lookup(name) if not r.preview or _is_own_name(name, r)}
    return chosen


def _is_own_name(name: str, rule: type[Rule]) -> bool:
    return name.lower() in (rule.slug, rule.code.lower())


def _split(names: Names) -> Iterable[str]:
    return names.split(",") if isinstance(names, str) else names
