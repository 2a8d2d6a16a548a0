"""SN206: nothing to take a mean and a variance of."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from torch.utils.data import RandomSampler

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class SingleValueChannel(Rule):
    """A batch has one value per channel, or two, where a norm takes its statistics.

    What it finds:
        A layer that normalises by the batch in train mode and receives one or two values per
        channel, at the batch size given; or, with a shuffling DataLoader, in the last and smaller
        batch of every epoch.

    Why it matters:
        With one value torch raises "Expected more than 1 value per channel when training", hours
        into the epoch. With two it says nothing, and every output is plus or minus one times the
        weight: the magnitude is lost.

    When it is fine:
        In eval mode, so a DataLoader that does not shuffle (validation) is not asked for its last
        batch. Not reported: frozen layers; single images whose maps hold many positions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
        >>> [f.code for f in check(net, torch.randn(2, 3, 8, 8), select="SN206").findings]
        ['SN206']

    Fix:
        Advice: `drop_last=True` in the training DataLoader; larger batches; after global pooling a
        norm that does not need a batch; or `sn.freeze` with pretrained statistics.

    References:
        fastai/fastai#1352; openvinotoolkit/nncf#379; yassouali/pytorch-segmentation#8.
    """

    code = "SN206"
    slug = "single-value-channel"
    severity = "error"
    needs = ("forward",)
    explains = ("SN207",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield a finding for the batches given, or else one for the last batch of the epoch."""
        values = {
            layer: min(call.values for call in calls)
            for layer in evidence.layers
            if evidence.trains_by_batch(layer) and (calls := evidence.calls(layer))
        }
        few = {layer: n for layer, n in values.items() if 1 <= n <= 2}
        if few:
            yield self._finding(evidence, few, f"in batches of {evidence.measured.batch_sizes[0]}")
            return
        left = _left_over(evidence)
        if left:
            last = {
                layer: n // max(evidence.measured.batch_sizes) * left for layer, n in values.items()
            }
            few = {layer: n for layer, n in last.items() if 1 <= n <= 2}
            if few:
                yield self._finding(
                    evidence, few, f"in the last batch of every epoch, which has {left}"
                )

    def _finding(self, evidence: Evidence, few: dict[NormLayer, int], when: str) -> Finding:
        least = min(few.values())
        effect = "training stops with an error" if least == 1 else "every output is +1 or -1"
        return self.finding(
            tuple(layer.path for layer in few),
            f"{count(least, 'value')} per channel {when}: {effect}",
            evidence={"values": {layer.path: n for layer, n in few.items()}},
            help="drop_last=True in the training DataLoader, larger batches, GroupNorm after "
            "global pooling, or sn.freeze with pretrained statistics",
            where=evidence.where(*few),
        )


def _left_over(evidence: Evidence) -> int:
    """Return how many samples the last batch of a shuffling DataLoader has; 0 for a full one."""
    loader = evidence.measured.loader
    if loader is None or loader.drop_last or not loader.batch_size:
        return 0
    if not isinstance(loader.sampler, RandomSampler) or not isinstance(loader.sampler, Sized):
        return 0
    return len(loader.sampler) % loader.batch_size
