"""SN113: buffers that cannot be updated."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class InferenceTensorStatistics(Rule):
    """Buffers that were made under `inference_mode` fail in training and in `load_state_dict`.

    What it finds:
        A running mean, running variance or counter that is an inference tensor.

    Why it matters:
        Tensors made under `torch.inference_mode` stay inference tensors, and nothing outside may
        write to them: the first train-mode forward and `load_state_dict` raise "Inplace update to
        inference tensor outside InferenceMode is not allowed", far from the line that built, moved
        or cast the model there.

    When it is fine:
        A model that only ever infers. Not reported: an ordinary model that is used under
        `inference_mode`, whose buffers stay ordinary.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> with torch.inference_mode():
        ...     net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> check(net).findings[0].slug
        'inference-tensor-statistics'

    Fix:
        Safe: the layer's tensors are replaced by ordinary ones with the same values. An optimizer
        that holds its parameters has to be made anew.

    References:
        pytorch/rl#529; mrdbourke/pytorch-deep-learning#397.
    """

    code = "SN113"
    slug = "inference-tensor-statistics"
    severity = "error"
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [layer for layer in evidence.layers if _holds_inference_tensors(layer)]
        if not layers:
            return
        paths = tuple(layer.path for layer in layers)
        yield self.finding(
            paths,
            f"the statistics of {count(len(paths), 'layer')} were made under inference_mode: "
            "updating or loading them raises",
            evidence={"layers": len(paths)},
            help="build, move and cast the model outside torch.inference_mode",
            fix=Fix("make them ordinary tensors", "safe", "clone", paths),
            where=evidence.where(*layers),
        )


def _holds_inference_tensors(layer: NormLayer) -> bool:
    if layer.is_lazy:
        return False
    tensors = layer.tensors()
    return any(name in tensors and tensors[name].is_inference() for name in _STATISTICS)
