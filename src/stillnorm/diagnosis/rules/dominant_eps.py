"""SN111: channels whose scale eps decides."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.stored import scale, values
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

AUDIBLE = 0.01  # of the layer's largest channel
SHOWN = 3


class DominantEps(Rule):
    r"""Eps, not the variance, decides how loud many channels are; or eps is zero.

    What it finds:
        Layers where more than half of the channels that carry anything have a running variance
        below eps: eps takes 29 % or more off what they put out. A channel carries something if
        its output deviation, :math:`|\gamma| \sqrt{v / (v + \epsilon)}`, is at least a hundredth of
        the layer's largest; dead channels do not.

        And layers with eps 0 that train mode would normalise by the batch, where torch raises, or
        that have a variance of 0.

    Why it matters:
        Eps is no part of a `state_dict`. Frameworks differ (1e-5 torch, 1e-3 Keras and its ports,
        2e-5 MXNet), so a port keeps the weights and loses it. Measured, 1e-3 for 1e-5: 3.2 to 9.5
        times in channels of small variance, 1.0005 elsewhere. With eps 0 a variance of 0 makes
        infinity or NaN.

    When it is fine:
        When eps is the one that the network was trained with; hence a remark, and not one about
        variances of a few eps, which healthy MobileNets have in whole layers. Eps 0 in another
        library's frozen layer whose variances are all positive is fine, and not reported.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, eps=1e-3))
        >>> _ = net[1].running_var.fill_(5e-4)
        >>> report = check(net)
        >>> report.findings[0].severity, report.findings[0].evidence["channels"]
        ('info', {'1': 8})

    Fix:
        Advice: compare `eps` with that of the framework that the weights come from.

    References:
        lukemelas/EfficientNet-PyTorch#229; huggingface/transformers#19454; pytorch/vision#2169;
        pytorch/pytorch#173337 (eps 0).
    """

    code = "SN111"
    slug = "dominant-eps"
    severity = "info"
    needs = ("state",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding about eps 0, and one about small variances."""
        evidence.must_know("eps")
        without = [layer for layer in evidence.layers if _needs_eps(evidence, layer)]
        if layers := self.unexplained(evidence, without):
            yield self.finding(
                tuple(layer.path for layer in layers),
                f"eps 0 in {count(len(layers), 'layer')}: train mode raises, and a variance of 0 "
                "gives NaN",
                severity="warning",
                evidence={"layers": len(layers)},
                help="the eps that the weights were trained with; torch's own is 1e-5",
                where=evidence.where(*layers),
            )
        small = {layer: n for layer in evidence.layers if (n := _dominated(evidence, layer))}
        if layers := self.unexplained(evidence, small):
            yield self.finding(
                tuple(layer.path for layer in layers),
                f"eps takes 29 % or more off {count(sum(small[x] for x in layers), 'channel')} in "
                f"{count(len(layers), 'layer')}",
                evidence={
                    "channels": {layer.path: small[layer] for layer in layers},
                    "eps": {layer.path: layer.eps for layer in layers},
                },
                note="eps is not saved with the weights; 1e-3 is that of Keras and its ports",
                also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
                table=Table(
                    ("", "channels", "eps"),
                    tuple(
                        (x.path or "(root)", f"{small[x]} of {x.num_features}", short(x.eps))
                        for x in layers[:SHOWN]
                    ),
                    "lrr",
                ),
                help="compare eps with that of the framework that the weights come from",
                where=evidence.where(*layers),
            )


def _needs_eps(evidence: Evidence, layer: NormLayer) -> bool:
    if layer.eps != 0:
        return False
    var = values(evidence.statistics[layer.path][1])
    return evidence.trains_by_batch(layer) or (var is not None and bool((var == 0).any()))


def _dominated(evidence: Evidence, layer: NormLayer) -> int:
    """Return how many channels eps dominates, where that is most of those that carry anything."""
    var, weight = values(evidence.statistics[layer.path][1]), scale(layer)
    if var is None or weight is None or layer.eps <= 0 or var.shape != weight.shape:
        return 0
    if not var.numel() or not (var.isfinite() & (var >= 0)).all():
        return 0  # other rules' findings
    output = weight * (var / (var + layer.eps)).sqrt()
    audible = output > AUDIBLE * output.max()
    dominated = int(((var < layer.eps) & audible).sum())
    return dominated if 2 * dominated > int(audible.sum()) else 0
