"""SN206: nothing to take a mean and a variance of."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class SingleValueChannel(Rule):
    """A batch has one value per channel, or two, where a norm takes its statistics.

    What it finds:
        A layer that normalises by the batch in train mode and receives one or two values per
        channel, at the batch size given; or, with a DataLoader that draws at random and does not
        drop it, in the last and smaller batch of every epoch, read or not.

    Why it matters:
        With one value torch raises "Expected more than 1 value per channel when training", hours
        into the epoch. With two it says nothing, and every output is plus or minus one times the
        weight: the magnitude is lost.

    When it is fine:
        In eval mode, so the last batch of a DataLoader that does not shuffle (validation) does not
        count. Not reported: frozen layers; single images whose maps hold many positions;
        SyncBatchNorm with enough values on all ranks together.

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
        runs = evidence.measured
        sizes = runs.batch_sizes
        # What a loader leaves over counts where it is trained on; see `_left_over`.
        whole = 0 if runs.loader is None else max(sizes)
        fewest = {
            layer: min(calls, key=lambda call: call.values)
            for layer in evidence.layers
            if evidence.trains_by_batch(layer)
            and (calls := [c for c in evidence.calls(layer) if sizes[c.batch] >= whole])
        }
        values = {layer: call.values * _ranks(layer) for layer, call in fewest.items()}
        if few := _few(values):
            size = min(sizes[fewest[layer].batch] for layer in few)
            yield self._finding(evidence, few, f"in batches of {size}")
        elif left := _left_over(evidence):
            last = {x: n * left // max(1, sizes[fewest[x].batch]) for x, n in values.items()}
            if few := _few(last):
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
    batches = None if loader is None else loader.batch_sampler
    if not isinstance(batches, BatchSampler) or batches.drop_last:
        return 0
    sampler = batches.sampler
    shuffles = isinstance(sampler, _RANDOM) or getattr(sampler, "shuffle", False)
    if not shuffles or not isinstance(sampler, Sized):
        return 0
    return len(sampler) % batches.batch_size


# A DistributedSampler says itself whether it shuffles; its length is that of its rank.
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _few(values: dict[NormLayer, int]) -> dict[NormLayer, int]:
    return {layer: n for layer, n in values.items() if 1 <= n <= 2}


def _ranks(layer: NormLayer) -> int:
    """Return over how many ranks a layer takes its statistics."""
    group = torch.distributed
    if not isinstance(layer.module, nn.SyncBatchNorm) or not group.is_available():
        return 1
    return group.get_world_size(layer.module.process_group) if group.is_initialized() else 1
