r"""Count, mean and sum of squared deviations of each channel, and how they merge.

    n = n_a + n_b        δ = μ_b - μ_a
    μ = μ_a + δ n_b / n
    M = M_a + M_b + δ² n_a n_b / n

    running_mean = μ     running_var = M / (n - 1)

Nothing is ever subtracted from a sum of squares, so nothing cancels: in float64 the result is that
of all values at once to about 1e-15, in whatever order and grouping they came.

Instance norm has a convention of its own: its running statistics are the averages, over samples, of
each sample's mean and unbiased variance. With n the number of samples and M the sum of their
variances that is the same without what lies between:

    M = M_a + M_b        running_var = M / n

Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances"; torch/aten/src/ATen/native/Normalization.cpp for the conventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of the values in each channel, of one layer or of several after each other.

    Args:
        n: n, the number of values, or of samples for an instance norm; 0 where there is none.
        mean: μ.
        m: M.
        between: 1 where the spread between batches counts; 0 for instance norms.

    Shape:
        All ``(C,)``, float64.
    """

    n: Tensor
    mean: Tensor
    m: Tensor
    between: Tensor

    @classmethod
    def none(cls, between: Tensor) -> Self:
        """Return the moments of no values."""
        zero = torch.zeros_like(between)
        return cls(zero, zero, zero, between)

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Self:
        """Return the moments of several layers after each other."""
        return cls(*(torch.cat(rows) for rows in zip(*map(_rows, parts), strict=True)))

    def split(self, sizes: Sequence[int]) -> list[Moments]:
        """Return those of each layer, given their numbers of channels."""
        parts = (torch.split(row, list(sizes)) for row in _rows(self))
        return [Moments(*rows) for rows in zip(*parts, strict=True)]

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together.

        Example:
            >>> one = pool(torch.tensor([[2.0]]), torch.tensor([[0.0]]), 1)
            >>> two = pool(torch.tensor([[5.0]]), torch.tensor([[1.0]]), 2)  # 4 and 6
            >>> both = one.merge(two)
            >>> both.n.item(), both.mean.item(), both.variance().item()
            (3.0, 4.0, 4.0)
        """
        n = self.n + other.n
        share = other.n / n.clamp_min(1)
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        m = self.m + other.m + self.between * delta.square() * self.n * share
        return Moments(n, mean, m, self.between)

    @property
    def has_variance(self) -> bool:
        """Whether every channel has values enough for a variance."""
        return bool((self.n > self.between).all())

    def variance(self) -> Tensor:
        """Return what torch keeps in `running_var`: M / (n - 1), of an instance norm M / n."""
        return self.m / (self.n - self.between)

    def biased_variance(self) -> Tensor:
        """Return M / n; 0 where there is no value."""
        return self.m / self.n.clamp_min(1)


def _rows(moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return moments.n, moments.mean, moments.m, moments.between


def pool(mean: Tensor, var: Tensor, values: int) -> Moments:
    r"""Return the moments of a batch from those of G groups of equally many values.

        μ = Σ_g μ_g / G        M = k Σ_g (σ_g² + (μ_g - μ)²)        k = n / G

    Args:
        mean: μ_g, the mean of each group.
        var: σ_g², the biased variance of each group.
        values: n, the number of values in each channel.

    Shape:
        - mean, var: ``(G, C)``; moments: ``(C,)``.
    """
    if len(mean) == 1:
        return _moments(values, mean[0], var[0] * values, 1.0)
    overall = mean.mean(0)
    m = (var + (mean - overall).square()).sum(0) * (values / len(mean))
    return _moments(values, overall, m, 1.0)


def average(mean: Tensor, var: Tensor, values: int) -> Moments:
    """Return instance norm's moments of a batch, its groups being the samples; as `pool`."""
    k = values / len(mean)
    return _moments(len(mean), mean.mean(0), var.sum(0) * (k / (k - 1)), 0.0)


def _moments(n: int, mean: Tensor, m: Tensor, between: float) -> Moments:
    return Moments(torch.full_like(mean, n), mean, m, torch.full_like(mean, between))
