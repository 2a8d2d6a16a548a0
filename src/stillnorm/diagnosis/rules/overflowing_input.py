"""SN402: inputs near or past the range of their dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.runs import Flow
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.stored import values
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import short
from stillnorm.tracing import Call, tensors_in

_FLOWS: tuple[Flow, ...] = ("batch", "eval")
NEAR = 0.5  # of the range: one doubling more is past it
SHOWN = 3


class OverflowingInput(Rule):
    """What a norm receives is infinite or NaN, or about to be.

    What it finds:
        The first layer, in order of the forward, whose input has values that are not finite; what
        comes after is its consequence. And layers whose float16 input uses half of the range, up to
        65504, or more. In other dtypes the input's mean and variance are looked at: values whose
        squares are beyond float32, from 1.8e19, count as out of range too.

    Why it matters:
        One such batch puts NaN or infinity into the running statistics, where they stay (SN102).
        Under autocast convolutions return float16 whatever the weights are, a GradScaler skips the
        step only after the buffers are destroyed, and another seed or a larger image is enough to
        double a maximum.

    When it is fine:
        Never where values are not finite. Near the range, with a dtype that the network is not
        trained in. Not reported: what follows a layer whose own statistics are NaN, infinite or
        negative, which other rules name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).half()
        >>> report = check(net, [40000 * torch.rand(64, 4).half()], select="SN402")
        >>> report.findings[0].slug
        'overflowing-input'

    Fix:
        Advice: bfloat16 in place of float16; the layer that feeds the norm in float32; inputs of
        another scale. Afterwards `sn.recalibrate`, if statistics were destroyed.

    References:
        pytorch/pytorch#90342, #96798 and #88474; open-edge-platform/anomalib#2965.
    """

    code = "SN402"
    slug = "overflowing-input"
    severity = "error"
    needs = ("forward",)
    explains = ("SN105",)
    spreads = True

    def symptoms(self, finding: Finding) -> tuple[str, ...]:
        """Return what values out of range explain; those that are only near it explain nothing."""
        return self.explains if finding.severity == "error" else ()

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding: where values stop being finite, or how near they are."""
        broken = dict.fromkeys(
            layer for flow in _FLOWS if (layer := _first_broken(evidence, flow)) is not None
        )
        largest = {
            layer: part
            for layer in evidence.layers
            if layer not in broken and (part := _part(evidence, layer)) >= NEAR
        }
        near = sorted(largest, key=lambda layer: -largest[layer])
        if broken:
            yield self._broken(evidence, list(broken))
        if near:
            yield self._near(evidence, near, largest)

    def _broken(self, evidence: Evidence, layers: Sequence[NormLayer]) -> Finding:
        first = layers[0]
        calls = [call for flow in _FLOWS for call in evidence.calls(first, flow)]
        bad = next(call for call in calls if not _is_finite(call))
        given = tensors_in(evidence.measured.batches[bad.batch])
        from_user = any(x.is_floating_point() and not x.isfinite().all() for x in given)
        return self.finding(
            tuple(layer.path for layer in layers),
            f"the input of {first.path or 'the model'} leaves the range of {_name(bad.dtype)} "
            f"in batch {bad.batch}: NaN or infinity from there on",
            evidence={"batch": bad.batch, "dtype": _name(bad.dtype), "in_the_batch": from_user},
            note="the batch itself holds NaN or infinity" if from_user else "",
            help="look for the samples that hold it"
            if from_user
            else "bfloat16 for float16, the layer before in float32, or a smaller input; then "
            "sn.recalibrate(model, batches) if statistics were destroyed",
            where=evidence.where(*layers),
        )

    def _near(
        self, evidence: Evidence, layers: Sequence[NormLayer], parts: dict[NormLayer, float]
    ) -> Finding:
        limit = torch.finfo(torch.float16).max
        return self.finding(
            tuple(layer.path for layer in layers),
            f"inputs of {layers[0].path or 'the model'} use {100 * parts[layers[0]]:.0f} % of the "
            f"range of float16, {short(limit * parts[layers[0]], 5)} of {limit:.0f}",
            severity="warning",
            evidence={"largest": {layer.path: limit * parts[layer] for layer in layers}},
            table=Table(
                ("", "largest", "range"),
                tuple(
                    (x.path or "(root)", short(limit * parts[x], 5), f"{limit:.0f}")
                    for x in layers[:SHOWN]
                ),
                "lrr",
            ),
            help="bfloat16 for float16, the layer before in float32, or a smaller input",
            where=evidence.where(*layers),
        )


def _first_broken(evidence: Evidence, flow: Flow) -> NormLayer | None:
    """Return the layer where values that are not finite first arrive, with no cause before it."""
    calls = [(call, layer) for layer in evidence.layers for call in evidence.calls(layer, flow)]
    calls.sort(key=lambda pair: (pair[0].batch, pair[0].order))
    for call, layer in calls:
        if not _is_finite(call):
            return layer
        if call.used == "running" and not _is_usable(evidence, layer):
            return None
    return None


def _is_finite(call: Call) -> bool:
    """Tell whether the input and its variance are numbers in the range of their type."""
    largest = torch.finfo(torch.promote_types(call.dtype, torch.float32)).max
    sound = (call.sample_mean.abs() <= largest**0.5) & (call.sample_var <= largest)  # NaN is not
    return bool(sound.all()) and (call.largest is None or math.isfinite(call.largest))


def _is_usable(evidence: Evidence, layer: NormLayer) -> bool:
    """Tell whether the layer's running statistics give finite outputs."""
    mean, var = map(values, evidence.statistics[layer.path])
    if mean is None or var is None:
        return True
    return bool((mean.isfinite() & var.isfinite() & (var + layer.eps > 0)).all())


def _part(evidence: Evidence, layer: NormLayer) -> float:
    """Return what part of float16's range the layer's finite inputs use."""
    seen = [call.largest for flow in _FLOWS for call in evidence.calls(layer, flow)]
    finite = [x for x in seen if x is not None and math.isfinite(x)]
    return max(finite, default=0.0) / torch.finfo(torch.float16).max


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
