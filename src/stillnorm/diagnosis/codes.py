"""The table of codes. Append only: a code or slug once released keeps its meaning for ever."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.rules.accumulated_micro_batches import AccumulatedMicroBatches
from stillnorm.diagnosis.rules.aliased_statistics import AliasedStatistics
from stillnorm.diagnosis.rules.batch_leak import BatchLeak
from stillnorm.diagnosis.rules.batch_statistics_at_eval import BatchStatisticsAtEval
from stillnorm.diagnosis.rules.cancelling_mean import CancellingMean
from stillnorm.diagnosis.rules.coupled_gradient_penalty import CoupledGradientPenalty
from stillnorm.diagnosis.rules.cumulative_momentum import CumulativeMomentum
from stillnorm.diagnosis.rules.decayed_affine import DecayedAffine
from stillnorm.diagnosis.rules.diverged_ranks import DivergedRanks
from stillnorm.diagnosis.rules.dominant_eps import DominantEps
from stillnorm.diagnosis.rules.drifting_frozen_layer import DriftingFrozenLayer
from stillnorm.diagnosis.rules.dropout_before_norm import DropoutBeforeNorm
from stillnorm.diagnosis.rules.exploding_gain import ExplodingGain
from stillnorm.diagnosis.rules.extra_forward_updates import ExtraForwardUpdates
from stillnorm.diagnosis.rules.foreign_frozen_layer import ForeignFrozenLayer
from stillnorm.diagnosis.rules.frozen_initial_statistics import FrozenInitialStatistics
from stillnorm.diagnosis.rules.ignored_eval import IgnoredEval
from stillnorm.diagnosis.rules.inference_tensor_statistics import InferenceTensorStatistics
from stillnorm.diagnosis.rules.initial_statistics import InitialStatistics
from stillnorm.diagnosis.rules.keras_momentum import KerasMomentum
from stillnorm.diagnosis.rules.low_precision_statistics import LowPrecisionStatistics
from stillnorm.diagnosis.rules.misencoded_variance import MisencodedVariance
from stillnorm.diagnosis.rules.mismatched_statistics import MismatchedStatistics
from stillnorm.diagnosis.rules.missing_statistics import MissingStatistics
from stillnorm.diagnosis.rules.mixed_domains import MixedDomains
from stillnorm.diagnosis.rules.moving_frozen_affine import MovingFrozenAffine
from stillnorm.diagnosis.rules.negative_variance import NegativeVariance
from stillnorm.diagnosis.rules.non_finite_statistics import NonFiniteStatistics
from stillnorm.diagnosis.rules.normalized_output import NormalizedOutput
from stillnorm.diagnosis.rules.ordered_batches import OrderedBatches
from stillnorm.diagnosis.rules.orphaned_parameter import OrphanedParameter
from stillnorm.diagnosis.rules.overflowing_input import OverflowingInput
from stillnorm.diagnosis.rules.padded_statistics import PaddedStatistics
from stillnorm.diagnosis.rules.recomputed_update import RecomputedUpdate
from stillnorm.diagnosis.rules.redundant_bias import RedundantBias
from stillnorm.diagnosis.rules.shared_layer import SharedLayer
from stillnorm.diagnosis.rules.single_value_channel import SingleValueChannel
from stillnorm.diagnosis.rules.small_batch_statistics import SmallBatchStatistics
from stillnorm.diagnosis.rules.stripped_subclass import StrippedSubclass
from stillnorm.diagnosis.rules.stuck_in_eval import StuckInEval
from stillnorm.diagnosis.rules.toggled_tracking import ToggledTracking
from stillnorm.diagnosis.rules.train_mode_inference import TrainModeInference
from stillnorm.diagnosis.rules.training_mode_artifact import TrainingModeArtifact
from stillnorm.diagnosis.rules.unconverged_statistics import UnconvergedStatistics
from stillnorm.diagnosis.rules.unheld_eval import UnheldEval
from stillnorm.diagnosis.rules.uninitialized_lazy_norm import UninitializedLazyNorm
from stillnorm.diagnosis.rules.unmatched_average import UnmatchedAverage
from stillnorm.diagnosis.rules.unmaterialized_statistics import UnmaterializedStatistics
from stillnorm.diagnosis.rules.unreached_layer import UnreachedLayer
from stillnorm.diagnosis.rules.update_without_gradient import UpdateWithoutGradient
from stillnorm.diagnosis.rules.wrong_channel_axis import WrongChannelAxis
from stillnorm.diagnosis.rules.wrong_input_scale import WrongInputScale
from stillnorm.diagnosis.rules.zero_momentum_freeze import ZeroMomentumFreeze
from stillnorm.errors import RuleError

CODES: dict[str, type[Rule]] = {
    "SN001": DriftingFrozenLayer,
    "SN002": ZeroMomentumFreeze,
    "SN003": UnheldEval,
    "SN004": FrozenInitialStatistics,
    "SN005": StuckInEval,
    "SN006": TrainModeInference,
    "SN007": IgnoredEval,
    "SN008": ToggledTracking,
    "SN101": InitialStatistics,
    "SN102": NonFiniteStatistics,
    "SN103": NegativeVariance,
    "SN104": ExplodingGain,
    "SN105": MismatchedStatistics,
    "SN106": WrongInputScale,
    "SN107": BatchStatisticsAtEval,
    "SN108": KerasMomentum,
    "SN109": CumulativeMomentum,
    "SN110": MisencodedVariance,
    "SN111": DominantEps,
    "SN112": UnmaterializedStatistics,
    "SN113": InferenceTensorStatistics,
    "SN114": UnreachedLayer,
    "SN115": UnconvergedStatistics,
    "SN201": SharedLayer,
    "SN202": AliasedStatistics,
    "SN203": NormalizedOutput,
    "SN204": RedundantBias,
    "SN205": DropoutBeforeNorm,
    "SN206": SingleValueChannel,
    "SN207": SmallBatchStatistics,
    "SN208": WrongChannelAxis,
    "SN209": PaddedStatistics,
    "SN210": UninitializedLazyNorm,
    "SN301": RecomputedUpdate,
    "SN302": ExtraForwardUpdates,
    "SN303": MovingFrozenAffine,
    "SN304": OrphanedParameter,
    "SN305": DecayedAffine,
    "SN306": UpdateWithoutGradient,
    "SN307": AccumulatedMicroBatches,
    "SN308": MixedDomains,
    "SN309": OrderedBatches,
    "SN310": BatchLeak,
    "SN311": CoupledGradientPenalty,
    "SN401": LowPrecisionStatistics,
    "SN402": OverflowingInput,
    "SN403": CancellingMean,
    "SN501": DivergedRanks,
    "SN503": StrippedSubclass,
    "SN601": MissingStatistics,
    "SN602": UnmatchedAverage,
    "SN603": ForeignFrozenLayer,
    "SN701": TrainingModeArtifact,
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
