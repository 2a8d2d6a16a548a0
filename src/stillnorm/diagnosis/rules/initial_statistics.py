"""SN101: running statistics that were lost, or never estimated."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer


class InitialStatistics(Rule):
    """The running statistics are the initial ones although the layer has been trained.

    What it finds:
        Running mean exactly 0 and running variance exactly 1 in every channel, in a layer whose
        bias has been trained, or whose input in the batches given has another mean or variance.

    Why it matters:
        Statistics are buffers: a checkpoint of parameters only, `load_state_dict(strict=False)`, an
        adapter, `model.apply(init)` after loading, or averaging over `.parameters()` loses them
        without an error. Until they are estimated the layer is the identity in eval mode, while
        train mode does not read them and looks healthy.

    When it is fine:
        A model that has not been trained yet. Not reported: without batches, a layer whose bias is
        still constant (all weights at one, or a last gamma at zero, is initialisation, not
        training; so is a random weight beside a zero bias); with batches, a layer whose input does
        have mean 0 and variance 1. `num_batches_tracked` is no evidence: legacy checkpoints carry
        real statistics beside a count of 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> with torch.no_grad():
        ...     _ = net[1].bias.uniform_()
        >>> check(net).findings[0].slug
        'initial-statistics'

    Fix:
        Unsafe: `sn.recalibrate` on the batches given. Better, where it exists: the checkpoint with
        the buffers.

    References:
        torch/nn#1165; cleinc/bts#90 (a published decoder, all 0 and 1); huggingface/peft#1732;
        huggingface/transformers#43520.
    """

    code = "SN101"
    slug = "initial-statistics"
    severity = "warning"
    needs = ("tree",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        lost = [layer for layer in evidence.layers if _is_lost(evidence, layer)]
        layers = self.unexplained(evidence, lost)
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        yield self.finding(
            paths,
            "running statistics are the initial ones, mean 0 and variance 1 in every channel: "
            "until they are estimated the layer is the identity",
            evidence={"layers": len(paths), "of": len(evidence.layers)},
            help="load the checkpoint with its buffers, or sn.recalibrate(model, batches) on "
            "training data",
            fix=self.estimation(evidence, layers),
            where=evidence.where(*layers),
        )


def _is_lost(evidence: Evidence, layer: NormLayer) -> bool:
    if not layer.never_estimated or layer.family == "frozen" or evidence.is_held(layer):
        return False  # held: SN004
    if not layer.num_features:
        return False
    if evidence.runs is not None:
        return evidence.contradicts_initial(layer)
    return evidence.is_trained(layer)
