r"""What is held in place of a variance? Told from the slope against the variances measured.

Converters and loaders of other libraries' checkpoints have stored, as `running_var`, the deviation,
its inverse, the inverse of the variance, or the variance times one factor. With the variances
:math:`m_c` that a layer's input has, and what it holds, :math:`r_c`, for every channel

.. math:: \log r_c = a + b \log m_c

and b tells which: 1 for the variance or a multiple of it, 0.5 for the deviation, -0.5 and -1 for
the inverses. The slope alone is not enough: the values themselves have to agree after conversion,
channel by channel, and the running mean, which nobody has misread, must be that of the data.
Statistics that are stale or of another domain do not fall on such a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stillnorm.diagnosis.measures.effect import effect
from stillnorm.diagnosis.measures.measure import ENOUGH_SAMPLES, FAR_MEAN, Samples

Encoding = Literal["deviation", "inverse deviation", "inverse", "factor"]

ENOUGH_CHANNELS = 8
FAR = math.log(1.86)  # measure.FAR_VARIANCE as a factor
FITS = FAR / 2  # what may be left after conversion, root mean square of the log over channels
SLOPE = 0.2  # less than half of what lies between two slopes
NEAR_0 = 0.3  # deviations, root mean square: a mean nearer than that tells no factor
SPREAD = 3.0  # of the variances beside their sampling error: it flattens the slope by a ninth

# What a variance m would be held as; the slope that this gives.
_HELD_AS: dict[Encoding, tuple[float, Callable[[Tensor, float], Tensor]]] = {
    "deviation": (0.5, lambda m, eps: m.sqrt()),
    "inverse deviation": (-0.5, lambda m, eps: (m + eps).rsqrt()),
    "inverse": (-1.0, lambda m, eps: (m + eps).reciprocal()),
}


@dataclass(frozen=True)
class Reading:
    """What a layer holds in place of its variance.

    Args:
        encoding: Which; "factor" for the variance times one factor.
        slope: Of what is held against what was measured, both as logarithms.
        before: How far what is held is from the variance: root mean square of the log of the ratio.
        after: The same after conversion.
        told: Whether the variances differ enough for the slope to tell encodings apart. Where they
            do not, several can fit.
        factor: What the variance was multiplied by; 1 but for "factor".
        mean_power: Which power of the factor the running mean was multiplied by: 0 where it is
            right, 1 where it was misread too, 0.5 where the input has another scale. None where
            the mean is too near 0 to tell.
    """

    encoding: Encoding
    slope: float
    before: float
    after: float
    told: bool
    factor: float = 1.0
    mean_power: float | None = 0.0


def read_encodings(mean: Tensor, held: Tensor, samples: Samples, eps: float) -> list[Reading]:
    """Tell what a layer can hold in place of the variance of what it received.

    Args:
        mean: The running mean.
        held: The running variance, which may be something else.
        samples: What the layer received.
        eps: What it adds to the variance.

    Returns:
        What fits, the best first. Nothing where it is the variance, or nothing known, or where
        fewer than 8 channels or 32 samples were seen.

    Shape:
        - mean, held: ``(C,)``

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.logspace(-2, 2, 16) * torch.randn(512, 16, generator=g)
        >>> seen = Samples(x.double(), x.double().square(), per_batch=512)
        >>> [r.encoding for r in read_encodings(torch.zeros(16), seen.pooled[1].sqrt(), seen, 1e-5)]
        ['deviation']
    """
    mu, r = mean.detach().double().cpu(), held.detach().double().cpu()
    m = samples.pooled[1]
    usable = (m > 0) & (r > 0) & r.isfinite() & mu.isfinite()
    if int(usable.sum()) < ENOUGH_CHANNELS or len(samples) < ENOUGH_SAMPLES or not samples.finite:
        return []
    mu, r, m = mu[usable], r[usable], m[usable]
    x, y = m.log(), r.log()
    before = _rms(y - x)
    if before < FAR:
        return []
    error = samples.shares()[:, usable].std(0) / (m * math.sqrt(len(samples)))
    told = float(x.std()) > SPREAD * _rms(error)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    means = samples.mean[:, usable]
    found = []
    if _off(means, mu, m, eps) < FAR_MEAN:
        for name, (expected, held_as) in _HELD_AS.items():
            after = _rms(y - held_as(m, eps).log())
            if after < FITS and (abs(slope - expected) < SLOPE or not told):
                found.append(Reading(name, slope, before, after, told))
    after = float((y - x).std())
    if after < FITS and (abs(slope - 1) < SLOPE or not told):
        factor = float((y - x).mean().exp())
        times = _times(mu, means.mean(0), m, eps)
        if times is None:
            found.append(Reading("factor", slope, before, after, told, factor, None))
        elif times > 0 and _off(means, mu / times, m, eps) < FAR_MEAN:
            power = min((0.0, 0.5, 1.0), key=lambda p: abs(p - math.log(times) / math.log(factor)))
            found.append(Reading("factor", slope, before, after, told, factor, power))
    return sorted(found, key=lambda reading: reading.after)


def _off(means: Tensor, running: Tensor, m: Tensor, eps: float) -> float:
    """Return how far a running mean is from samples' means, in deviations."""
    return effect((means - running) / (m + eps).sqrt())


def _times(running: Tensor, seen: Tensor, m: Tensor, eps: float) -> float | None:
    """Return what the means seen have to be multiplied by to be the running ones; None near 0."""
    size = (seen.square() / (m + eps)).mean()
    return float((running * seen / (m + eps)).mean() / size) if size > NEAR_0**2 else None


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
