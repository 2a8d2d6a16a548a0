r"""What the calls of a norm layer say about its statistics: distances and noise, sample by sample.

With a sample's channel mean :math:`m_i` and mean square :math:`s_i` over its positions, the running
statistics :math:`\mu, v` of a layer, and :math:`\bar m` the mean of all samples:

.. math:: d_i = \frac{m_i - \mu}{\sqrt{v + \epsilon}}, \qquad
          x_i = s_i - 2 \bar m m_i + \bar m^2, \qquad
          q_i = 2\,\frac{x_i - v}{\bar x + v + 2\epsilon}

:math:`E[d]` is how far the running mean is off, in running deviations. :math:`x_i` is the sample's
share in the variance, so :math:`E[q]` is the relative difference of the two variances: symmetric
(twice too large is 0.67, twice too small -0.67), bounded, and untouched by an error of the mean.

The noise of batch statistics is that of a mean over :math:`B` samples: between batches the batch
mean scatters with variance :math:`\mathrm{var}_i(m_i) / B`, whatever the number of positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stillnorm.diagnosis.measures.effect import effect, sign_flip_p
from stillnorm.tracing import Call

# Measured by benchmarks/mismatch_thresholds.py; see rules/mismatched_statistics.py.
FAR_MEAN = 0.3  # running deviations, root mean square over channels
FAR_VARIANCE = 0.6  # relative difference: a factor of 1.86 in every channel
SIGNIFICANT = 0.002
ENOUGH_SAMPLES = 32  # below, one in forty healthy models would be accused


@dataclass(frozen=True, eq=False)
class Samples:
    """What a layer received, one row per sample.

    Args:
        mean: Channel means over each sample's positions.
        square: Channel means of the squares.
        per_batch: Rows per batch.

    Shape:
        - mean, square: ``(n, C)``, float64, on the CPU
    """

    mean: Tensor
    square: Tensor
    per_batch: float

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def finite(self) -> bool:
        """Whether every value is a number."""
        return bool(self.mean.isfinite().all() and self.square.isfinite().all())

    @cached_property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, of all values together."""
        mean = self.mean.mean(0)
        return mean, (self.square.mean(0) - mean.square()).clamp_min(0)

    def within(self) -> Tensor:
        """Return the variance inside each sample, (n, C): what instance norm normalises by."""
        return (self.square - self.mean.square()).clamp_min(0)

    def shares(self) -> Tensor:
        """Return x, (n, C): each sample's share in the variance around the common mean."""
        mean = self.pooled[0]
        return self.square - 2 * mean * self.mean + mean.square()


def samples_of(calls: Iterable[Call], batch_sizes: Sequence[int]) -> Samples | None:
    """Gather the calls of one layer into one row per sample of the user's batch.

    A norm can receive more rows than there are samples: frames, regions, patches folded into the
    batch axis. They belong to their sample, and are not independent of each other; rows next to
    each other are taken as one sample's. Where the rows cannot be divided among the samples (the
    nodes of graphs, packed sequences) the whole batch counts as one sample.

    Returns:
        The rows, or None when there are none.
    """
    batches: dict[int, list[Call]] = {}
    for call in calls:
        if call.sample_mean.numel():
            batches.setdefault(call.batch, []).append(call)
    means, squares = [], []
    for batch, in_batch in batches.items():
        rows = [_fold(call, batch_sizes[batch]) for call in in_batch]
        if len({len(mean) for mean, _ in rows}) > 1:  # sites that see different numbers of samples
            rows = [(mean.mean(0, keepdim=True), sq.mean(0, keepdim=True)) for mean, sq in rows]
        means.append(torch.stack([mean for mean, _ in rows]).mean(0))
        squares.append(torch.stack([square for _, square in rows]).mean(0))
    if not means:
        return None
    mean = torch.cat(means)
    return Samples(mean, torch.cat(squares), per_batch=len(mean) / len(means))


def _fold(call: Call, samples: int) -> tuple[Tensor, Tensor]:
    """Average the rows of one call that belong to the same sample."""
    mean, var = call.sample_mean.double().cpu(), call.sample_var.double().cpu()
    square = var + mean.square()
    groups = samples if samples and len(mean) % samples == 0 else 1
    return (
        mean.reshape(groups, -1, mean.shape[1]).mean(1),
        square.reshape(groups, -1, mean.shape[1]).mean(1),
    )


@dataclass(frozen=True, eq=False)
class Distance:
    """How far one distribution is from another, with what is needed to believe it.

    Args:
        d: Per sample, the difference of means in deviations.
        q: Per sample, the relative difference of variances.
        ratio: The ratio of the variances, geometric mean over channels.
    """

    d: Tensor
    q: Tensor
    ratio: float

    @property
    def samples(self) -> int:
        """How many samples the distance rests on."""
        return len(self.d)

    @cached_property
    def mean(self) -> float:
        """The unbiased distance of the means, in deviations, root mean square over channels."""
        return effect(self.d)

    @cached_property
    def variance(self) -> float:
        """The unbiased relative difference of the variances, root mean square over channels."""
        return effect(self.q)

    @cached_property
    def p_mean(self) -> float:
        """How often noise alone would show such a difference of the means."""
        return sign_flip_p(self.d)

    @cached_property
    def p_variance(self) -> float:
        """How often noise alone would show such a difference of the variances."""
        return sign_flip_p(self.q)

    def exceeds(self, part: float) -> bool:
        """Tell whether the size, whatever its p, is more than a part of what counts as far."""
        return self.mean > part * FAR_MEAN or self.variance > part * FAR_VARIANCE

    def is_far(self, part: float = 1.0) -> bool:
        """Tell whether the difference is both that large and beyond sampling noise."""
        return (self.mean > part * FAR_MEAN and self.p_mean < SIGNIFICANT) or (
            self.variance > part * FAR_VARIANCE and self.p_variance < SIGNIFICANT
        )


def distance(
    mean: Tensor | None, var: Tensor | None, eps: float, samples: Samples | None, *, instance: bool
) -> Distance | None:
    """Measure how far running statistics are from what a layer received.

    Args:
        mean: The running mean, (C,).
        var: The running variance, (C,).
        eps: What the layer adds to the variance.
        samples: What it received.
        instance: Whether the variance is one within samples, as instance norm's is.

    Returns:
        None when there is nothing to compare: no statistics, no sample, or values that are not
        numbers (another rule's finding).
    """
    if mean is None or var is None or samples is None or not samples.finite:
        return None
    mu, v = mean.detach().double().cpu(), var.detach().double().cpu()
    if not (mu.isfinite().all() and v.isfinite().all() and (v >= 0).all()):
        return None
    x = samples.within() if instance else samples.shares()
    d = (samples.mean - mu) / (v + eps).sqrt()
    q = 2 * (x - v) / (x.mean(0) + v + 2 * eps)
    return Distance(d, q, _ratio(x.mean(0) + eps, v + eps))


def between(a: Samples | None, b: Samples | None, eps: float) -> Distance | None:
    """Measure how far apart what two call sites of one layer receive is, sample by sample."""
    if a is None or b is None or len(a) != len(b) or not (a.finite and b.finite):
        return None
    (_, var_a), (_, var_b) = a.pooled, b.pooled
    d = (a.mean - b.mean) / ((var_a + var_b) / 2 + eps).sqrt()
    q = 2 * (a.shares() - b.shares()) / (var_a + var_b + 2 * eps)
    return Distance(d, q, _ratio(var_a + eps, var_b + eps))


def _ratio(a: Tensor, b: Tensor) -> float:
    """The geometric mean of a / b."""
    return float((a / b).log().mean().exp())


def batch_noise(samples: Samples | None, eps: float) -> float | None:
    """Predict how far batch statistics scatter around the population's, in deviations.

    Returns:
        The scatter of the batch mean, root mean square over channels, for batches as large as
        those given; None when fewer than two samples were seen.
    """
    if samples is None or len(samples) < 2 or not samples.finite:
        return None
    _, var = samples.pooled
    scatter = samples.mean.var(0, correction=1) / samples.per_batch
    return float((scatter / (var + eps)).mean().sqrt())
