r"""How much of the initial statistics is left in a running average that was hardly updated.

After n updates with momentum m, mean 0 and variance 1 still weigh :math:`w = (1 - m)^n`:

.. math:: \mu = (1 - w)\,\bar\mu, \qquad v = w + (1 - w)\,\bar v

The counter alone does not prove it: `recalibrate`, `swa_utils.update_bn` and training with another
momentum leave true statistics beside a small n. The arithmetic can refute it: :math:`v \ge w` has
to hold in every channel. Where it does, data can confirm it: :math:`\bar\mu, \bar v` must describe
them better than what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.measures.measure import FAR_MEAN, FAR_VARIANCE, Distance, distance
from stillnorm.diagnosis.measures.stored import updates, values
from stillnorm.norms import NormLayer

LEAST = 0.05  # less is lost in what sampling does to a running average anyway
NEAR = 1.25  # times w: where the smallest variance of a network lies that is mostly initial
ENOUGH_CHANNELS = 16


@dataclass(frozen=True, eq=False)
class Residue:
    """Statistics that, by count, momentum and arithmetic, can still hold the initial ones.

    Args:
        updates: n.
        momentum: m.
        mean: The running mean, (C,), float64.
        var: The running variance, (C,), float64.
        eps: What the layer adds to it.
    """

    updates: int
    momentum: float
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def left(self) -> float:
        """What the initial statistics weigh, w."""
        return float((1 - self.momentum) ** self.updates)

    @property
    def without(self) -> tuple[Tensor, Tensor]:
        """The statistics with the initial share taken out."""
        w = self.left
        return self.mean / (1 - w), ((self.var - w) / (1 - w)).clamp_min(0)

    @property
    def matters(self) -> bool:
        """Whether those are as far from the stored ones as SN105 calls far."""
        mean, var = self.without
        d = (mean - self.mean) / (var + self.eps).sqrt()
        q = 2 * (var - self.var) / (var + self.var + 2 * self.eps)
        return _rms(d) > FAR_MEAN or _rms(q) > FAR_VARIANCE

    def __str__(self) -> str:
        times = "1 update" if self.updates == 1 else f"{self.updates} updates"
        left = f"{100 * self.left:.0f} % of the initial values"
        return f"momentum {self.momentum:g} after {times} leaves {left}"


def residue(evidence: Evidence, layer: NormLayer) -> Residue | None:
    """Return what can be left of the layer's initial statistics; None where nothing can."""
    n, m = updates(layer), layer.momentum
    mean, var = map(values, evidence.statistics[layer.path])
    if layer.family != "batch" or m is None or not 0 < m < 1 or n < 1 or layer.never_estimated:
        return None
    if mean is None or var is None or not (mean.isfinite() & var.isfinite()).all():
        return None
    found = Residue(n, m, mean, var, layer.eps)
    least = found.left * (1 - _rounding(layer))
    return found if found.left >= LEAST and bool((var >= least).all()) else None


def _rounding(layer: NormLayer) -> float:
    """Return by how much rounding may have lowered a running average."""
    var = layer.running_var
    return 0.1 if var is not None and var.dtype in (torch.float16, torch.bfloat16) else 1e-3


def unconverged(evidence: Evidence) -> dict[NormLayer, Residue]:
    """Return the layers whose statistics are initial ones in good part, with what is left.

    Where the batches reach a layer they decide; where they do not, all layers with the same count
    and momentum have to agree.
    """
    found = {
        layer: left
        for layer in evidence.layers
        if not evidence.is_held(layer) and (left := residue(evidence, layer)) is not None
    }
    return {
        layer: left
        for layer, left in found.items()
        if (
            _is_likely(evidence, layer, found)
            if evidence.distance(layer, "batch") is None
            else is_confirmed(evidence, layer, left)
        )
    }


def is_confirmed(evidence: Evidence, layer: NormLayer, left: Residue) -> bool:
    """Tell whether the data are far from what is stored, and half as far from the rest of it."""
    seen = evidence.distance(layer, "batch")
    if seen is None or not evidence.mismatched(layer):
        return False
    samples = evidence.samples(layer, "batch")
    rest = distance(*left.without, layer.eps, samples, instance=False)
    return rest is not None and _size(rest) < _size(seen) / 2


def _is_likely(evidence: Evidence, layer: NormLayer, found: Mapping[NormLayer, Residue]) -> bool:
    """Tell whether a whole network's statistics look initial, without data.

    No variance of a layer with the same count and momentum is below w, the smallest lies near it,
    and without the initial share the statistics would be others.
    """
    schedule = (updates(layer), layer.momentum)
    peers = [x for x in evidence.layers if (updates(x), x.momentum) == schedule]
    if any(peer not in found for peer in peers):
        return False
    variances = torch.cat([found[peer].var.flatten() for peer in peers])
    return (
        len(variances) >= ENOUGH_CHANNELS
        and float(variances.min()) <= NEAR * found[layer].left
        and any(found[peer].matters for peer in peers)
    )


def _size(seen: Distance) -> float:
    """Return a distance in units of what counts as far."""
    return max(seen.mean / FAR_MEAN, seen.variance / FAR_VARIANCE)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
