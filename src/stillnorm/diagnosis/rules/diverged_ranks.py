"""SN501: ranks that hold different statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.evidence.peers import Peers
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.measures.measure import FAR_MEAN, FAR_VARIANCE
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, number

NOISE = 1e-4
_ROUNDINGS = 8  # of the statistics' own dtype: what half precision may differ by


class DivergedRanks(Rule):
    """The processes of a data-parallel training hold different running statistics.

    What it finds:
        A running mean or variance that is not the same on all ranks of the group given to
        `check(..., group=)`, by more than 1e-4 of a deviation or of the variance. Sums in another
        order differ by 1e-6; batches of one's own, even of a million values, by 1e-3.

    Why it matters:
        Gradients are averaged over the ranks, running statistics are not: each rank's describe its
        own batches. Every rank then evaluates another model, metrics depend on the rank, and the
        checkpoint that rank 0 writes knows only rank 0's part of the data. Measured, two ranks with
        data around 0 and around 10: a global mean of 5, and a running mean of 0.01 on rank 0.

    When it is fine:
        Statistics of one's own on purpose: federated learning that keeps them local (FedBN), or
        ranks that train different models. DistributedDataParallel with `broadcast_buffers` writes
        rank 0's over all others before the next forward, so small differences after a step are a
        remark, not an error. Not reported: SyncBatchNorm and held layers, whose statistics are
        equal.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> report = check(nn.BatchNorm1d(2), select="SN501")  # one process, no group
        >>> report.not_run[0].reason
        'needs group='

    Fix:
        Unsafe: the pooled moments of all ranks, each counting the same, are written on every rank
        that calls `report.fix(unsafe=True)`: call it on all. `SyncBatchNorm` keeps them equal.

    References:
        pytorch/pytorch#1051, #22095, #65907 and #110363; facebookresearch/fvcore#152;
        huggingface/pytorch-image-models#245 (`--dist-bn reduce`).
    """

    code = "SN501"
    slug = "diverged-ranks"
    severity = "error"
    needs = ("tree", "group")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer, the farthest first."""
        peers = evidence.request.peers
        if peers is None or peers.reason:
            raise CannotTell(peers.reason if peers else "there is one process only")
        spreads = {x: _spread(peers, x) for x in evidence.layers if x.path in peers.means}
        apart = {layer: spread for layer, spread in spreads.items() if spread.differs}
        if not apart:
            return
        layers = sorted(apart, key=lambda layer: -apart[layer].mean)
        paths = tuple(layer.path for layer in layers)
        broadcast = all(map(_is_broadcast, layers))
        far = any(spread.is_far for spread in apart.values())
        poolable = tuple(layer.path for layer in layers if apart[layer].finite)
        yield self.finding(
            paths,
            f"{peers.size} ranks hold different statistics in {count(len(paths), 'layer')}: means "
            f"are up to {number(apart[layers[0]].mean)} sigma apart",
            severity="info" if broadcast and not far else None,
            evidence={
                "ranks": peers.size,
                "mean": {layer.path: apart[layer].mean for layer in layers},
                "variance": {layer.path: apart[layer].variance for layer in layers},
            },
            table=Table(
                ("", "means apart", "variances apart"),
                tuple(
                    (x.path, f"{number(apart[x].mean)} sigma", f"{100 * apart[x].variance:.1f} %")
                    for x in layers[:3]
                ),
                "lrr",
            ),
            note="DistributedDataParallel writes rank 0's over them before the next forward: only "
            "rank 0's batches count"
            if broadcast
            else "each rank evaluates another model, and a checkpoint keeps one of them",
            help="pool them on all ranks before evaluating or saving; in training, "
            "nn.SyncBatchNorm.convert_sync_batchnorm(model) keeps them equal",
            fix=Fix("pool the statistics of all ranks", "unsafe", "pool", poolable)
            if poolable
            else None,
        )


@dataclass(frozen=True)
class _Spread:
    """How far the ranks' statistics of one layer are apart.

    Args:
        mean: The distance of the farthest means, in deviations, root mean square over channels.
        variance: The same of the variances, as a part of the variance.
        differs: Whether some channel shows more than rounding.
        finite: Whether all values are numbers.
    """

    mean: float
    variance: float
    differs: bool
    finite: bool

    @property
    def is_far(self) -> bool:
        """Whether the distance is one that running statistics must not have from the data's."""
        return not self.finite or self.mean > FAR_MEAN or self.variance > FAR_VARIANCE


def _spread(peers: Peers, layer: NormLayer) -> _Spread:
    means, variances = peers.means[layer.path], peers.variances[layer.path]
    finite = bool(means.isfinite().all() and variances.isfinite().all())
    if not finite:
        same = all(
            torch.allclose(v, v[:1].expand_as(v), rtol=0, atol=0, equal_nan=True)
            for v in (means, variances)
        )
        return _Spread(math.inf, math.inf, not same, finite=False)
    variance = variances.mean(0).clamp_min(0) + layer.eps
    d, q = _range(means) / variance.sqrt(), _range(variances) / variance
    size = means.abs().amax(0) / variance.sqrt()
    tolerance = max(NOISE, _ROUNDINGS * _rounding(layer))
    differs = bool((d > tolerance * (1 + size)).any() or (q > tolerance).any())
    return _Spread(_rms(d), _rms(q), differs, finite)


def _range(values: Tensor) -> Tensor:
    """Return how far the farthest of the ranks are apart, per channel."""
    return values.amax(0) - values.amin(0)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _rounding(layer: NormLayer) -> float:
    tensors = (layer.running_mean, layer.running_var)
    return max((torch.finfo(t.dtype).eps for t in tensors if t is not None), default=0.0)


def _is_broadcast(layer: NormLayer) -> bool:
    """Tell whether a wrapper overwrites the layer's statistics with rank 0's."""
    return any(
        isinstance(module, DistributedDataParallel) and module.broadcast_buffers
        for module in layer.above
    )
