"""SN301: gradient checkpointing updates statistics twice."""

from __future__ import annotations

import math
from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count, short


class RecomputedUpdate(Rule):
    """Gradient checkpointing runs the forward again in backward, and updates statistics again.

    What it finds:
        Layers whose statistics one training step moves while a backward runs: the recomputation
        of `torch.utils.checkpoint`, in both of its forms, and of what works like it.

    Why it matters:
        A batch counts twice, so momentum m acts as 1 - (1 - m)^2: 0.1 as 0.19. The statistics
        are averages over half as many batches, and differ from those of the same training without
        checkpointing although loss and gradients are the same. `num_batches_tracked` runs twice as
        fast; where momentum is None it decides the average.

    When it is fine:
        With many batches of a good size the average over half of them is as good. Not reported:
        layers whose momentum has been set for it (0.0513 for 0.1), and held layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.checkpoint import checkpoint
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> def train_step(model, x):
        ...     checkpoint(model, x, use_reentrant=False).sum().backward()
        >>> report = check(net, torch.randn(64, 4), train_step=train_step, select="SN301")
        >>> report.findings[0].evidence["acts as"]
        0.19

    Fix:
        None that stillnorm could apply. Set momentum to ``1 - (1 - momentum) ** 0.5`` in the layers
        that are recomputed: two updates by the same batch then amount to one with the old momentum,
        exactly. Or leave the norms out of what is checkpointed.

    References:
        pytorch/pytorch#96136 and #62471; facebookresearch/fairscale#1035;
        gpleiss/efficient_densenet_pytorch#73.
    """

    code = "SN301"
    slug = "recomputed-update"
    severity = "warning"
    needs = ("step",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        again = [
            c for c in evidence.step.calls if c.in_backward and c.moved and not _halved(c.layer)
        ]
        layers = [x for x in evidence.layers if any(call.layer is x for call in again)]
        if not layers:
            return
        momentum = layers[0].momentum
        acts_as = None if momentum is None else round(1 - (1 - momentum) ** 2, 9)
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"one training step updates the statistics of {count(len(layers), 'layer')} again in "
            "backward: gradient checkpointing",
            evidence={"layers": len(layers), "momentum": momentum, "acts as": acts_as},
            note=_note(momentum, acts_as),
            help="bn.momentum = 1 - (1 - bn.momentum) ** 0.5 in these layers",
            where=evidence.step.where(again),
        )


def _note(momentum: float | None, acts_as: float | None) -> str:
    if momentum is None or acts_as is None:
        return ""
    return f"momentum {short(momentum)} acts as {short(acts_as)}"


def _halved(layer: NormLayer) -> bool:
    """Tell whether two updates by a layer's momentum amount to one by torch's own, 0.1."""
    momentum = layer.momentum
    return momentum is not None and math.isclose(1 - (1 - momentum) ** 2, 0.1, abs_tol=1e-3)
