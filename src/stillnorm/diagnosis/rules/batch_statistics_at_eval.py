"""SN107: no running statistics, so that eval depends on the batch."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.composition import batch_dependence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.fixing.acceptance import accepted
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.repair import track_statistics
from stillnorm.reports.numbers import count, short

NOISE = 1e-3  # relative: far above what another batch size does to the rounding of a convolution


class BatchStatisticsAtEval(Rule):
    """A batch norm without running statistics normalises by the batch in eval mode too.

    What it finds:
        A batch norm without running mean and variance (`track_running_stats=False`). With batches,
        the first one is run whole and in half: when a sample's output depends on its batch mates,
        this is an error, and by how much is told.

    Why it matters:
        `eval()` has no effect on such a layer. The answer for one image depends on which others are
        in the batch, a batch of one can fail or lose all information, and validation scores depend
        on the batch size. Leaving `track_running_stats` on and calling `eval()` is what "use the
        statistics of training" means.

    When it is fine:
        Some generators and meta-learners want it. Not reported: InstanceNorm, which never mixes
        samples; layers that have statistics although tracking was switched off later.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False))
        >>> check(net).findings[0].severity, check(net, torch.randn(8, 4)).findings[0].severity
        ('warning', 'error')

    Fix:
        `sn.track_statistics(model, batches)` gives the layers statistics from data (unsafe: eval
        outputs change, and the `state_dict` has new keys). Or replace them by a norm that does not
        need a batch (GroupNorm).

    References:
        pytorch/pytorch#37823 and #75252; the PyTorch forum, "Pytorch documentation for Batchnorm".
    """

    code = "SN107"
    slug = "batch-statistics-at-eval"
    severity = "warning"
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [x for x in evidence.layers if x.normalizes_by(training=False) == "batch"]
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        moved = batch_dependence(evidence)
        proved = moved is not None and moved > NOISE
        verb = "has" if len(paths) == 1 else "have"
        yield self.finding(
            paths,
            f"{count(len(paths), 'layer')} {verb} no running statistics: eval normalises by the "
            "batch",
            severity="error" if proved else "warning",
            evidence={"output_moved": moved},
            note=f"proved: with half of the batch mates gone, eval outputs move by "
            f"{short(moved)} of their spread"
            if moved is not None and proved
            else "",
            help="sn.track_statistics(model, batches), or GroupNorm",
            fix=_fix(evidence, layers),
            where=evidence.where(*layers),
        )


def _fix(evidence: Evidence, layers: list[NormLayer]) -> Fix | None:
    """Return the tracking of the layers that can track; it is tried, which runs the batches."""
    model, runs = evidence.model, evidence.runs
    if runs is None:
        return None
    modules = [layer.module for layer in layers]
    paths = accepted(
        model,
        layers,
        lambda: track_statistics(model, iter(runs.batches), modules, forward=runs.forward),
    )
    return Fix("track statistics", "unsafe", "track", paths) if paths else None
