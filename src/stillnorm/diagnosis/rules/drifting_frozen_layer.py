"""SN001: parameters frozen, statistics not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.gradients import fed_by
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
        Batches show what feeds what; without them the order of registration stands for it.

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
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        moving = [layer for layer in evidence.layers if _moves(evidence, layer)]
        flow = _Flow(evidence) if moving else None
        drifting = [layer for layer in moving if flow is not None and flow.is_frozen_part(layer)]
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


def _moves(evidence: Evidence, layer: NormLayer) -> bool:
    """Tell whether train mode would move the statistics of a layer that does not train itself."""
    return (
        layer.family == "batch"
        and not layer.trains_affine
        and not evidence.singled_out(layer)  # SN003
        and layer.updates_statistics(evidence.in_train(layer))
    )


class _Flow:
    """What feeds what: seen by autograd where there are batches, or else by order."""

    def __init__(self, evidence: Evidence) -> None:
        self.model, self.order = evidence.model, evidence.order
        trains = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        self.fed_by_training = self.fed_by_frozen = None
        if evidence.runs is not None and trains and frozen:
            self.fed_by_training = fed_by(self.model, evidence.runs, trains)
            self.fed_by_frozen = fed_by(self.model, evidence.runs, frozen)

    def is_frozen_part(self, layer: NormLayer) -> bool:
        """Tell whether all that feeds the layer is frozen, and it feeds something that trains."""
        if layer.module not in self.order:
            return False  # never called
        here = self.order.index(layer.module)
        upstream, downstream = self.order[: here + 1], self.order[here + 1 :]
        if self.fed_by_training is None:
            fed = any(_trains(module) for module in upstream)
        else:
            fed = layer.module in self.fed_by_training
        if self.fed_by_frozen is not None:
            downstream = [module for module in downstream if module in self.fed_by_frozen]
        return (
            not fed
            and any(True for module in upstream for _ in module.parameters(recurse=False))
            and any(_trains(module) for module in downstream)
            and not self._has_training_twin(layer)
        )

    def _has_training_twin(self, layer: NormLayer) -> bool:
        """Tell whether the frozen part is a copy of one that trains: a teacher, a target network.

        Blocks of a stack look alike too, but one feeds the next; where nothing shows that, only the
        model's own children can be copies of each other.
        """
        parts = [m for m in layer.ancestors[1:] if not any(p.requires_grad for p in m.parameters())]
        if not parts:
            return False
        part, shapes = parts[0], _shapes(parts[0])
        if self.fed_by_frozen is None:
            candidates = list(self.model.children()) if layer.ancestors[1] is part else []
            independent = (
                [] if isinstance(self.model, nn.Sequential | nn.ModuleList) else candidates
            )
        else:
            independent = [m for m in self.model.modules() if m not in self.fed_by_frozen]
        return any(
            type(module) is type(part)
            and any(parameter.requires_grad for parameter in module.parameters())
            and _shapes(module) == shapes
            for module in independent
        )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
