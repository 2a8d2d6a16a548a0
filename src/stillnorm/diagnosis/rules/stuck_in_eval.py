"""SN005: trained in eval mode, and nobody asked for it."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.training_step.step import Step
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class StuckInEval(Rule):
    """A training step trains layers whose whole model is in eval mode.

    What it finds:
        Norm layers that normalise by running statistics in a training step which trains their
        parameters, while they and every module above them are in eval mode: as a validation leaves
        a model when nobody calls `model.train()` after it.

    Why it matters:
        Statistics stand still while the weights move on, dropout is off, and the result depends on
        when the validation came. Measured: statistics 0.5 to 0.66 deviations off after four epochs,
        accuracy erratic.

    When it is fine:
        Where it is meant, which one look at flags cannot always tell from a mistake. It is taken as
        meant, and not reported, when layers are held; when their own weight or bias is frozen or in
        no optimizer; when a `train()` of the model's own keeps them there (mmdetection's
        `norm_eval`); when only a part of the model is in eval mode; and when the step itself calls
        `model.eval()`. A model that is in eval mode when `check` gets it, and that the
        step does not put in train mode, is reported.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> def train_step(model, x):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        >>> _ = net.eval()  # to validate
        >>> report = check(net, torch.randn(64, 4), train_step=train_step, select="SN005")
        >>> report.findings[0].slug
        'stuck-in-eval'

    Fix:
        None that stillnorm could apply: `model.train()` at the start of every epoch or step, and
        ``with sn.eval_mode(model):`` around validation, which leaves every mode as it was. Where it
        is meant, `sn.freeze(model)` says so.

    References:
        fartashf/vsepp#4; wkentaro/pytorch-fcn#57; ServiceNow/LCFCN#20;
        HuiZeng/Grid-Anchor-based-Image-Cropping-Pytorch#2.
    """

    code = "SN005"
    slug = "stuck-in-eval"
    severity = "warning"
    needs = ("step",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        step = evidence.step
        if step.told_eval:
            return
        layers = [layer for layer in evidence.layers if _is_stuck(evidence, step, layer)]
        if not layers:
            return
        counts = (layer.num_batches_tracked for layer in layers)
        updates = min((int(n) for n in counts if n is not None), default=None)
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"the training step trains {count(len(layers), 'layer')} in eval mode: the statistics "
            "stand still, and nothing declares them frozen",
            evidence={"layers": len(layers), "optimizer steps": step.updates, "updates": updates},
            note=_how_long(step.updates, updates),
            help="model.train() before every step or epoch; sn.freeze(model) where it is meant",
            where=step.where([call for layer in layers for call in step.of(layer)]),
        )


def _is_stuck(evidence: Evidence, step: Step, layer: NormLayer) -> bool:
    calls = [call for call in step.of(layer) if call.gradient == "used"]
    return (
        bool(calls)
        and all(call.used == "running" and not any(call.parents) for call in calls)
        and not any(call.training for call in calls)
        and evidence.trains_by_batch(layer)
        and _trains(step, layer)
    )


def _trains(step: Step, layer: NormLayer) -> bool:
    """Tell whether the step trains the layer, or where it has no parameters the module around."""
    own = list(layer.module.parameters())
    if own:
        return all(parameter in step.trained for parameter in own)
    return bool(layer.ancestors) and step.trains(layer.ancestors[-1], recurse=True)


def _how_long(steps: int | None, updates: int | None) -> str:
    if steps is None or updates is None or updates >= steps:
        return ""
    return (
        f"the optimizer has taken {count(steps, 'step')}, the statistics {count(updates, 'update')}"
    )
