"""Why eval and batch statistics disagree: the causes that the evidence supports, and those not."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass

from stillnorm.diagnosis.attribution import Attribution, attribute
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.verdict import in_units
from stillnorm.tracing import first_tensor

# What each cause is found by. A rule of the first group that finds something supports the cause.
TELLING = 0.1  # of the gap
STALE, DOMAIN, SCALE = "stale statistics", "another domain", "input scale"
_FOUND_BY = {
    STALE: ("SN002", "SN004", "SN101", "SN102", "SN105", "SN110", "SN115", "SN602"),
    "shared layers": ("SN201",),
    SCALE: ("SN106",),
    DOMAIN: ("SN308",),
    "small batches": ("SN206", "SN207"),
    "leak between batch mates": ("SN310",),
}


@dataclass(frozen=True)
class Cause:
    """One possible cause of the gap.

    Args:
        name: In words.
        supported: Whether the evidence supports it; None where nothing was run that could tell.
        why: The rules that found it, or the fact that speaks for or against it.
    """

    name: str
    supported: bool | None
    why: str


@dataclass(frozen=True)
class Gap:
    """The gap between eval and batch statistics.

    Args:
        attribution: Which layers make it.
        causes: What the evidence says of each possible cause.
    """

    attribution: Attribution
    causes: tuple[Cause, ...]

    def sizes(self) -> str:
        """Say how wide the gap is, and what makes and closes it."""
        seen = self.attribution
        parts = [f"eval and batch outputs differ by {_percent(seen.gap)} of their size"]
        worst = next((one for one in seen.layers if one.exact), None)
        if worst is not None and worst.share >= TELLING:
            name = worst.path or "the one layer"
            parts.append(f"{name} alone makes {_percent(worst.share)} of that")
        elif worst is not None:
            parts.append("no layer alone makes much of that")
        if seen.recalibration is not None:
            parts.append(f"recalibrating closes {_percent(seen.recalibration)}")
        return "; ".join(parts)

    def verdict(self) -> str:
        """Say which causes are supported, which are not, and which nothing has tested."""
        named: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for cause in self.causes:
            shown = f"{cause.name} ({cause.why})" if cause.supported else cause.name
            named[cause.supported].append(shown)
        labels = {True: "causes", False: "not", None: "not tested"}
        return "; ".join(f"{labels[k]}: {', '.join(v)}" for k, v in named.items() if v)


def explain_gap(
    evidence: Evidence, findings: Sequence[Finding], ran: Collection[str]
) -> Gap | None:
    """Attribute the gap to layers and weigh its causes; None where there is none to speak of."""
    codes = {finding.code for finding in findings if finding.severity != "info"}
    if evidence.runs is None or not _is_wide(evidence, codes):
        return None
    attribution = attribute(evidence)
    if attribution is None:
        return None
    return Gap(attribution, tuple(_weigh(name, evidence, codes, ran) for name in _FOUND_BY))


def _is_wide(evidence: Evidence, codes: Set[str]) -> bool:
    """Tell whether a layer is off, a cause was found, or the user's score differs."""
    if codes & {code for by in _FOUND_BY.values() for code in by}:
        return True
    head = evidence.measured.head
    if head is not None and head.matters(abs(head.batch - head.eval)):
        return True
    return any(evidence.mismatched(layer) for layer in evidence.layers)


def _weigh(name: str, evidence: Evidence, codes: Set[str], ran: Collection[str]) -> Cause:
    by = _FOUND_BY[name]
    if found := [code for code in by if code in codes]:
        return Cause(name, True, ", ".join(found))
    head = evidence.measured.head
    if name == STALE and "SN106" in codes:
        return Cause(name, None, "")  # the statistics may be right, for another input
    if name == STALE and head is not None and head.recalibration_pays:
        return Cause(name, True, f"recalibrated {in_units(head.recalibrated or 0.0, head)}")
    if name in (DOMAIN, SCALE):
        first = evidence.in_order(evidence.layers)[0]
        if not evidence.mismatched(first):
            return Cause(name, False, f"{first.path or 'the layer'} fits its input")
        if name == SCALE and not _is_images(evidence):
            return Cause(name, None, "")  # SN106 knows scales of images only
    return Cause(name, False if set(by) & set(ran) else None, "")


def _is_images(evidence: Evidence) -> bool:
    """Tell whether the input is images with three channels, as SN106 wants them."""
    x = first_tensor(evidence.measured.batches[0])
    return x.dim() == 4 and x.shape[1] == 3


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
