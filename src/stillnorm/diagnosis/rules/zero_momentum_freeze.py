"""SN002: momentum 0 taken for a freeze."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class ZeroMomentumFreeze(Rule):
    """Momentum 0 keeps the running statistics still, but train mode does not use them.

    What it finds:
        A batch norm with momentum 0 that normalises by the batch in train mode.

    Why it matters:
        Momentum is the weight of the new batch in the running statistics, and nothing else. With 0
        they never move, so every comparison of the saved tensors passes; yet training normalises
        by the batch, and eval by statistics that the weights were never trained with. Measured
        after fine-tuning at batch size 2: statistics bit-equal, train mode 93.1 %, eval 31.8 %,
        recalibrated 93.6 %. The sentence of torch's documentation that is misread: "running
        estimates [...] are then used for normalization during evaluation", and only then.

    When it is fine:
        As a pause: momentum 0 around one auxiliary forward (`sn.no_updates` does that and cannot be
        forgotten). Not reported: layers that are held, and instance norms.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> check(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0))).findings[0].slug
        'zero-momentum-freeze'

    Fix:
        Unsafe, and it takes batches to know which. Statistics that still describe the data are
        held: `sn.freeze`. Those that no longer do, because the network has been trained meanwhile,
        are estimated anew and then held; that rescues the model without training.

    References:
        The PyTorch forum, "'Frozen' Batch Normalization still shows different performance";
        Cadene/pretrained-models.pytorch#5; davda54/sam#30.
    """

    code = "SN002"
    slug = "zero-momentum-freeze"
    severity = "error"
    needs = ("tree",)
    explains = ("SN101", "SN105")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [layer for layer in evidence.layers if _pretends(evidence, layer)]
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        stale = sum(evidence.mismatched(layer) for layer in layers)
        yield self.finding(
            paths,
            "momentum 0 is not frozen: train mode normalises by the batch, and eval by running "
            "statistics that never move",
            evidence={"layers": len(paths), "mismatched": stale if evidence.runs else None},
            note=_what_data_say(stale, len(layers)) if evidence.runs else "",
            help="before training: sn.freeze(model, [...]); after training with it: "
            "sn.recalibrate(model, batches), then freeze",
            fix=_fix(evidence, layers, stale) if evidence.runs else None,
            where=evidence.where(*layers),
        )


def _pretends(evidence: Evidence, layer: NormLayer) -> bool:
    return (
        layer.family == "batch"
        and layer.has_statistics
        and layer.momentum == 0
        and evidence.trains_by_batch(layer)
    )


def _what_data_say(stale: int, layers: int) -> str:
    if stale == 0:
        return "the statistics describe these batches: nothing is lost yet"
    return f"the statistics of {stale} of {count(layers, 'layer')} no longer describe these batches"


def _fix(evidence: Evidence, layers: list[NormLayer], stale: int) -> Fix:
    if stale == 0:
        paths = tuple(layer.path for layer in layers)
        return Fix("hold the statistics", "unsafe", "freeze", paths)
    paths = tuple(layer.path for layer in layers if evidence.can_estimate(layer))
    return Fix("estimate the statistics, then hold them", "unsafe", "recalibrate and freeze", paths)
