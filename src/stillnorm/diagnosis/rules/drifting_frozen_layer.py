"""SN001: parameters frozen, statistics not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.gradients import fed_by
from stillnorm.diagnosis.finding import Applicability, Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.training_step.step import Step
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count, short


class DriftingFrozenLayer(Rule):
    """Parameters are frozen while others train, but the running statistics still move.

    What it finds:
        A norm layer in a part of the model whose parameters all have `requires_grad=False`, which
        feeds a part that trains, and which in train mode normalises by the batch and updates its
        running statistics.

        With `train_step` it is proved: the step moves the statistics, and is an error. What trains
        is then what the step trains, so that it also finds a backbone under `no_grad`, one with
        learning rate 0, and, with `optimizer`, one that the optimizer does not hold.

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
        already declare. Where no flag declares it (`no_grad`, learning rate 0, not in the
        optimizer) it is unsafe.

    References:
        pytorch/pytorch#86590 and #66073; lightly-ai/lightly#1438, where the maintainers keep train
        mode on purpose; ultralytics/yolov5#12031.
    """

    code = "SN001"
    slug = "drifting-frozen-layer"
    severity = "warning"
    needs = ("tree",)
    explains = ("SN306",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        step = None if evidence.request.train_step is None else evidence.step
        if step is not None and not step.trained:
            step = None  # a step that trains nothing does not tell what others train
        moving = [layer for layer in evidence.layers if _moves(evidence, step, layer)]
        flow = _Flow(evidence, step) if moving else None
        drifting = [layer for layer in moving if flow is not None and flow.is_frozen_part(layer)]
        if not drifting:
            return
        paths = tuple(layer.path for layer in drifting)
        by_flags = not any(p.requires_grad for layer in drifting for p in _own(layer))
        applicability: Applicability = "safe" if by_flags else "unsafe"
        shift = None if step is None else max(map(step.shift, drifting))
        yield self.finding(
            paths,
            _message(len(paths), by_flags, shift),
            severity=None if step is None else "error",
            evidence={"layers": len(paths), "moved": shift},
            help="sn.freeze(model, [...]) holds the statistics too, through model.train()",
            fix=Fix("hold the statistics", applicability, "freeze", paths),
            where=evidence.where(*drifting),
        )


def _message(layers: int, by_flags: bool, shift: float | None) -> str:
    named = count(layers, "layer")
    moved = "" if shift is None else f"one training step moves the statistics by {short(shift)}"
    if not by_flags:
        return f"{moved} deviations in {named} of a part that it does not train"
    verb = "is" if layers == 1 else "are"
    effect = "the statistics still move" if shift is None else f"{moved} deviations"
    return (
        f"{named} {verb} frozen by requires_grad alone: {effect}, and the output depends on the "
        "batch"
    )


def _own(layer: NormLayer) -> list[nn.Parameter]:
    """Return the layer's parameters; where it has none, those of the module around it."""
    return list(layer.module.parameters()) or list(layer.ancestors[-1].parameters())


def _moves(evidence: Evidence, step: Step | None, layer: NormLayer) -> bool:
    """Tell whether the statistics of a layer that does not train itself move in training."""
    if layer.family != "batch":
        return False
    if step is not None:
        moved = any(call.moved for call in step.of(layer))
        return moved and not any(_trained(evidence, step, p) for p in layer.module.parameters())
    return (
        not layer.trains_affine
        and not evidence.singled_out(layer)  # SN003
        and layer.updates_statistics(evidence.in_train(layer))
    )


def _trained(evidence: Evidence, step: Step | None, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter trains: by its flag, or where the step has run by what it did."""
    if step is None:
        return parameter.requires_grad
    # Who does not say what the step steps may have an optimizer that has not been seen.
    may_train = evidence.request.optimizer is None and parameter in step.unheld
    return parameter in step.trained or (may_train and parameter.requires_grad)


class _Flow:
    """What feeds what: seen by autograd where there are batches, or else by order."""

    def __init__(self, evidence: Evidence, step: Step | None) -> None:
        self.model, self.order = evidence.model, evidence.order
        parameters = list(self.model.parameters())
        trains = [parameter for parameter in parameters if _trained(evidence, step, parameter)]
        self.trained = frozenset(trains)
        frozen = [parameter for parameter in parameters if parameter not in self.trained]
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
            fed = any(self._trains(module) for module in upstream)
        else:
            fed = layer.module in self.fed_by_training
        if self.fed_by_frozen is not None:
            downstream = [module for module in downstream if module in self.fed_by_frozen]
        return (
            not fed
            and any(True for module in upstream for _ in module.parameters(recurse=False))
            and any(self._trains(module) for module in downstream)
            and not self._has_training_twin(layer)
        )

    def _has_training_twin(self, layer: NormLayer) -> bool:
        """Tell whether the frozen part is a copy of one that trains: a teacher, a target network.

        Blocks of a stack look alike too, but one feeds the next; where nothing shows that, only the
        model's own children can be copies of each other.
        """
        parts = [m for m in layer.ancestors[1:] if not self._trains(m, recurse=True)]
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
            and self._trains(module, recurse=True)
            and _shapes(module) == shapes
            for module in independent
        )

    def _trains(self, module: nn.Module, recurse: bool = False) -> bool:
        return not self.trained.isdisjoint(module.parameters(recurse))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
