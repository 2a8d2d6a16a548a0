"""SN203: a norm as the model's last layer."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer

FEW_VALUES = 64


class NormalizedOutput(Rule):
    """The model's output is the output of a norm.

    What it finds:
        A norm with learning weight and bias whose output is an output of the model, and which
        averages 64 values per channel or fewer.

    Why it matters:
        Scores and targets have a mean and a scale of their own, and a norm takes them away: in
        train mode every batch's outputs have the same mean and variance whatever the batch holds,
        so that each depends on its batch mates. Measured: the error of a regression grows by 56 %
        with 4 values, 33 % with 8, 9 % with 32, and not from 64 on. Class scores of well-mixed
        digits lost nothing from 8 on.

    When it is fine:
        Embeddings: the last norm of a projector (SimCLR, Barlow Twins) has no affine parameters,
        and a BNNeck or a face-recognition head has its bias or weight frozen; those are not
        reported. Nor are maps and large batches, where the average is over so many values that it
        hardly depends on the batch, nor layers that are frozen.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
        >>> [f.code for f in check(net, torch.randn(64, 8), select="SN203").findings]
        ['SN203']

    Fix:
        Advice: remove it; a bias in the last linear layer does what it did beside normalising.

    References:
        The PyTorch forum, "What does model.eval() do for batchnorm layer?" ("the last output is
        class scores and should not be normalized"). Threshold: benchmarks/normalized_output.py.
    """

    code = "SN203"
    slug = "normalized-output"
    severity = "warning"
    needs = ("forward",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding per output."""
        for layer in evidence.layers:
            values = _values(evidence, layer)
            if values is not None and values <= FEW_VALUES and _is_scores(evidence, layer):
                yield self.finding(
                    (layer.path,),
                    f"the model's output is the output of a norm that averages {values} values",
                    evidence={"values": values},
                    help=f"remove {layer.path or 'it'}",
                    where=evidence.where(layer),
                )


def _values(evidence: Evidence, layer: NormLayer) -> int | None:
    """Return how many values per channel the output is averaged over; None when it is no output."""
    values = [call.values for call in evidence.calls(layer) if call.is_output]
    return max(values) if values else None


def _is_scores(evidence: Evidence, layer: NormLayer) -> bool:
    affine = (layer.weight, layer.bias)
    learns = all(tensor is not None and tensor.requires_grad for tensor in affine)
    return learns and evidence.trains_by_batch(layer)
