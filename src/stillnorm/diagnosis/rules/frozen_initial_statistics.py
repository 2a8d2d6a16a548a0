"""SN004: frozen before it was ever estimated."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer


class FrozenInitialStatistics(Rule):
    """A layer is frozen with the statistics it was born with, so it does not normalise at all.

    What it finds:
        A layer that is held, or in eval inside a model that trains, whose running mean is exactly 0
        and whose running variance is exactly 1 in every channel. Batches, where given, must say
        otherwise.

    Why it matters:
        Such a layer is the identity (times weight, plus bias), and frozen it stays the identity:
        activations grow or vanish with depth, and "the validation score goes to zero straight
        away". Freezing makes sense with statistics that come from a pretrained model.

    When it is fine:
        Checkpoints converted from Caffe or MXNet have the statistics folded into weight and bias
        and rightly carry mean 0 and variance 1. Not reported: layers whose input has mean 0 and
        variance 1 in the batches given; another library's frozen layer with learned weight and
        bias, when there are no batches; a layer that the forward never calls.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train()
        >>> _ = net[1].eval()
        >>> [finding.slug for finding in check(net).findings]
        ['frozen-initial-statistics', 'unheld-eval']

    Fix:
        Unsafe: `sn.recalibrate` on the batches given; a layer that stillnorm holds is held again
        afterwards. Or load the checkpoint that the statistics should have come from, and freeze
        after loading.

    References:
        kazuto1011/deeplab-pytorch#48; cleinc/bts#90; facebookresearch/maskrcnn-benchmark#267 (the
        legitimate case); the PyTorch forum, "How to train with frozen BatchNorm?", post 8.
    """

    code = "SN004"
    slug = "frozen-initial-statistics"
    severity = "error"
    needs = ("tree",)
    explains = ("SN101", "SN105")
    spreads = True  # what comes after was estimated on the output of a norm, not of an identity

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [layer for layer in evidence.layers if _is_frozen_identity(evidence, layer)]
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        yield self.finding(
            paths,
            "frozen with statistics that were never estimated: mean 0 and variance 1 in every "
            "channel make the layer the identity",
            evidence={"layers": len(paths)},
            help="load the checkpoint before freezing, or sn.unfreeze, sn.recalibrate(model, "
            "batches), sn.freeze",
            fix=self.estimation(evidence, layers),
            where=evidence.where(*layers),
        )


def _is_frozen_identity(evidence: Evidence, layer: NormLayer) -> bool:
    in_eval = layer.family != "keras" and not layer.module.training
    in_eval_while_training = evidence.model.training and in_eval
    if not layer.never_estimated or not (evidence.is_held(layer) or in_eval_while_training):
        return False
    if not layer.num_features:
        return False
    if evidence.runs is not None:
        return evidence.contradicts_initial(layer)
    return layer.family != "frozen" or not evidence.is_trained(layer)
