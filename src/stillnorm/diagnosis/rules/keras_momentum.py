"""SN108: the momentum of another framework."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import short

LEAST = 0.9


class KerasMomentum(Rule):
    """The momentum is that of Keras: nearly all of the last batch, hardly any memory.

    What it finds:
        Momentum of 0.9 or more in a layer that updates its running statistics.

    Why it matters:
        In torch momentum is the weight of the *new* batch: running = (1 - m) running + m batch. In
        Keras, TensorFlow and Flax it is the weight of the old value. 0.99 copied over makes the
        running statistics those of the last batch alone, and eval scores jump from epoch to epoch.

    When it is fine:
        Momentum 1.0 for a moment, to write one batch's statistics on purpose. 0.5 is short memory
        and no mistake; 0.01 with eps 1e-3 is what ports of EfficientNet and MobileNet rightly have.
        Not reported: held layers.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> check(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.99))).findings[0].slug
        'keras-momentum'

    Fix:
        Unsafe: momentum becomes 1 - momentum. The statistics of the last batch stay until training
        or `sn.recalibrate` replaces them. Momentum 1.0 has no counterpart and is left to you.

    References:
        pytorch/vision#8312 (MaxViT shipped with 0.99); huggingface/transformers#19454;
        Cadene/pretrained-models.pytorch#44.
    """

    code = "SN108"
    slug = "keras-momentum"
    severity = "warning"
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = {
            layer: momentum
            for layer in evidence.layers
            if (momentum := _momentum(evidence, layer)) >= LEAST
        }
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        turnable = tuple(layer.path for layer, momentum in layers.items() if momentum < 1)
        of_keras = any(layer.family == "keras" for layer in layers)
        largest = max(layers.values())
        yield self.finding(
            paths,
            f"momentum {short(largest, 3)} keeps {short(100 * (1 - largest))} % of what was known: "
            "the running statistics are those of the last batch",
            evidence={"momentum": {layer.path: momentum for layer, momentum in layers.items()}},
            note="torch's momentum is the weight of the new batch, Keras's that of the old value",
            help="0.99 is Keras's default: set it, then sn.recalibrate(model, batches)"
            if of_keras
            else f"momentum={short(1 - largest, 3)}, then sn.recalibrate(model, batches)"
            if largest < 1
            else "momentum=0.1 is torch's default",
            fix=Fix("momentum -> 1 - momentum", "unsafe", "momentum", turnable)
            if turnable
            else None,
            where=evidence.where(*layers),
        )


def _momentum(evidence: Evidence, layer: NormLayer) -> float:
    if not layer.updates_statistics(evidence.in_train(layer)):
        return 0.0
    return layer.momentum or 0.0
