r"""What the page of a report says of one layer, as plain data.

How far running statistics are from those of the batches is told in standard errors: with one row
:math:`d_i \in \mathbb{R}^C` per sample (`measure`), the distance of a layer is the size of the mean
over that of its own standard error,

.. math:: z^2 = \frac{\sum_c \bar d_c^2}{\sum_c \mathrm{var}_i(d_{ic}) / n}

1 is what noise makes, whatever the number of samples, channels and positions; both sums are over
channels, so that one whose values hardly vary does not decide alone. The larger of the two, of the
means and of the variances, counts; and of a layer with several calls, the call that fits least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stillnorm.diagnosis.evidence import SENSITIVE, Evidence
from stillnorm.diagnosis.evidence.runs import Flow
from stillnorm.diagnosis.measures.measure import Distance, Samples, distance, samples_of
from stillnorm.diagnosis.measures.stored import values
from stillnorm.diagnosis.writing.normalized_values import Spread
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import short
from stillnorm.tracing import Call

NOISE = 3.0  # standard errors: below, a difference may be none
MOST_CALLS = 12  # listed
DRAWN_CALLS = 4


@dataclass(frozen=True)
class Off:
    """How far statistics are from what a layer received.

    Args:
        mean: In running deviations, root mean square over channels.
        ratio: The variance received over that of the statistics.
        errors: In standard errors; None with fewer than two samples.
    """

    mean: float
    ratio: float
    errors: float | None


@dataclass(frozen=True)
class Received:
    """What one call received in the batch flow, all batches together, per drawn channel.

    Args:
        mean, var: The estimates.
        mean_error, var_error: Their standard errors.
    """

    mean: tuple[float, ...]
    var: tuple[float, ...]
    mean_error: tuple[float, ...]
    var_error: tuple[float, ...]


@dataclass(frozen=True)
class Channels:
    """Statistics per channel, those that are furthest off in standard errors first.

    Args:
        total: How many channels there are.
        index: Those that are drawn, thinned evenly.
        mean, var: The running statistics.
        after_mean, after_var: The running statistics after recalibration; empty without.
        received: By call, the first few.
    """

    total: int
    index: tuple[int, ...]
    mean: tuple[float, ...]
    var: tuple[float, ...]
    after_mean: tuple[float, ...]
    after_var: tuple[float, ...]
    received: tuple[Received, ...]


@dataclass(frozen=True)
class CallSite:
    """One call of a layer within a forward, in the batch flow.

    Args:
        site: The source line, ``"net.py:31"``; empty where there is none of the user's.
        function: The function that it is in.
        shape: The input's shape.
        dtype: The input's dtype.
        mean: The input's mean, over channels.
        var: Its variance.
        off: How far the running statistics are from this call's input.
    """

    site: str
    function: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    var: float
    off: Off | None


@dataclass(frozen=True)
class LayerView:
    """A layer on the page.

    Args:
        path: Its path.
        kind: Its class.
        features: How many channels it has.
        eps: What it adds to the variance.
        facts: Pairs of a label and what it says.
        why: Why nothing is measured, if nothing is.
        held: What keeps it frozen, or nothing.
        findings: Which findings are about it, by their place.
        off: By flow, how far its statistics are off; of ``"recalibrated"``, the estimated ones.
        diverges: Whether they are off by more than noise, and by what can matter.
        channels: Its statistics per channel.
        calls: Where it is called.
        more_calls: How many calls are not listed.
        values: By flow, what it hands on before its affine part.
    """

    path: str
    kind: str
    features: int
    eps: float
    facts: tuple[tuple[str, str], ...]
    why: str
    held: str
    findings: tuple[int, ...]
    off: dict[Flow, Off]
    diverges: bool
    channels: Channels | None
    calls: tuple[CallSite, ...]
    more_calls: int
    values: dict[Flow, Spread]


def view(
    evidence: Evidence,
    layer: NormLayer,
    findings: tuple[int, ...],
    spreads: dict[Flow, Spread],
    most_channels: int,
) -> LayerView:
    """Gather what there is to say of a layer."""
    look = _Look(evidence, layer)
    return LayerView(
        path=layer.path,
        kind=layer.kind,
        features=layer.num_features,
        eps=layer.eps,
        facts=_facts(evidence, layer),
        why=look.why,
        held=evidence.modes.held_by(layer) or "",
        findings=findings,
        off=look.off,
        diverges=look.diverges,
        channels=look.channels(most_channels),
        calls=look.listed(),
        more_calls=max(0, len(look.calls) - MOST_CALLS),
        values=spreads,
    )


def in_standard_errors(d: Tensor) -> float | None:
    """Return the size of the mean over that of its standard error (the module's formula).

    Shape:
        - d: ``(n, C)``, a row per sample.

    Returns:
        None with fewer than two samples. Infinite where nothing varies and the mean is not 0.

    Example:
        >>> in_standard_errors(torch.tensor([[1.0], [3.0]]))  # 2, known to within 1
        2.0
    """
    n = len(d)
    if n < 2 or d.shape[1] == 0:
        return None
    size = float(d.mean(0).square().sum())
    error = float(d.var(0, correction=1).sum()) / n
    return math.sqrt(size / error) if error > 0 else (0.0 if size == 0 else math.inf)


def _errors(seen: Distance) -> float | None:
    both = [e for e in map(in_standard_errors, (seen.d, seen.q)) if e is not None]
    return max(both) if both else None


def _off(seen: Distance) -> Off:
    errors = _errors(seen)
    return Off(_round(seen.mean), _round(seen.ratio), None if errors is None else _round(errors))


def _facts(evidence: Evidence, layer: NormLayer) -> tuple[tuple[str, str], ...]:
    momentum = "average of all" if layer.momentum is None else short(layer.momentum, 3)
    seen = values(layer.num_batches_tracked)
    facts = [
        ("in train()", f"normalises by {layer.normalizes_by(evidence.in_train(layer))}"),
        ("in eval()", f"normalises by {layer.normalizes_by(evidence.modes.in_eval[layer.module])}"),
        ("momentum", momentum if layer.has_statistics else ""),
        ("eps", short(layer.eps)),
        ("affine", "trains" if layer.trains_affine else "does not train"),
        ("batches seen", "" if seen is None else str(int(seen))),
        ("also known as", ", ".join(layer.paths[1:])),
    ]
    return tuple((label, text) for label, text in facts if text)


@dataclass(eq=False)
class _Look:
    """What was measured of a layer, computed once."""

    evidence: Evidence
    layer: NormLayer

    @cached_property
    def calls(self) -> list[list[Call]]:
        """The calls in the batch flow, by which of a forward they are."""
        found: dict[int, list[Call]] = {}
        for call in self.evidence.calls(self.layer, "batch"):
            found.setdefault(call.occurrence, []).append(call)
        return list(found.values())

    @cached_property
    def samples(self) -> list[Samples | None]:
        """What each of them received."""
        if len(self.calls) == 1:
            return [self.evidence.samples(self.layer, "batch")]
        return [samples_of(calls, self.evidence.measured.batch_sizes) for calls in self.calls]

    @cached_property
    def distances(self) -> list[Distance | None]:
        """How far the running statistics are from each."""
        if len(self.calls) == 1:
            return [self.evidence.distance(self.layer, "batch")]
        instance = self.layer.family == "instance"
        running = self.evidence.statistics[self.layer.path]
        return [
            distance(*running, self.layer.eps, samples, instance=instance)
            for samples in self.samples
        ]

    @cached_property
    def worst(self) -> Distance | None:
        """The distance from the call that fits least."""
        known = [seen for seen in self.distances if seen is not None]
        return max(known, key=lambda seen: _errors(seen) or 0, default=None)

    @property
    def off(self) -> dict[Flow, Off]:
        """How far the statistics are off, by flow."""
        evidence, layer = self.evidence, self.layer
        runs = evidence.runs
        seen: dict[Flow, Distance | None] = {
            "batch": self.worst,
            "eval": evidence.distance(layer, "eval"),
        }
        if runs is not None and layer.path in runs.after:
            seen["recalibrated"] = evidence.distance(layer, "recalibrated")
        return {flow: _off(one) for flow, one in seen.items() if one is not None}

    @property
    def diverges(self) -> bool:
        """Whether a call is off by more than noise, and by what can matter."""
        return any(
            seen is not None and (_errors(seen) or 0) >= NOISE and seen.exceeds(SENSITIVE)
            for seen in self.distances
        )

    @property
    def why(self) -> str:
        """Why there is no distance; nothing when there is one."""
        if self.evidence.runs is None:
            return "needs batches"
        if not self.calls:
            return "never called"
        if not self.layer.has_statistics:
            return "no running statistics"
        if self.worst is None:
            return "values that are not numbers"
        return "one sample alone" if self.worst.samples < 2 else ""

    def listed(self) -> tuple[CallSite, ...]:
        """Describe the first calls."""
        found: list[CallSite] = []
        for calls, samples, seen in zip(self.calls, self.samples, self.distances, strict=True):
            if samples is None or len(found) == MOST_CALLS:
                continue
            first, (mean, var) = calls[0], self._received(samples)
            found.append(
                CallSite(
                    site=str(first.site) if first.site else "",
                    function=first.site.function if first.site else "",
                    shape=first.shape,
                    dtype=str(first.dtype).removeprefix("torch."),
                    mean=_round(float(mean.mean())),
                    var=_round(float(var.mean(0).mean())),
                    off=None if seen is None else _off(seen),
                )
            )
        return tuple(found)

    def _received(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return per sample the mean and the share in the variance, (n, C) each."""
        instance = self.layer.family == "instance"
        return samples.mean, samples.within() if instance else samples.shares()

    def channels(self, most: int) -> Channels | None:
        """Gather statistics per channel; of more than `most`, every so many by distance."""
        evidence, layer = self.evidence, self.layer
        mean, var = map(values, evidence.statistics[layer.path])
        drawn = [
            samples
            for samples, seen in zip(self.samples, self.distances, strict=True)
            if samples is not None and seen is not None
        ]
        if mean is None or var is None or not drawn:
            return None
        estimates = [_estimate(*self._received(samples)) for samples in drawn[:DRAWN_CALLS]]
        errors = [
            torch.maximum((m - mean).abs() / (me + 1e-30), (v - var).abs() / (ve + 1e-30))
            for m, v, me, ve in estimates
        ]
        order = torch.stack(errors).amax(0).argsort(descending=True, stable=True)
        index = order[torch.linspace(0, len(order) - 1, min(most, len(order))).round().long()]

        def told(t: Tensor, digits: int = 4) -> tuple[float, ...]:
            return tuple(_round(value, digits) for value in t[index].tolist())

        after = None if evidence.runs is None else evidence.runs.after.get(layer.path)
        return Channels(
            total=len(order),
            index=tuple(index.tolist()),
            mean=told(mean),
            var=told(var),
            after_mean=told(after[0].double().cpu()) if after else (),
            after_var=told(after[1].double().cpu()) if after else (),
            received=tuple(
                Received(told(m), told(v), told(me, 3), told(ve, 3)) for m, v, me, ve in estimates
            ),
        )


def _estimate(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the means of the rows, (C,) each, and their standard errors: 0 of a single row."""
    n = len(mean)
    errors = [
        (t.var(0, correction=1) / n).sqrt() if n > 1 else torch.zeros_like(t[0])
        for t in (mean, var)
    ]
    return mean.mean(0), var.mean(0), errors[0], errors[1]


def _round(x: float, digits: int = 4) -> float:
    """Round to significant digits: more cannot be seen."""
    return float(f"{x:.{digits}g}")
