"""SN303: requires_grad is False, and the optimizer moves the parameter all the same."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import count, short


class MovingFrozenAffine(Rule):
    """A weight or bias is frozen by requires_grad, and the optimizer still moves it.

    What it finds:
        Affine parameters of norm layers whose `requires_grad` is False and whose value an
        optimizer step changes: they have kept a gradient from before they were frozen.

    Why it matters:
        An optimizer asks whether there is a `.grad`, not whether one is required. A stale one, even
        of zeros, lets weight decay, momentum and Adam's moments move the parameter at every step.
        Measured with gradients of zeros: by 0.03 with weight decay, 0.13 with momentum, 0.17 with
        Adam.

    When it is fine:
        Never. Not reported: parameters without a `.grad`, which nothing moves, though an optimizer
        holds them; those that are written by hand, as an average of weights is.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> def train_step(model, x, optimizer):
        ...     optimizer.zero_grad(set_to_none=False)
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        >>> train_step(net, torch.randn(8, 4), optimizer)
        >>> _ = net[1].requires_grad_(False)
        >>> report = check(
        ...     net, torch.randn(64, 4), train_step=train_step, optimizer=optimizer, select="SN303"
        ... )
        >>> report.findings[0].paths
        ('1',)

    Fix:
        Safe: drop the gradients of what requires none. By hand: ``parameter.grad = None`` after
        ``requires_grad_(False)``, or a new optimizer over what still trains.

    References:
        The PyTorch forum, topics 153740 and 58156; idstcv/SoftTriple#4; apache/mxnet#9624.
    """

    code = "SN303"
    slug = "moving-frozen-affine"
    severity = "error"
    needs = ("step", "optimizer")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        moves = sorted(evidence.step.frozen_moves, key=lambda move: -move.by)
        if not moves:
            return
        layers = tuple(dict.fromkeys(move.layer for move in moves))
        stale = tuple(dict.fromkeys(move.layer.path for move in moves if move.had_gradient))
        most = moves[0]
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"requires_grad is False in {count(len(layers), 'layer')}, and an optimizer step moves "
            f"{'its' if len(layers) == 1 else 'their'} weight or bias, by up to {short(most.by)}",
            evidence={"layers": len(layers), "parameters": len(moves), "largest": most.by},
            note=f"{most.layer.path}.{most.name} has a gradient from before" if stale else "",
            help="parameter.grad = None once it is frozen",
            fix=Fix("drop the stale gradients", "safe", "drop gradients", stale) if stale else None,
            where=evidence.where(*layers),
        )
