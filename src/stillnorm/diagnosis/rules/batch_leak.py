"""SN310: a score that rests on which samples share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import number
from stillnorm.tracing import trace

DEALS = 2  # one that loses by accident is not enough


class BatchLeak(Rule):
    """The score rests on batch mates: dealt to other batches, the same samples score less.

    What it finds:
        A score that, by batch statistics, is higher on the batches as they were given than on the
        same samples dealt to other batches, twice at random, and higher than in eval mode: both by
        what matters (five points, or five percent). Every tensor of a batch whose first dimension
        is the batch is dealt, targets too; the sizes of the batches stay.

    Why it matters:
        Batch norm lets samples of a batch see each other. Where the batches are made by a rule (all
        of one class, positives beside their negatives, the regions of one image, views in order)
        their statistics give the answer away. The network learns to read them and is blind for
        anything else: training looks perfect, and eval is at chance. Measured on noise without any
        content: 99.9 % on the original batches, 50.5 % dealt anew, 50.2 % in eval mode.

    When it is fine:
        When a set is the unit of prediction, and inference gets the same sets in train mode. Not
        reported: batches that merely differ (SN309), as long as the answers do not rest on it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> class Net(nn.Module):                    # what noise has learned from sorted batches
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bn = nn.BatchNorm1d(8, affine=False)
        ...     def forward(self, x):
        ...         return ((x - self.bn(x)).mean(1) > 0.5).float()
        >>> x, y = torch.randn(128, 8), torch.tensor([0.0, 1.0]).repeat_interleave(64)
        >>> x[64:] += 1
        >>> batches = list(zip(x.split(16), y.split(16)))
        >>> accuracy = lambda output, batch: float((output == batch[1]).float().mean())
        >>> check(Net(), batches, score=accuracy, select="batch-leak").findings[0].code
        'SN310'

    Fix:
        Advice: deal the samples of every rule over the batches (or over ranks, as MoCo's shuffled
        batch norm does), use SyncBatchNorm, or a norm that sees one sample at a time; and train
        again.

    References:
        He et al., "Momentum Contrast", arXiv 1911.05722, section 3.3; Wu & Johnson, "Rethinking
        'Batch' in BatchNorm", arXiv 2105.07576; facebookresearch/moco#46 and #137.
    """

    code = "SN310"
    slug = "batch-leak"
    severity = "warning"
    needs = ("forward", "score")
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding about the layers that normalise by the batch."""
        layers = [
            layer
            for layer in evidence.in_order(evidence.layers)
            if layer.family == "batch"
            and evidence.trains_by_batch(layer)
            and evidence.calls(layer, "batch")
        ]
        head = evidence.measured.head
        if not layers or head is None:
            return
        if len(evidence.measured.batches) < 2:
            raise CannotTell("needs two batches: within one there is nobody to change places with")
        if not head.matters(head.batch - head.eval):
            return
        dealt = [_score_of_deal(evidence, seed) for seed in range(DEALS)]
        if not head.matters(head.batch - max(dealt)):
            return
        yield self.finding(
            tuple(layer.path for layer in layers),
            "the score rests on which samples share a batch",
            evidence={"original": head.batch, "dealt": dealt, "eval": head.eval},
            table=Table(
                ("", "score"),
                (
                    ("by batch, as given", number(head.batch, 3)),
                    ("by batch, dealt anew", number(max(dealt), 3)),
                    ("eval", number(head.eval, 3)),
                ),
                "lr",
                gap=3,
            ),
            help="deal samples that belong together to different batches, and train again; no "
            "statistics repair what the weights have learned",
            where=evidence.where(layers[0]),
        )


def _score_of_deal(evidence: Evidence, seed: int) -> float:
    """Return the score by batch statistics of the same samples in other batches."""
    runs, score = evidence.measured, evidence.request.score
    batches = dealt(runs.batches, runs.batch_sizes, torch.Generator().manual_seed(seed))
    scores: list[float] = []

    def keep(output: object, batch: object) -> None:
        if score is not None:
            scores.append(float(score(output, batch)))

    trace(evidence.model, iter(batches), forward=runs.forward, flow="batch", on_output=keep)
    weighted = (s * n for s, n in zip(scores, runs.batch_sizes, strict=True))
    return sum(weighted) / sum(runs.batch_sizes)


def dealt(
    batches: Sequence[object], sizes: Sequence[int], generator: torch.Generator
) -> list[object]:
    """Deal the samples of all batches to as many batches of the same sizes.

    Args:
        batches: The batches: nested tuples, lists and mappings of tensors.
        sizes: Samples in each.
        generator: Where the order is drawn from.

    Raises:
        CannotTell: The batches are not built alike, hold something for every sample that is no
            tensor, or samples of different shapes.

    Example:
        >>> batches = [(torch.zeros(2), "a"), (torch.ones(2), "a")]
        >>> (x, name), _ = dealt(batches, [2, 2], torch.Generator().manual_seed(0))
        >>> x.shape, name
        (torch.Size([2]), 'a')
    """
    flat = [tree_flatten(batch) for batch in batches]
    if any(spec != flat[0][1] for _, spec in flat):
        raise CannotTell("the batches are not built alike: their samples cannot change places")
    order = torch.randperm(sum(sizes), generator=generator)
    columns = [
        _dealt(column, sizes, order) for column in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return [tree_unflatten([column[i] for column in columns], flat[0][1]) for i in range(len(flat))]


def _dealt(column: Sequence[object], sizes: Sequence[int], order: Tensor) -> Sequence[object]:
    """Deal one tensor of every batch; what is the same in all batches stays."""
    if all(x is column[0] for x in column[1:]):
        return column
    rows = [x for x, n in zip(column, sizes, strict=True) if isinstance(x, Tensor) and _has(x, n)]
    if len(rows) == len(column):
        if len({(x.shape[1:], x.dtype, x.device) for x in rows}) > 1:
            raise CannotTell("the samples are of different shapes: they cannot change places")
        return torch.split(torch.cat(rows)[order.to(rows[0].device)], list(sizes))
    if rows or not all(_same(x, column[0]) for x in column):
        raise CannotTell("the batches hold more than tensors of samples")
    return column


def _has(x: Tensor, n: int) -> bool:
    """Tell whether a tensor has one row for each sample."""
    return x.dim() > 0 and len(x) == n


def _same(x: object, y: object) -> bool:
    """Tell whether two values are one; of what has no such notion, whether they are one object."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and bool((x == y).all())
    return x is y or (isinstance(x, str | int | float | bool) and x == y)
