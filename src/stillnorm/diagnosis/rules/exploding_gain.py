"""SN104: a channel that was constant in training and is amplified without bound."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.stored import scale, values
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

CONSTANT = 1e-3  # of eps: three hundredths of a deviation come out, and less
EXPLODES = 50.0  # what a deviation usual in the layer comes out as
SHOWN = 3


class ExplodingGain(Rule):
    r"""A channel hardly varied while its statistics were taken, and its gain is enormous.

    What it finds:
        Channels whose running variance is no more than a thousandth of eps, so that eps and not the
        data sets the gain :math:`g = |\gamma| / \sqrt{v + \epsilon}`, and where
        :math:`g \sigma > 50`, with :math:`\sigma` the median deviation of the layer's channels: if
        the channel ever moves as its neighbours do, fifty or more comes out where one is usual.

        A large gain alone is no fault: it undoes a small input, as in MobileNetV2 and wherever
        weight decay shrinks a convolution. Hence the neighbours as the measure, and the
        thousandth: of 14 healthy networks of random weights two have such channels at eps
        itself, and one at a hundredth of it.

    Why it matters:
        A feature that was constant in training, dead at the time, or from a batch of copies: the
        first input that wakes it up drowns all others. Measured: an input off by 0.1 comes out as
        31.6, and the norm of a network's eval output goes from 12 to 3054. float16 turns variances
        below 6e-8 into 0.

    When it is fine:
        When the channel can never move (a unit that is dead for every input): where the batches
        given leave it at rest, it is a remark. Not reported: a weight near zero.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> net[1].running_var[3] = 0.0
        >>> report = check(net)
        >>> report.findings[0].slug, round(report.findings[0].evidence["gain"]["1"])
        ('exploding-gain', 316)

    Fix:
        Advice: prune the channel or set its weight to zero; a larger eps; statistics from data in
        which it varies.

    References:
        torch/nn#770; pytorch/pytorch#5410; Tomiinek/Multilingual_Text_to_Speech#81.
    """

    code = "SN104"
    slug = "exploding-gain"
    severity = "warning"
    needs = ("state",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer with the largest gain stands first."""
        evidence.must_know("eps")
        seen = {
            layer: loud for layer in evidence.layers if (loud := _exploding(evidence, layer)) != {}
        }
        layers = sorted(
            self.unexplained(evidence, seen), key=lambda layer: -max(seen[layer].values())
        )
        if not layers:
            return
        channels = sum(len(seen[layer]) for layer in layers)
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"{count(channels, 'channel')} of hardly any variance with a gain of up to "
            f"{short(max(seen[layers[0]].values()))}",
            severity="info" if all(_at_rest(evidence, x, seen[x]) for x in layers) else "warning",
            evidence={
                "channels": {layer.path: list(seen[layer]) for layer in layers},
                "gain": {layer.path: max(seen[layer].values()) for layer in layers},
            },
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            table=Table(
                ("", "channels", "first", "gain"),
                tuple(
                    (
                        layer.path or "(root)",
                        f"{len(seen[layer])} of {layer.num_features}",
                        str(min(seen[layer])),
                        short(max(seen[layer].values())),
                    )
                    for layer in layers[:SHOWN]
                ),
                "lrrr",
            ),
            help="set the weight of these channels to zero, or estimate the statistics on data in "
            "which they vary: sn.recalibrate(model, batches)",
            where=evidence.where(*layers),
        )


def _exploding(evidence: Evidence, layer: NormLayer) -> dict[int, float]:
    """Return the gains of the channels that would explode, by channel."""
    var, weight = values(evidence.statistics[layer.path][1]), scale(layer)
    if var is None or weight is None or layer.eps <= 0 or var.shape != weight.shape:
        return {}
    if not var.numel() or not (var.isfinite() & (var >= 0)).all():
        return {}  # other rules' findings
    gain = weight / (var + layer.eps).sqrt()
    loud = (var <= CONSTANT * layer.eps) & (gain * var.median().sqrt() > EXPLODES)
    return {int(i): float(gain[i]) for i in loud.nonzero().flatten()}


def _at_rest(evidence: Evidence, layer: NormLayer, gains: dict[int, float]) -> bool:
    """Tell whether the batches reach the layer and no sample of theirs makes it explode."""
    samples = evidence.samples(layer, "eval")
    mean = values(evidence.statistics[layer.path][0])
    if samples is None or mean is None or not samples.finite:
        return False
    off = (samples.mean - mean).square() + samples.within()  # (n, C), mean squares
    return all(gain * float(off[:, i].max()) ** 0.5 <= EXPLODES for i, gain in gains.items())
