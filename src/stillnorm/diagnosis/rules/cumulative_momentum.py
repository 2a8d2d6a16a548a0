"""SN109: the average of everything ever seen."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class CumulativeMomentum(Rule):
    """Momentum None weighs the first batch of training as much as the last.

    What it finds:
        Momentum None in a batch norm that updates its statistics in train mode, in a model with
        parameters that train.

    Why it matters:
        With None the statistics are the plain average of all batches since the counter was last
        reset. That is right for calibration, where the weights stand still. In training the
        weights move, and the average never forgets the network it started from. Measured: 2.0
        where the mean of late is 10. The update reads the counter as a number, so that
        `torch.compile(fullgraph=True)` fails, too.

    When it is fine:
        While statistics are estimated, as `torch.optim.swa_utils.update_bn` does. Not reported:
        models without parameters that train; layers that are held.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None))
        >>> check(net, select="cumulative-momentum").findings[0].slug
        'cumulative-momentum'

    Fix:
        Advice: `momentum=0.1` for training; `sn.recalibrate` where None was meant to estimate.

    References:
        pytorch/pytorch#194504 and #30559.
    """

    code = "SN109"
    slug = "cumulative-momentum"
    severity = "info"
    needs = ("tree",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [layer for layer in evidence.layers if _remembers_all(evidence, layer)]
        if not layers or not any(p.requires_grad for p in evidence.model.parameters()):
            return
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"momentum None in {count(len(layers), 'layer')}: the statistics are the average of "
            "all batches since the first",
            evidence={"layers": len(layers)},
            help="momentum=0.1 for training; sn.recalibrate(model, batches) to estimate statistics",
            where=evidence.where(*layers),
        )


def _remembers_all(evidence: Evidence, layer: NormLayer) -> bool:
    return (
        layer.family == "batch"
        and layer.momentum is None
        and layer.updates_statistics(evidence.in_train(layer))
    )
