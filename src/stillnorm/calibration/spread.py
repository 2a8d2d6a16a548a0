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

Source: Flegal, Haran & Jones 2008, "Markov chain Monte Carlo: can we trust the third significant
figure?", for batch means; Cochran 1977, "Sampling Techniques", 6.3, for ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spread:
    """Sums over batches, each weighted with n_b².

    Args:
        origin: r, (C,), float64.
        batches: B.
        weight: Σ n_b².
        sums: Σ n_b² (a, q, a², a q, q²), (5, C), float64.
    """

    origin: Tensor
    batches: int
    weight: float
    sums: Tensor

    @classmethod
    def of(cls, origin: Tensor, n: int, mean: Tensor, q: Tensor) -> Spread:
        """Return the sums of one batch of n values.

        Args:
            origin: r, (C,).
            n: n_b.
            mean: μ_b, (C,).
            q: v_b + (μ_b - r)², (C,).
        """
        a = mean - origin
        w = float(n) ** 2
        return cls(origin, 1, w, w * torch.stack((a, q, a * a, a * q, q * q)))

    def merge(self, other: Spread, squares: bool) -> Spread:
        """Return the sums of both, about this one's origin.

        Args:
            other: The other sums.
            squares: Whether q contains a², which then moves with the origin.
        """
        moved = other.sums
        d = other.origin - self.origin
        if d.any():
            a, q, aa, aq, qq = other.sums
            w = other.weight
            # a + d, and q + 2 d a + d² where q contains a²
            k, c = (2 * d, d * d) if squares else (torch.zeros_like(d), torch.zeros_like(d))
            moved = torch.stack(
                (
                    a + d * w,
                    q + k * a + c * w,
                    aa + 2 * d * a + d * d * w,
                    aq + k * aa + c * a + d * (q + k * a + c * w),
                    qq + k * k * aa + c * c * w + 2 * (k * aq + c * q + k * c * a),
                )
            )
        return Spread(
            self.origin,
            self.batches + other.batches,
            self.weight + other.weight,
            self.sums + moved,
        )

    def standard_errors(
        self, n: int, mean: Tensor, var: Tensor, squares: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return the standard errors of mean and variance, (C,) each; None of a single batch.

        Args:
            n: The number of values in all batches.
            mean: μ, (C,).
            var: σ², biased, (C,).
            squares: Whether q contains a².
        """
        if self.batches < 2:
            return None
        a_bar = mean - self.origin
        q_bar = var + a_bar * a_bar if squares else var
        k = 2 * a_bar if squares else torch.zeros_like(a_bar)
        a, q, aa, aq, qq = self.sums
        w = self.weight
        s_aa = aa - 2 * a_bar * a + a_bar * a_bar * w
        s_aq = aq - a_bar * q - q_bar * a + a_bar * q_bar * w
        s_qq = qq - 2 * q_bar * q + q_bar * q_bar * w
        of_mean = s_aa
        of_var = s_qq - 2 * k * s_aq + k * k * s_aa
        scale = self.batches / (self.batches - 1) / n**2
        return (
            (scale * of_mean.clamp_min(0)).sqrt(),
            (scale * of_var.clamp_min(0)).sqrt(),
        )
