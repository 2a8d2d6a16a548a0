"""SN003: an eval() that the next train() undoes."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class UnheldEval(Rule):
    """A layer was put in eval by itself, and the next `model.train()` thaws it.

    What it finds:
        A norm layer in eval mode while the module around it is in train mode, which nothing would
        keep there: after `model.train()` it would normalise by the batch again.

    Why it matters:
        `train()` sets every module below it. So does whatever calls it: the start of the next
        epoch, a validation helper, a trainer, an exporter. The freeze lasts until then, and nothing
        says that it is over.

    When it is fine:
        Never for long: a loop that repeats `bn.eval()` after each `train()` works until somebody
        adds another `train()`. Not reported: held layers, other libraries' frozen layers, a model
        whose own `train()` puts the layer back in eval, a model or part that is in eval as a whole.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train()
        >>> _ = net(torch.randn(64, 4)), net[1].eval()
        >>> check(net).findings[0].slug
        'unheld-eval'

    Fix:
        Safe: `sn.freeze(model, paths)` with the affine parameters as they are, frozen or training.

    References:
        pytorch/pytorch#66073; Lightning-AI/pytorch-lightning#2551; the PyTorch forum, "How to train
        with frozen BatchNorm?", post 8.
    """

    code = "SN003"
    slug = "unheld-eval"
    severity = "warning"
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [layer for layer in evidence.layers if _thaws(evidence, layer)]
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        them = "it" if len(paths) == 1 else "them"
        yield self.finding(
            paths,
            f"{count(len(paths), 'layer')} in eval inside a model that trains: the next "
            f"model.train() thaws {them}",
            evidence={"layers": len(paths)},
            help="sn.freeze(model, [...]) survives model.train()",
            fix=Fix("hold the statistics", "safe", "freeze", paths),
            where=evidence.where(*layers),
        )


def _thaws(evidence: Evidence, layer: NormLayer) -> bool:
    return (
        evidence.singled_out(layer)
        and layer.normalizes_by(training=False) == "running"
        and evidence.in_train(layer)
        and layer.normalizes_by(training=True) != "running"
    )
