"""SN308: batches of several domains, one after the other, through the same statistics."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.dispersion import batches_of
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import short


class MixedDomains(Rule):
    """Batches of several domains take turns, and one set of running statistics is to fit all.

    What it finds:
        Batches that differ by more than their samples explain (`dispersion.py`) and fall into
        groups that take turns: source and target, labelled and unlabelled, clean and attacked, one
        data set and another. What each layer receives of every sample is compared, means and
        variances, in eval mode, where no sample sees another. A permutation test decides, and what
        the batches differ by has to be 0.15 deviations at least, half of what SN105 calls far.

        Batches that differ otherwise are SN309's: one comparison decides, and gives one of the two
        names. Needs 4 batches of at least 2 samples, 32 in all. Measured by
        benchmarks/data_rules.py on 80 networks with batches drawn at random: none named.

    Why it matters:
        In train mode every domain is normalised by itself. The running statistics are a blend: the
        mean lies between the domains, and the variance is that within them, without what lies
        between. In eval mode each domain is off to its own side. Measured on two domains in turns:
        both off by seven deviations; with both in every batch, by none.

    When it is fine:
        When every batch of inference is normalised by itself too, or the domains have norms of
        their own. Not reported: layers that are frozen, and models without a layer that normalises
        by the batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> real, drawn = torch.randn(4, 16, 8), 3 + torch.randn(4, 16, 8)
        >>> turns = [batch for pair in zip(real, drawn) for batch in pair]
        >>> check(net, turns, select="mixed-domains").findings[0].evidence["groups"]
        [[0, 2, 4, 6], [1, 3, 5, 7]]

    Fix:
        Advice: put samples of all domains in every batch, in the shares in which they will come; or
        give each domain norms of its own (AdvProp, DSBN); or recalibrate for the one that is
        deployed.

    References:
        Xie et al., "Adversarial Examples Improve Image Recognition", arXiv 1911.09665;
        kekmodel/FixMatch-pytorch#7; YU1ut/MixMatch-pytorch#5; woozch/DSBN#10.
    """

    code = "SN308"
    slug = "mixed-domains"
    severity = "warning"
    needs = ("forward",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names the layers where the groups are apart."""
        seen = batches_of(evidence)
        if seen is None or not seen.all.is_real or seen.all.pattern != "groups":
            return
        groups = seen.all.groups
        named = " and ".join(", ".join(map(str, group)) for group in groups)
        yield self.finding(
            tuple(layer.path for layer in seen.telling),
            f"the batches are of {len(groups)} kinds that take turns: {named}",
            evidence={
                "groups": [list(group) for group in groups],
                "ratio": seen.all.ratio,
                "size": seen.all.size,
                "p": seen.all.p,
            },
            note=f"batches dealt at random would vary {short(seen.all.ratio)} times less",
            table=seen.table,
            help="put samples of every kind in each batch, or give each kind norms of its own",
            where=evidence.where(seen.telling[0]),
        )
