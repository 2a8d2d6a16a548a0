"""Freeze, recalibrate or train? Three numbers and one sentence.

The numbers, in standard deviations of a layer's input, root mean square over the layers that are
free: how far *batch* statistics scatter at the batch size given; how far the *running* ones are
off; how far they would be off when *recalibrated*. A structural fault comes first: none of the
three choices repairs it. Tried on twelve situations in benchmarks/verdict.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.runs import Flow, Head
from stillnorm.diagnosis.finding import Finding
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count, number

Choice = Literal["repair", "recalibrate", "freeze", "train", "keep"]
Then = Literal["freeze", "train"]

STRUCTURAL = ("SN106", "SN007", "SN107", "SN201")  # in the order of mending
MODES = ("SN001", "SN002", "SN003", "SN005", "SN006")
STALE = ("SN004", "SN101", "SN102", "SN105")
NOISY = 0.2  # deviations: below, batch statistics are as good as any


@dataclass(frozen=True)
class Verdict:
    """What to do with the model's norms at this batch size.

    Args:
        choice: ``"repair"`` a fault first; ``"recalibrate"``; ``"freeze"``; ``"train"`` on with
            batch statistics; ``"keep"``: every norm is frozen, nothing is to decide.
        then: With ``"recalibrate"``, how to train on, if at all.
        sentence: The choice and its reason.
        batch_size: Samples per batch.
        batch: Scatter of the batch statistics.
        running: Distance of the running statistics.
        recalibrated: Distance of the recalibrated ones.
    """

    choice: Choice
    sentence: str
    batch_size: int
    batch: float | None = None
    running: float | None = None
    recalibrated: float | None = None
    then: Then | None = None


def judge(evidence: Evidence, findings: Sequence[Finding]) -> Verdict | None:
    """Draw the verdict; None without batches or without norms that batches reach."""
    if evidence.runs is None:
        return None
    size = evidence.runs.batch_sizes[0]
    reached = [layer for layer in evidence.layers if evidence.calls(layer)]
    if not reached:
        return None
    free = [layer for layer in reached if evidence.trains_by_batch(layer) and layer.has_statistics]
    if not free:
        return Verdict("keep", "no norm layer uses batch statistics: nothing to decide", size)
    numbers = _Numbers(
        size=size,
        batch=_rms(evidence.noise(layer) for layer in free),
        running=_off(evidence, free, "batch"),
        recalibrated=_off(evidence, free, "recalibrated"),
        head=evidence.runs.head,
    )
    codes = {finding.code for finding in findings if finding.severity != "info"}
    off = any(evidence.mismatched(layer) for layer in free) or bool(codes & set(STALE))
    stale = off and not evidence.is_harmless
    broken = [code for code in STRUCTURAL if code in codes]
    modes = [code for code in MODES if code in codes]
    if not broken and _is_untrained(evidence, free):
        return Verdict("train", "nothing has been trained yet: train", size, numbers.batch)
    choice, sentence = numbers.choose(broken, stale)
    if modes and choice != "repair":
        sentence += f"; mend {modes[0]} first"
    return Verdict(
        choice,
        sentence,
        size,
        numbers.batch,
        numbers.running,
        numbers.recalibrated,
        numbers.then if choice == "recalibrate" else None,
    )


def _is_untrained(evidence: Evidence, free: Sequence[NormLayer]) -> bool:
    """Tell whether nothing shows training: statistics, affine parameters, the user's score."""
    head = None if evidence.runs is None else evidence.runs.head
    scores = head is not None and head.matters(head.batch - head.eval)
    return not scores and all(
        layer.never_estimated and not evidence.is_trained(layer) for layer in free
    )


@dataclass(frozen=True)
class _Numbers:
    size: int
    batch: float | None
    running: float | None
    recalibrated: float | None
    head: Head | None

    def choose(self, broken: Sequence[str], stale: bool) -> tuple[Choice, str]:
        """Return the choice and the sentence. The user's score, where given, outweighs sigmas."""
        head = self.head
        if broken:
            kept = "" if head is None else f"; freezing now would keep {in_units(head.eval, head)}"
            return "repair", f"repair {broken[0]} before anything else{kept}"
        if stale or (head is not None and head.recalibration_pays):
            return "recalibrate", f"{self._repaired()}: recalibrate, then {self.then}"
        if head is not None and head.matters(head.eval - head.batch):
            return "freeze", (
                f"at {count(self.size, 'sample')} batch statistics score "
                f"{in_units(head.batch, head)}, your running statistics "
                f"{in_units(head.eval, head)}: freeze"
            )
        numbers = (
            f"at {count(self.size, 'sample')} batch statistics are off by {_sigma(self.batch)}, "
            f"your running statistics by {_sigma(self.running)}"
        )
        if self._is_noisy(self.running):
            return "freeze", f"{numbers}: freeze"
        return "train", f"{numbers}: they will do: train"

    @property
    def then(self) -> Then:
        """How to train on after recalibrating: batch statistics in training are what is left."""
        head = self.head
        after = None if head is None else head.recalibrated
        if head is not None and after is not None and head.matters(after - head.batch):
            return "freeze"
        return "freeze" if self._is_noisy(self.recalibrated) else "train"

    def _is_noisy(self, running: float | None) -> bool:
        """Tell whether batch statistics scatter by more than a little, and than running ones."""
        return self.batch is not None and self.batch > max(NOISY, running or 0)

    def _repaired(self) -> str:
        """Say what recalibration changes, in the user's score where there is one."""
        head = self.head
        if head is not None and head.recalibrated is not None and head.recalibration_pays:
            before, after = in_units(head.eval, head), in_units(head.recalibrated, head)
            return f"your running statistics score {before}, recalibrated {after}"
        return (
            f"your running statistics are off by {_sigma(self.running)}, recalibrated by "
            f"{_sigma(self.recalibrated)}"
        )


def in_units(value: float, head: Head) -> str:
    """Write a score in the user's unit: a fraction in percent, anything else as it is.

    Example:
        >>> in_units(0.214, Head(0.214, 0.984, None, 64))
        '21.4 %'
        >>> in_units(-3.1, Head(-3.1, -0.5, None, 64))
        '-3.10'
    """
    values = [v for v in (head.eval, head.batch, head.recalibrated) if v is not None]
    if all(0 <= v <= 1 for v in values):
        return f"{100 * value:.1f} %"
    return number(value)


def _off(evidence: Evidence, layers: Sequence[NormLayer], flow: Flow) -> float | None:
    seen = [evidence.distance(layer, flow) for layer in layers]
    return _rms(None if distance is None else distance.mean for distance in seen)


def _rms(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.sqrt(sum(v * v for v in known) / len(known)) if known else None


def _sigma(value: float | None) -> str:
    if value is None:
        return "an unknown amount"
    return "less than 0.01 sigma" if value < 0.01 else f"{value:.2f} sigma"
