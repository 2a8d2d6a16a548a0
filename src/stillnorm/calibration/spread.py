r"""How far batches lie apart, which tells the error of what is estimated from them.

Let batch b have n_b values of mean μ_b and biased variance v_b, all batches n values of mean μ and
variance σ². What batch b contributes to the error of each statistic is its influence:

    on μ:     n_b (μ_b - μ) / n
    on σ²:    n_b (v_b + (μ_b - μ)² - σ²) / n

and the squared standard error is B / (B - 1) times the sum of their squares. Positions in a map are
correlated, samples in a batch may be; batches drawn at random are not, whatever is in them: that is
why the batches are the unit.

Only sums over batches are kept. With the mean r of the first batch as origin, a = μ_b - r and
q = v_b + a², both influences are linear in a and q:

    on μ:     n_b (a - a̅) / n
    on σ²:    n_b ((q - q̅) - 2 a̅ (a - a̅)) / n

For instance norms, whose variance is an average over samples, q = v_b and the last term is absent.

Source: Flegal, Haran & Jones 2008, "Markov chain Monte Carlo: can we trust the third significant
figure?", for batch means; Cochran 1977, "Sampling Techniques", 6.3, for ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from stillnorm.calibration.moments import Moments


@dataclass(frozen=True, eq=False)
class Spread:
    """Sums over batches, of one layer or of several after each other.

    Args:
        origin: r, (C,); anything where there is no batch.
        batches: B, (C,).
        sums: Σ n_b² (1, a, q, a², a q, q²), (6, C).
    """

    origin: Tensor
    batches: Tensor
    sums: Tensor

    @classmethod
    def none(cls, channels: int) -> Self:
        """Return the sums over no batches."""
        zero = torch.zeros(channels, dtype=torch.float64)
        return cls(zero, zero, zero.expand(6, -1))

    def split(self, sizes: Sequence[int]) -> list[Spread]:
        """Return those of each layer, given their numbers of channels."""
        parts = (
            torch.split(rows, list(sizes), -1) for rows in (self.origin, self.batches, self.sums)
        )
        return [Spread(*part) for part in zip(*parts, strict=True)]

    def add(self, batch: Moments) -> Spread:
        """Return the sums with one batch more; where it has no values, as they were."""
        there = (batch.n > 0).to(batch.n)
        origin = torch.where(self.batches > 0, self.origin, batch.mean)
        a = batch.mean - origin
        q = batch.biased_variance() + batch.between * a * a
        terms = torch.stack((torch.ones_like(a), a, q, a * a, a * q, q * q))
        return Spread(origin, self.batches + there, self.sums + batch.n.square() * terms)

    def merge(self, other: Spread, between: Tensor) -> Spread:
        """Return the sums of both, about this one's origin.

        Args:
            other: The other sums.
            between: As in `Moments`: whether q contains a², which then moves with the origin.
        """
        origin = torch.where(self.batches > 0, self.origin, other.origin)
        # a + d, and q + k a + c
        d = torch.where(other.batches > 0, other.origin - origin, 0)
        k, c = 2 * between * d, between * d * d
        w, a, q, aa, aq, qq = other.sums
        moved = torch.stack(
            (
                w,
                a + d * w,
                q + k * a + c * w,
                aa + 2 * d * a + d * d * w,
                aq + k * aa + c * a + d * (q + k * a + c * w),
                qq + k * k * aa + c * c * w + 2 * (k * aq + c * q + k * c * a),
            )
        )
        return Spread(origin, self.batches + other.batches, self.sums + moved)

    def standard_errors(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return the standard errors of mean and variance, (C,) each; NaN of a single batch.

        Args:
            moments: Those of all batches.
        """
        w, a, q, aa, aq, qq = self.sums
        a_bar = moments.mean - self.origin
        q_bar = moments.biased_variance() + moments.between * a_bar * a_bar
        k = 2 * moments.between * a_bar
        s_aa = aa - 2 * a_bar * a + a_bar * a_bar * w
        s_aq = aq - a_bar * q - q_bar * a + a_bar * q_bar * w
        s_qq = qq - 2 * q_bar * q + q_bar * q_bar * w
        scale = self.batches / (self.batches - 1) / moments.n.square()
        scale = torch.where(self.batches > 1, scale, torch.nan)
        of_var = s_qq - 2 * k * s_aq + k * k * s_aa
        return (scale * s_aa.clamp_min(0)).sqrt(), (scale * of_var.clamp_min(0)).sqrt()
