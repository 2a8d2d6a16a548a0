"""SN208: the features are on the last axis, and the norm works on the second."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.errors import StillnormError
from stillnorm.reports.numbers import count


class WrongChannelAxis(Rule):
    """A BatchNorm1d is given (N, L, C) and normalises each position in place of each feature.

    What it finds:
        A three-dimensional input of a BatchNorm1d that comes from a linear layer, an embedding, a
        LayerNorm or a recurrent layer with its axes untouched: its features are on the last axis,
        and the norm takes the second, which are the positions, for the channels.

    Why it matters:
        Statistics are kept for each position, over all features. Another length is an error; an
        equal number of positions and features hides it altogether, and the network trains with a
        normalisation that nobody meant.

    When it is fine:
        Where the second axis holds the channels on purpose, such as the variables of several time
        series with a linear layer along time; that is why this rule is a preview. Not reported:
        inputs that were transposed, reshaped or flattened before.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10))
        >>> check(net, torch.randn(16, 10, 8), select="SN208").findings[0].paths
        ('1',)

    Fix:
        Advice: `norm(x.transpose(1, 2)).transpose(1, 2)`, or `norm(x.flatten(0, 1))`.

    References:
        ruotianluo/self-critical.pytorch#44; pytorch/pytorch#76613.
    """

    code = "SN208"
    slug = "wrong-channel-axis"
    severity = "warning"
    needs = ("forward",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        try:
            received = evidence.structure.received
        except StillnormError as error:
            raise CannotTell(error.fact) from error
        shapes = {
            seen.layer.module: seen.shape
            for seen in received
            if seen.layer is not None and seen.origin.features_last
        }
        layers = [
            layer
            for layer in evidence.in_order(evidence.layers)
            if layer.module in shapes and isinstance(layer.module, nn.BatchNorm1d)
        ]
        if not layers:
            return
        shape = shapes[layers[0].module]
        verb = "normalises" if len(layers) == 1 else "normalise"
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"{count(len(layers), 'layer')} {verb} axis 1 of (N, {shape[1]}, {shape[2]}); the "
            "features are on the last axis",
            evidence={"shapes": {layer.path: list(shapes[layer.module]) for layer in layers}},
            help="norm(x.transpose(1, 2)).transpose(1, 2), or norm(x.flatten(0, 1))",
            where=evidence.where(*layers),
        )
