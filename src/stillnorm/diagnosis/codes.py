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
    """Return the rules that `select` names (all for None) without those that `ignore` names."""
    chosen = set(CODES.values()) if select is None else _named(select)
    dropped = set() if ignore is None else _named(ignore)
    return tuple(rule for rule in CODES.values() if rule in chosen - dropped)


def _named(names: Names) -> set[type[Rule]]:
    listed = names.split(",") if isinstance(names, str) else names
    return {rule for name in listed for rule in lookup(name)}
