"""SN202: two norms, one buffer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.parameter import UninitializedBuffer

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class AliasedStatistics(Rule):
    """Two norm layers write into the same running statistics.

    What it finds:
        Running means or variances of different layers in the same memory, where at least one of the
        layers updates them. Also, as info, one layer that is registered under two names and, as far
        as the batches tell, called once in a forward.

    Why it matters:
        Each update of one layer moves the other's statistics: they become a mixture of two inputs
        that fits neither, as with one layer called twice; eval is then far from train mode. It
        happens where buffers are assigned instead of copied. A layer under two names has its
        tensors twice in the `state_dict`, and a checkpoint in which they differ loads the last.

    When it is fine:
        Frozen layers, which never write; one layer under two names is mostly meant so. Not
        reported: layers that share weight and bias alone; parts of one large buffer that do not
        overlap; a layer that is called several times, which is SN201's.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> net[2].running_mean = net[0].running_mean
        >>> [f.paths for f in check(net, select="SN202").findings]
        [('0', '2')]

    Fix:
        Advice: copy instead of assigning, `b.running_mean.copy_(a.running_mean)`; give each layer a
        clone of the buffer, then recalibrate.

    References:
        The PyTorch forum, "What does model.eval() do for batchnorm layer?"; pytorch/pytorch#1738.
    """

    code = "SN202"
    slug = "aliased-statistics"
    severity = "warning"
    needs = ("tree",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding for all layers that share, one for all that have several names."""
        shared = dict.fromkeys(  # once, also where both statistics are shared
            layer
            for layers in _sharing(evidence.layers)
            if any(layer.updates_statistics(evidence.in_train(layer)) for layer in layers)
            for layer in layers
        )
        if shared:
            yield self.finding(
                tuple(layer.path for layer in shared),
                f"{count(len(shared), 'layer')} keep running statistics in memory that is another "
                "layer's too",
                evidence={"layers": len(shared)},
                help="give each layer a clone of the buffer, then sn.recalibrate(model, batches)",
                where=evidence.where(*shared),
            )
        named = [
            x for x in evidence.layers if len(x.paths) > 1 and not _is_called_again(evidence, x)
        ]
        if named:
            verb = "has" if len(named) == 1 else "have"
            yield self.finding(
                tuple(layer.path for layer in named),
                f"{count(len(named), 'layer')} {verb} several names",
                severity="info",
                evidence={"names": {layer.path: list(layer.paths) for layer in named}},
                note=f"{named[0].path} is also {', '.join(named[0].paths[1:])}",
                help="register a layer once, unless its tensors are meant to be saved twice",
            )


def _is_called_again(evidence: Evidence, layer: NormLayer) -> bool:
    return any(call.occurrence for call in evidence.calls(layer))


def _sharing(layers: tuple[NormLayer, ...]) -> Iterator[tuple[NormLayer, ...]]:
    """Yield the groups of layers whose statistics overlap in memory."""
    spans = sorted(
        (span, i)
        for i, layer in enumerate(layers)
        for buffer in (layer.running_mean, layer.running_var)
        if (span := _span(buffer)) is not None
    )
    group: dict[int, None] = {}
    end = -1
    for (begin, stop), i in spans:
        if begin >= end:
            if len(group) > 1:
                yield tuple(layers[j] for j in sorted(group))
            group = {}
        group[i] = None
        end = max(end, stop)
    if len(group) > 1:
        yield tuple(layers[j] for j in sorted(group))


def _span(buffer: Tensor | None) -> tuple[int, int] | None:
    """Return the addresses that a buffer takes; None for one without memory."""
    if buffer is None or isinstance(buffer, UninitializedBuffer) or buffer.is_meta:
        return None
    if not buffer.numel() or not buffer.is_contiguous():
        return None
    return buffer.data_ptr(), buffer.data_ptr() + buffer.numel() * buffer.element_size()
