"""SN001: parameters frozen, statistics not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class DriftingFrozenLayer(Rule):
    """Parameters are frozen while others train, but the running statistics still move.

    What it finds:
        A norm layer in a part of the model whose parameters all have `requires_grad=False`, which
        feeds a part that trains, and which in train mode normalises by the batch and updates its
        running statistics.

    Why it matters:
        Running statistics are buffers: they are written in forward, whatever `requires_grad`,
        `torch.no_grad()` or the optimizer's parameter groups say. The features that were to stay
        fixed change with every batch, and depend on the batch mates. Measured: features moved by
        33 % with bit-identical parameters.

    When it is fine:
        When the statistics are adapted on purpose. Not reported: a model that is frozen whole (an
        EMA teacher, the discriminator while the generator trains); a frozen part that comes after
        what trains (its input moves, so its statistics must); a frozen copy beside a twin of the
        same class that trains (a momentum encoder); a layer whose own weight or bias trains.
        Order is that of the forward where there are batches, that of registration otherwise.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).requires_grad_(False)
        >>> report = check(nn.Sequential(backbone, nn.Flatten(), nn.Linear(288, 2)))
        >>> report.findings[0].slug, report.findings[0].paths
        ('drifting-frozen-layer', ('0.1',))

    Fix:
        Safe: `sn.freeze(model, paths)`. The eval output stays, and training does what the flags
        already declare.

    References:
        pytorch/pytorch#86590 and #66073; lightly-ai/lightly#1438, where the maintainers keep train
        mode on purpose; ultralytics/yolov5#12031.
    """

    code = "SN001"
    slug = "drifting-frozen-layer"
    severity = "warning"
    needs = "tree"

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        drifting = [layer for layer in evidence.layers if _drifts(evidence, layer)]
        if not drifting:
            return
        paths = tuple(layer.path for layer in drifting)
        verb = "is" if len(paths) == 1 else "are"
        yield self.finding(
            paths,
            f"{count(len(paths), 'layer')} {verb} frozen by requires_grad alone: the statistics "
            "still move, and the output depends on the batch",
            evidence={"layers": len(paths)},
            help="sn.freeze(model, [...]) holds the statistics too, through model.train()",
            fix=Fix("hold the statistics", "safe", "freeze", paths),
            where=evidence.where(*drifting),
        )


def _drifts(evidence: Evidence, layer: NormLayer) -> bool:
    if layer.family != "batch" or layer.trains_affine or evidence.singled_out(layer):
        return False
    if not layer.updates_statistics(evidence.in_train(layer)) or layer.module not in evidence.order:
        return False
    here = evidence.order.index(layer.module)
    upstream, downstream = evidence.order[: here + 1], evidence.order[here + 1 :]
    return (
        any(True for module in upstream for _ in module.parameters(recurse=False))
        and not any(_trains(module) for module in upstream)
        and any(_trains(module) for module in downstream)
        and not _has_training_twin(evidence.model, layer)
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _has_training_twin(model: nn.Module, layer: NormLayer) -> bool:
    """Tell whether the frozen part is a copy of one that trains: a teacher, a momentum encoder."""
    enclosing = [module for module in layer.ancestors if module is not model]
    frozen = [m for m in enclosing if not any(p.requires_grad for p in m.parameters())]
    if not frozen:
        return False
    part = frozen[0]  # the outermost
    owner = layer.ancestors[layer.ancestors.index(part) - 1]
    if isinstance(owner, nn.Sequential | nn.ModuleList):
        return False  # neighbours in a stack look alike without being copies
    shapes = _shapes(part)
    return any(
        type(module) is type(part)
        and any(parameter.requires_grad for parameter in module.parameters())
        and _shapes(module) == shapes
        for module in model.modules()
        if module is not part
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
