r"""Count, mean and sum of squared deviations of each channel, and how they merge.

    n = n_a + n_b        δ = μ_b - μ_a
    μ = μ_a + δ n_b / n
    M = M_a + M_b + δ² n_a n_b / n

    running_mean = μ     running_var = M / (n - 1)

Nothing is ever subtracted from a sum of squares, so nothing cancels: in float64 the result is that
of all values at once to about 1e-15, in whatever order and grouping they came.

Instance norm has a convention of its own: its running statistics are the averages, over samples, of
each sample's mean and unbiased variance.

Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances"; torch/aten/src/ATen/native/Normalization.cpp for the conventions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor


class Statistics(Protocol):
    """What a layer's running statistics are made of."""

    @property
    def count(self) -> int:
        """The number of values, or of samples, in each channel."""

    @property
    def mean(self) -> Tensor:
        """What `running_mean` becomes, (C,), float64."""

    @property
    def has_variance(self) -> bool:
        """Whether there are values enough for a variance."""

    def variance(self) -> Tensor:
        """Return what `running_var` becomes, (C,), float64."""

    def biased_variance(self) -> Tensor:
        """Return the variance of the values themselves, (C,), float64."""

    def merge(self, other: Self) -> Self:
        """Return the statistics of both together."""

    def parts(self) -> tuple[int, Tensor, Tensor]:
        """Return what it is made of."""


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of n values in each channel.

    Args:
        count: n.
        mean: μ, (C,), float64.
        m2: M, (C,), float64: the sum of (x - μ)².
    """

    count: int
    mean: Tensor
    m2: Tensor

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together.

        Example:
            >>> import torch
            >>> one = Moments(1, torch.tensor([2.0]), torch.tensor([0.0]))
            >>> two = Moments(2, torch.tensor([5.0]), torch.tensor([2.0]))  # 4 and 6
            >>> both = one.merge(two)
            >>> both.count, both.mean.item(), both.variance().item()
            (3, 4.0, 4.0)
        """
        n = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / n)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / n)
        return Moments(n, mean, m2)

    @property
    def has_variance(self) -> bool:
        """Whether there is more than one value."""
        return self.count > 1

    def variance(self) -> Tensor:
        """Return the unbiased variance M / (n - 1), which torch keeps in `running_var`."""
        return self.m2 / (self.count - 1)

    def biased_variance(self) -> Tensor:
        """Return the variance of the values themselves, M / n."""
        return self.m2 / self.count

    def parts(self) -> tuple[int, Tensor, Tensor]:
        """Return n, μ and M."""
        return self.count, self.mean, self.m2


@dataclass(frozen=True, eq=False)
class Averages:
    """Instance norm's statistics over n samples.

    Args:
        count: n.
        mean: The average of the samples' means, (C,), float64.
        var: The average of the samples' unbiased variances, (C,), float64.
    """

    count: int
    mean: Tensor
    var: Tensor

    def merge(self, other: Averages) -> Averages:
        """Return the averages over both sets of samples together."""
        n = self.count + other.count
        mean = self.mean + (other.mean - self.mean) * (other.count / n)
        var = self.var + (other.var - self.var) * (other.count / n)
        return Averages(n, mean, var)

    @property
    def has_variance(self) -> bool:
        """Always: a sample without a variance has no averages."""
        return True

    def variance(self) -> Tensor:
        """Return the average variance."""
        return self.var

    def biased_variance(self) -> Tensor:
        """Return the average variance: each sample's is unbiased already."""
        return self.var

    def parts(self) -> tuple[int, Tensor, Tensor]:
        """Return n, the mean and the variance."""
        return self.count, self.mean, self.var


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
        return Moments(values, mean[0], var[0] * values)
    overall = mean.mean(0)
    m2 = (var + (mean - overall).square()).sum(0) * (values / len(mean))
    return Moments(values, overall, m2)


def average(mean: Tensor, var: Tensor, values: int) -> Averages:
    """Return instance norm's averages of a batch, its groups being the samples; as `pool`."""
    k = values / len(mean)
    return Averages(len(mean), mean.mean(0), var.mean(0) * (k / (k - 1)))
