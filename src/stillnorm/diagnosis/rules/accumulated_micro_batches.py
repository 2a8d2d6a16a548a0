"""SN307: what gradients accumulate over, statistics do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.training_step.step import StepCall
from stillnorm.reports.numbers import count


class AccumulatedMicroBatches(Rule):
    """Gradients accumulate over several micro-batches, but each is normalised by itself.

    What it finds:
        Layers through which several backwards go for one optimizer step, each after a forward of
        its own that updates the statistics.

    Why it matters:
        Accumulating gradients over k micro-batches of n samples is not training on batches of kn:
        every mean and variance is that of n samples, with their noise, and the statistics are
        updated k times per step.

    When it is fine:
        When n is large enough by itself: about 16 samples, fewer where there are many positions
        (SN207 measures it). A discriminator that sees real and fake samples one after the other
        looks the same.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> def train_step(model, x):
        ...     for part in x.chunk(4):
        ...         model(part).sum().backward()
        ...     optimizer.step()
        >>> report = check(net, torch.randn(64, 4), train_step=train_step, select="SN307")
        >>> report.findings[0].evidence
        {'layers': 1, 'forwards': 4, 'samples': 16}

    Fix:
        None that stillnorm could apply: GroupNorm does not depend on the batch
        (``sn.replace(model, "group")``), frozen statistics do not either (``sn.freeze``), and
        SyncBatchNorm averages over devices.

    References:
        Ioffe & Szegedy, arXiv 1502.03167, section 3.1; Wu & He, "Group Normalization",
        arXiv 1803.08494, figure 1, on small batches.
    """

    code = "SN307"
    slug = "accumulated-micro-batches"
    severity = "info"
    needs = ("step",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        step = evidence.step
        if not step.steps:
            raise CannotTell("train_step takes no optimizer step")
        accumulated = {layer: _accumulated(step.of(layer)) for layer in evidence.layers}
        layers = [layer for layer, calls in accumulated.items() if len(calls) > 1]
        if not layers:
            return
        calls = accumulated[layers[0]]
        samples = min(call.shape[0] for call in calls)
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"{len(calls)} forwards per optimizer step: {count(len(layers), 'layer')} "
            f"{'normalises' if len(layers) == 1 else 'normalise'} by {count(samples, 'sample')} "
            f"at a time, not {sum(call.shape[0] for call in calls)}",
            evidence={"layers": len(layers), "forwards": len(calls), "samples": samples},
            help='sn.replace(model, "group") where so few samples are too few',
            where=step.where(calls),
        )


def _accumulated(calls: Sequence[StepCall]) -> list[StepCall]:
    """Return the calls, one for each backward, whose gradients the first optimizer step adds up."""
    by_backward: dict[int, StepCall] = {}
    for call in calls:
        if call.used != "batch" or call.gradient != "used" or not call.moved or call.in_backward:
            continue
        for backward in call.backwards:
            if backward.of_parameters and backward.steps == 0:
                by_backward.setdefault(id(backward), call)
    return list(by_backward.values())
