"""SN503: a SyncBatchNorm that was more before it was converted."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class StrippedSubclass(Rule):
    """A SyncBatchNorm has child modules that it never calls.

    What it finds:
        A plain SyncBatchNorm that was called, with child modules that do something and that nobody
        called: an activation, a dropout.

    Why it matters:
        `convert_sync_batchnorm` makes a plain SyncBatchNorm of every subclass of BatchNorm. What
        the subclass did beside normalising is gone; its child modules are still listed, and no
        longer called. The network of timm's `BatchNormAct2d` loses all its activations, silently,
        and is nearly linear.

    When it is fine:
        A child that is `nn.Identity`, or that another module calls, is not reported; nor are
        subclasses of SyncBatchNorm that call their children, such as timm's own conversion makes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> class NormAct(nn.BatchNorm2d):
        ...     def __init__(self, channels):
        ...         super().__init__(channels)
        ...         self.act = nn.ReLU()
        ...     def forward(self, x):
        ...         return self.act(super().forward(x))
        >>> net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(NormAct(3)))
        >>> check(net, torch.randn(8, 3, 4, 4), select="SN503").findings[0].paths
        ('0',)

    Fix:
        Advice: convert the original model with the library that the class is from;
        `timm.layers.convert_sync_batchnorm` keeps the activation.

    References:
        huggingface/pytorch-image-models#1254; pytorch/pytorch#187298 (0.82 F1 in validation, 0.00
        after export).
    """

    code = "SN503"
    slug = "stripped-subclass"
    severity = "error"
    needs = ("tree", "forward")
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        called = set(evidence.measured.called)
        lost = {
            layer: names
            for layer in evidence.in_order(evidence.layers)
            if layer.module in called and (names := _uncalled(layer, called))
        }
        if not lost:
            return
        layers = tuple(lost)
        kinds = sorted({kind for names in lost.values() for kind in names.values()})
        verb = "has" if len(layers) == 1 else "have"
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"{count(len(layers), 'SyncBatchNorm layer')} {verb} children that nothing calls: "
            f"{', '.join(kinds)}",
            evidence={"children": {layer.path: names for layer, names in lost.items()}},
            note="torch's conversion keeps the children of a subclass and drops its forward",
            help="convert the original model with timm.layers.convert_sync_batchnorm, or with a "
            "conversion that keeps the class",
            where=evidence.where(layers[0]),
        )


def _uncalled(layer: NormLayer, called: set[nn.Module]) -> dict[str, str]:
    """Return the kinds of a plain SyncBatchNorm's children that were not called, by name."""
    if type(layer.module).forward is not nn.SyncBatchNorm.forward:
        return {}
    return {
        name: type(child).__name__
        for name, child in layer.module.named_children()
        if child not in called and not isinstance(child, nn.Identity)
    }
