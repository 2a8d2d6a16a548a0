"""SN115: too few updates for the momentum."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.measure import ENOUGH_SAMPLES
from stillnorm.diagnosis.measures.residue import unconverged
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count

SHOWN = 3


class UnconvergedStatistics(Rule):
    r"""The running statistics have had too few updates: the initial 0 and 1 are still in them.

    What it finds:
        Layers where momentum m after n counted updates leaves :math:`w = (1 - m)^n` of the initial
        mean 0 and variance 1, at least 5 %. The statistics must not contradict that: with w of the
        initial 1 in it, no variance can be below w.

        With batches they decide: the statistics have to be far from them (as in SN105), and less
        than half as far once the initial share is taken out. Without batches all layers of one
        count and momentum have to agree: no variance below w, the smallest within a quarter of w,
        and the share large enough to matter (0.3 deviations, or a factor of 1.9).

    Why it matters:
        Train mode is well trained, eval mode is half untrained. Short runs, a small momentum, large
        batches, norms that were reset or added late. Measured after nine steps at momentum 0.1,
        which leave 39 %: eval 64 %, train mode 85 %, recalibrated 85 %.

    When it is fine:
        The counter alone proves nothing: `sn.recalibrate` and `update_bn` leave true statistics
        beside a small n, old checkpoints beside n = 0. Not reported: those; held layers, which use
        the same statistics in both modes; momentum None, which keeps nothing of the start.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.05))
        >>> batches = [5 + torch.randn(64, 4) for _ in range(4)]
        >>> for batch in batches:
        ...     _ = net(batch)
        >>> check(net, batches).findings[0].message
        'momentum 0.05 after 4 updates leaves 81 % of the initial values'

    Fix:
        Unsafe: `sn.recalibrate` on the batches given. Or train on, or a larger momentum.

    References:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3;
        pytorch/pytorch#4741; keras-team/keras#3366.
    """

    code = "SN115"
    slug = "unconverged-statistics"
    severity = "warning"
    needs = ("state",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer with the largest share left stands first."""
        evidence.must_know("momentum")
        found = unconverged(evidence)
        layers = evidence.in_order(self.unexplained(evidence, found))
        layers = sorted(layers, key=lambda layer: -found[layer].left)
        if not layers:
            return
        yield self.finding(
            tuple(layer.path for layer in layers),
            str(found[layers[0]]),
            severity="error" if _proved(evidence, layers) else "warning",
            evidence={
                "left": {layer.path: found[layer].left for layer in layers},
                "updates": {layer.path: found[layer].updates for layer in layers},
            },
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            table=Table(
                ("", "updates", "momentum", "initial"),
                tuple(
                    (
                        layer.path or "(root)",
                        str(found[layer].updates),
                        f"{found[layer].momentum:g}",
                        f"{100 * found[layer].left:.0f} %",
                    )
                    for layer in layers[:SHOWN]
                ),
                "lrrr",
            ),
            help="sn.recalibrate(model, batches) on training data; for training, a larger momentum",
            fix=self.estimation(evidence, layers),
            where=evidence.where(*layers),
        )


def _proved(evidence: Evidence, layers: list[NormLayer]) -> bool:
    seen = [evidence.distance(layer, "batch") for layer in layers]
    return any(one is not None and one.samples >= ENOUGH_SAMPLES for one in seen)
