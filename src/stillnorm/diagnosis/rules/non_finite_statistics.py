"""SN102: NaN or infinity in the running statistics."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.stored import values
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table


class NonFiniteStatistics(Rule):
    """A NaN or an infinity is in the running statistics, and stays there.

    What it finds:
        A value that is not finite in `running_mean` or `running_var`.

    Why it matters:
        One bad batch is enough (an overflow under autocast, a corrupt sample, uninitialised memory
        in a warm-up), and the running average never recovers: measured, 1000 good batches do not
        heal it. Train mode does not read the buffers, so the loss looks fine until validation, and
        a GradScaler that skips the step skips it after the buffers are destroyed.

    When it is fine:
        Never. Reported even where the forward does not call the layer: the state is saved with it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> _ = net[1].running_var[3].fill_(torch.nan)
        >>> check(net).findings[0].evidence["first_channel"]
        3

    Fix:
        Unsafe: `sn.recalibrate` on the batches given, which does not use the old values.

    References:
        pytorch/pytorch#90342, #88474 and #96798; open-edge-platform/anomalib#2965.
    """

    code = "SN102"
    slug = "non-finite-statistics"
    severity = "error"
    needs = ("state",)
    explains = ("SN103", "SN104", "SN105", "SN111")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        found = {layer: bad for layer in evidence.layers if (bad := _bad_channels(evidence, layer))}
        poisoned = {layer: found[layer] for layer in self.unexplained(evidence, found)}
        if not poisoned:
            return
        paths = tuple(layer.path for layer in poisoned)
        first = next(iter(poisoned))
        yield self.finding(
            paths,
            "the running statistics hold NaN or infinity: eval outputs are destroyed, train mode "
            "does not show it",
            evidence={
                "first_channel": poisoned[first][0],
                "channels": {layer.path: len(bad) for layer, bad in poisoned.items()},
            },
            table=Table(
                ("", "channels", "first"),
                tuple(
                    (layer.path, f"{len(bad)} of {layer.num_features}", str(bad[0]))
                    for layer, bad in list(poisoned.items())[:3]
                ),
                "lrr",
            ),
            help="sn.recalibrate(model, batches); then find the batch that did it "
            "(overflow in half precision, a corrupt sample)",
            fix=self.estimation(evidence, poisoned),
            where=evidence.where(*poisoned),
        )


def _bad_channels(evidence: Evidence, layer: NormLayer) -> list[int]:
    mean, var = map(values, evidence.statistics[layer.path])
    if mean is None or var is None:
        return []
    finite = mean.isfinite() & var.isfinite()
    return (~finite).nonzero().flatten().tolist()
