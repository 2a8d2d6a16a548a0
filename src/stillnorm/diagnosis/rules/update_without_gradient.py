"""SN306: statistics updated where nothing learns."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import count


class UpdateWithoutGradient(Rule):
    """A forward under no_grad, in train mode, updates the statistics of layers that train.

    What it finds:
        Layers that a training step trains, and whose statistics it also moves in a forward without
        gradients: validation, profiling, a warm-up, pseudo-labels.

    Why it matters:
        `torch.no_grad()` stops gradients, not updates. The statistics take in validation data, the
        zeros of a warm-up, or a batch twice; the model that is saved afterwards is another one. A
        summary tool that ran in train mode has cost 3 % on ImageNet.

    When it is fine:
        When that forward sees training data and is meant to count, as where a generator makes
        samples for its discriminator. Not reported: what only runs without gradients, such as a
        teacher or a momentum encoder, and a frozen backbone (SN001); the first pass of reentrant
        gradient checkpointing, which runs under no_grad; forwards in eval mode.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> def train_step(model, x):
        ...     model(x).sum().backward()
        ...     with torch.no_grad():
        ...         model(x)  # how is it doing?
        >>> report = check(net, torch.randn(64, 4), train_step=train_step, select="SN306")
        >>> report.findings[0].slug, report.findings[0].paths
        ('update-without-gradient', ('1',))

    Fix:
        None that stillnorm could apply: put ``with sn.eval_mode(model):`` around validation, and
        ``with sn.no_updates(model):`` around what has to normalise by the batch.

    References:
        sksq96/pytorch-summary#67; ultralytics/ultralytics#14829; LibreYOLO/libreyolo#671;
        YU1ut/MixMatch-pytorch#43.
    """

    code = "SN306"
    slug = "update-without-gradient"
    severity = "error"
    needs = ("step",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        step = evidence.step
        idle = [
            call
            for call in step.calls
            if call.moved and not (call.grad or call.in_backward or call.is_recomputed)
        ]
        trained = {call.layer for call in step.calls if call.gradient == "used"}
        layers = [
            layer
            for layer in evidence.layers
            if layer in trained and any(call.layer is layer for call in idle)
        ]
        layers = self.unexplained(evidence, layers)
        if not layers:
            return
        mine = [call for call in idle if call.layer in layers]
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"the training step also updates the statistics of {count(len(layers), 'layer')} "
            "without gradients: torch.no_grad() stops no update",
            evidence={
                "layers": len(layers),
                "updates": max(sum(call.layer is layer for call in mine) for layer in layers),
            },
            help="with sn.eval_mode(model): around validation, "
            "sn.no_updates(model) around what has to normalise by the batch",
            where=step.where(mine),
        )
