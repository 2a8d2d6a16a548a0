"""SN305: weight decay on the norms' own parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count, short


class DecayedAffine(Rule):
    """Weight decay pulls the weights and biases of norm layers to zero.

    What it finds:
        Norm layers whose weight or bias trains and is in a group of the optimizer with a weight
        decay above zero.

    Why it matters:
        Decay of the weights before a norm changes no output, only their effective learning rate.
        Decay of the norm's own weight does: it scales the layer down. Many recipes leave norms and
        biases out of weight decay.

    When it is fine:
        Papers and recipes disagree: torchvision's references decay everything by default, and
        network slimming wants small norm weights. So this is a preview, which runs only when it is
        selected. Not reported: held and frozen parameters, which get no gradient.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        >>> check(net, optimizer=optimizer, select="SN305").findings[0].evidence["weight_decay"]
        {'1': 0.05}

    Fix:
        Advice: give the parameters of norms a group of their own with `weight_decay=0`.

    References:
        He et al. 2019, "Bag of Tricks", arXiv 1812.01187, section 3.1 (no bias decay);
        facebookresearch/ClassyVision#177; facebookresearch/detectron2#737.
    """

    code = "SN305"
    slug = "decayed-affine"
    severity = "info"
    needs = ("optimizer",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        optimizer = evidence.request.optimizer
        if optimizer is None:
            raise CannotTell("needs optimizer=")
        decay = {
            id(parameter): float(group.get("weight_decay") or 0)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        strongest = {
            layer.path: max((decay.get(id(p), 0.0) for p in _trained(layer)), default=0.0)
            for layer in evidence.layers
        }
        decayed = {path: size for path, size in strongest.items() if size > 0}
        if not decayed:
            return
        sizes = " and ".join(short(size) for size in sorted(set(decayed.values())))
        yield self.finding(
            tuple(decayed),
            f"weight decay of {sizes} on the parameters of {count(len(decayed), 'norm layer')}",
            evidence={"weight_decay": decayed},
            help="a parameter group of their own with weight_decay=0",
        )


def _trained(layer: NormLayer) -> list[Tensor]:
    return [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
