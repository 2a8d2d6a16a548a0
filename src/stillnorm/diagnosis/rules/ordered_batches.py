"""SN309: batches that were not drawn at random."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.dispersion import batches_of
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import short

ALIKE = 0.5  # of the typical squared difference: sorted data have successive batches alike


class OrderedBatches(Rule):
    """Batches differ more than shuffled ones would: sorted classes, scenes, clients, time.

    What it finds:
        Batches that differ by more than their samples explain, and not in groups that take turns,
        which is SN308: one comparison of the batches (`dispersion.py`) decides, and gives one of
        the two names. A permutation test asks how often samples dealt at random would differ as
        much, and what the batches differ by has to be 0.15 deviations at least, half of what SN105
        calls far.

        Needs 4 batches of at least 2 samples, 32 in all. Measured by
        benchmarks/data_rules.py on 80 networks with batches drawn at random: none named.

    Why it matters:
        Batch statistics then carry what the samples of a batch have in common: the class, the
        scene, the client. In train mode the norm takes it out; in eval mode it is there, and the
        running statistics are those of the last batches. Measured: eval accuracy 88.5 % after
        shuffled training, 29.0 % after the same in order of class.

    When it is fine:
        For batches that are only validated on in order, since nothing is learned from them: give
        `check` training batches. Streams have no other order; small momentum or frozen layers help.
        Not reported: layers that are frozen, and models without a layer that normalises by the
        batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> x = torch.randn(128, 8) + torch.linspace(0, 4, 128).unsqueeze(1)
        >>> check(net, list(x.split(16)), select="SN309").findings[0].slug
        'ordered-batches'
        >>> check(net, list(x[torch.randperm(128)].split(16)), select="SN309").findings
        ()

    Fix:
        Advice: shuffle (`DataLoader(shuffle=True)`, a larger shuffle buffer for streams), then
        recalibrate on shuffled batches.

    References:
        pytorch/pytorch#4741; openpifpaf/openpifpaf#308; TsingZ0/PFLlib#117;
        google-research/seed_rl#28.
    """

    code = "SN309"
    slug = "ordered-batches"
    severity = "warning"
    needs = ("forward",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names the layers where the batches are apart."""
        seen = batches_of(evidence)
        if seen is None or not seen.all.is_real or seen.all.pattern != "order":
            return
        yield self.finding(
            tuple(layer.path for layer in seen.telling),
            f"the batches vary {short(seen.all.ratio)} times as much as shuffled ones would",
            evidence={
                "ratio": seen.all.ratio,
                "size": seen.all.size,
                "p": seen.all.p,
                "neighbours": seen.all.neighbours,
            },
            note="successive batches are alike, as sorted data are"
            if seen.all.neighbours < ALIKE
            else "",
            table=seen.table,
            help="shuffle the training data, then sn.recalibrate(model, batches)",
            where=evidence.where(seen.telling[0]),
        )
