"""SN403: a mean so large that the deviation is lost beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

# |mean| / deviation from which the dtype loses it; see the measurements in the rule.
LIMIT = {torch.float32: 3e3, torch.float16: 1e3, torch.bfloat16: 1e2}
SHOWN = 3

Seen = tuple[float, int]  # the largest ratio, in how many channels it is over the limit


class CancellingMean(Rule):
    r"""A channel's mean is so large beside its deviation that its precision is used up by it.

    What it finds:
        Channels whose :math:`|\mu| / \sqrt{\sigma^2 + \epsilon}` in the batches given is over 3000
        for a float32 input, 1e3 for float16, 100 for bfloat16. Channels whose variance is below
        eps are left out: they are constant.

        Measured on torch 2.13, CPU, float32, variance in train mode over the true one. Kernels
        that sum in float32 (channels_last, and inputs (N, C)) lose it, the sooner the more values:
        channels_last, 200 704 values per channel: right at a ratio of 1000, 20 times at 3000, 138
        times at 1e4; (N, C), 65 536 values: right at 3000, 9 times at 1e4, 840 times at 1e5;
        channels_last, 16 384 values: right at 3e4, 120 times at 1e5. Contiguous inputs keep the
        variance, and lose 2 % of a deviation in the output at 1e6, as eval mode does. In half
        precision kernels are exact; the input is rounded before, at these limits to 0.14
        deviations.

    Why it matters:
        Statistics and outputs are then rounding errors, in train mode and in eval, and differ with
        the memory format. Timestamps, coordinates and identifiers as features, raw sensor values,
        offsets in front of the norm.

    When it is fine:
        With contiguous inputs up to about 1e6, and with few values per channel; memory format and
        batch size are one line away. `sn.recalibrate` measures such variances exactly, and training
        then loses them again.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> report = check(net, [1.7e9 + 1000 * torch.randn(64, 4)], select="SN403")
        >>> report.findings[0].slug
        'cancelling-mean'

    Fix:
        Advice: subtract the offset from the input, in float64 where it is an input of the model;
        drop or freeze the bias that makes it.

    References:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance";
        pytorch/pytorch#5410. Measured by benchmarks/cancelling_mean.py.
    """

    code = "SN403"
    slug = "cancelling-mean"
    severity = "warning"
    needs = ("forward",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer with the largest ratio stands first."""
        seen = {layer: far for layer in evidence.layers if (far := _far(evidence, layer))}
        layers = sorted(seen, key=lambda layer: -seen[layer][0])
        if not layers:
            return
        first = layers[0]
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"the mean of {first.path or 'the model'}'s input is {short(seen[first][0])} "
            f"deviations: {_name(_dtype(evidence, first))} loses what lies beside it",
            evidence={
                "ratio": {layer.path: seen[layer][0] for layer in layers},
                "channels": {layer.path: seen[layer][1] for layer in layers},
            },
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            table=Table(
                ("", "channels", "mean", "input"),
                tuple(
                    (
                        x.path or "(root)",
                        f"{seen[x][1]} of {x.num_features}",
                        f"{short(seen[x][0])} sigma",
                        _name(_dtype(evidence, x)),
                    )
                    for x in layers[:SHOWN]
                ),
                "lrrl",
            ),
            help="subtract the offset before the norm, or remove what adds it",
            where=evidence.where(*layers),
        )


def _far(evidence: Evidence, layer: NormLayer) -> Seen | None:
    """Return the layer's largest ratio of mean and deviation if it is over the limit."""
    samples = evidence.samples(layer, "batch")
    dtype = _dtype(evidence, layer)
    if samples is None or not samples.finite or dtype not in LIMIT:
        return None
    mean, var = samples.pooled
    if layer.family == "instance":
        mean, var = samples.mean.abs().mean(0), samples.within().mean(0)
    ratio: Tensor = (mean.abs() / (var + layer.eps).sqrt())[var > layer.eps]
    far = ratio[ratio > LIMIT[dtype]]
    return (float(far.max()), far.numel()) if far.numel() else None


def _dtype(evidence: Evidence, layer: NormLayer) -> torch.dtype | None:
    return next((call.dtype for call in evidence.calls(layer, "batch")), None)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
