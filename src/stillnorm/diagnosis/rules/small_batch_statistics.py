"""SN207: batch statistics that are mostly noise."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count

SHOWN = 3
NOISY = 0.3


class SmallBatchStatistics(Rule):
    """Batches are so small that batch statistics are mostly noise.

    What it finds:
        Layers that normalise by the batch in train mode and whose batch mean scatters by more than
        0.3 deviations, predicted from the spread between the samples and the batch size given.

    Why it matters:
        Each step trains with other statistics than the last, and eval uses their average. Measured
        on digits, a small network whose optimizer always takes 64 samples: normalised 64, 16, 8, 4
        and 2 at a time (largest noise 0.13, 0.25, 0.35, 0.50 and 0.71 deviations) eval reaches
        98.2, 97.2, 97.6, 96.4 and 51.0 %. On ImageNet the loss begins at 8 and is 3.6 points at 4.
        Gradient accumulation does not help: normalisation is per forward and per device.

    When it is fine:
        Noise regularises a little. Not reported: layers on large maps, whose samples resemble each
        other; frozen layers. Judge it with batches as large as those of training, per device.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> [f.code for f in check(net, [torch.randn(4, 8)] * 8, select="SN207").findings]
        ['SN207']

    Fix:
        Advice: larger batches per device, SyncBatchNorm, GroupNorm, or `sn.freeze` with pretrained
        statistics (see the verdict).

    References:
        Wu & He, "Group Normalization", arXiv 1803.08494, figure 1; open-mmlab/mmdetection#3621.
        Threshold: benchmarks/small_batches.py.
    """

    code = "SN207"
    slug = "small-batch-statistics"
    severity = "warning"
    needs = ("forward",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the noisiest layer stands first."""
        size = evidence.measured.batch_sizes[0]
        noise = {
            layer: seen
            for layer in evidence.layers
            if evidence.trains_by_batch(layer) and (seen := evidence.noise(layer)) is not None
        }
        noisy = [layer for layer, seen in noise.items() if seen > NOISY]
        layers = self.unexplained(evidence, sorted(noisy, key=noise.__getitem__, reverse=True))
        if not layers:
            return
        worst = noise[layers[0]]
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"batches of {size} are too small for {count(len(layers), 'layer')}: their means "
            f"scatter by up to {worst:.2f} sigma",
            evidence={"batch_size": size, "noise": {x.path: noise[x] for x in layers}},
            table=Table(
                ("", "noise of the batch mean"),
                tuple((x.path or "(root)", f"{noise[x]:.2f} sigma") for x in layers[:SHOWN]),
                "lr",
            ),
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            help="larger batches per device, SyncBatchNorm, GroupNorm, or sn.freeze with "
            "pretrained statistics",
            where=evidence.where(layers[0]),
        )
