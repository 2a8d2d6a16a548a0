"""What one layer has received so far: its statistics, and how well they are known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillnorm.calibration.moments import Averages, Moments, Statistics, average, pool
from stillnorm.calibration.spread import Spread
from stillnorm.norms import NormLayer
from stillnorm.tracing import Normalization

_COUNTS = 6


@dataclass
class Pool:
    """What one layer has received.

    Args:
        layer: The layer.
        statistics: The statistics of all of it; None before there are any values.
        spread: How far the batches lie apart.
        samples: The number of samples.
        calls: The number of times that the layer was called.
        counted: Its `num_batches_tracked` before; 0 where it has none.
    """

    layer: NormLayer
    statistics: Statistics | None = None
    spread: Spread | None = None
    samples: int = 0
    calls: int = 0
    counted: int = -1
    _of_batch: Statistics | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        tracked = self.layer.num_batches_tracked
        if self.counted < 0:
            self.counted = 0 if tracked is None else int(tracked)

    @property
    def _by_sample(self) -> bool:
        return self.layer.family == "instance"

    @property
    def is_shared(self) -> bool:
        """Whether the layer was called more than once in a forward."""
        return self.spread is not None and self.calls > self.spread.batches

    def estimate(self) -> Statistics | None:
        """Return the statistics if there are values enough for a variance."""
        ready = self.statistics is not None and self.statistics.has_variance
        return self.statistics if ready else None

    def add(self, received: Normalization, mean: Tensor, var: Tensor) -> None:
        """Add one input, given the mean and biased variance of groups of its values, (G, C)."""
        self.calls += 1
        self.samples += received.samples
        convention, least = (average, 2) if self._by_sample else (pool, 1)
        if received.values < least * len(mean) or not len(mean):
            return  # instance norm has no variance for samples of one position
        new = convention(mean, var, received.values)
        self._of_batch = new if self._of_batch is None else self._of_batch.merge(new)

    def end_batch(self) -> None:
        """Take what came since the last batch as one batch."""
        if (new := self._of_batch) is None:
            return
        self._of_batch = None
        origin = new.mean if self.spread is None else self.spread.origin
        var = new.biased_variance()
        q = var if self._by_sample else var + (new.mean - origin).square()
        spread = Spread.of(origin, new.count, new.mean, q)
        self._take(new, spread)

    def merge(self, other: Pool) -> None:
        """Add what the same layer received on another rank."""
        self.samples += other.samples
        self.calls += other.calls
        if other.statistics is not None and other.spread is not None:
            self._take(other.statistics, other.spread)

    def _take(self, new: Statistics, spread: Spread) -> None:
        self.statistics = new if self.statistics is None else self.statistics.merge(new)
        self.spread = (
            spread if self.spread is None else self.spread.merge(spread, not self._by_sample)
        )

    def standard_errors(self) -> tuple[Tensor, Tensor] | None:
        """Return the standard errors of mean and variance, (C,) each; None of a single batch."""
        if self.statistics is None or self.spread is None:
            return None
        n, mean = self.statistics.count, self.statistics.mean
        var = self.statistics.biased_variance()
        return self.spread.standard_errors(n, mean, var, not self._by_sample)

    def error(self) -> float | None:
        """Return how far the statistics may be off; None where one batch alone reached the layer.

        The larger of two standard errors, each the root mean square over the channels: of the mean,
        in deviations of what the layer receives; of the variance, relative to it.
        """
        errors = self.standard_errors()
        if errors is None or self.statistics is None:
            return None
        scale = self.statistics.biased_variance() + self.layer.eps
        of_mean = (errors[0].square() / scale).mean().sqrt()
        of_var = (errors[1] / scale).square().mean().sqrt()
        return float(torch.maximum(of_mean, of_var))

    # ------------------------------------------------------------------ as numbers

    def to_vector(self) -> Tensor:
        """Return all of it as one vector, float64, of a length that the layer alone decides."""
        c = self.layer.module.get_buffer("running_mean").numel()
        if self.statistics is None or self.spread is None:
            of_spread = [0, 0, 0.0]
            rows = torch.zeros(8, c, dtype=torch.float64)
        else:
            n, mean, third = self.statistics.parts()
            of_spread = [n, self.spread.batches, self.spread.weight]
            rows = torch.stack((mean, third, self.spread.origin, *self.spread.sums))
        counts = [self.samples, self.calls, self.counted, *of_spread]
        return torch.cat((torch.tensor(counts, dtype=torch.float64), rows.flatten()))

    @classmethod
    def of_vector(cls, layer: NormLayer, vector: Tensor) -> Pool:
        """Return what `to_vector` made a vector of."""
        counts, rows = vector[:_COUNTS].tolist(), vector[_COUNTS:].reshape(8, -1)
        samples, calls, counted, n, batches, weight = counts
        made = cls(layer, samples=int(samples), calls=int(calls), counted=int(counted))
        if n:
            kind = Averages if made._by_sample else Moments
            made.statistics = kind(int(n), rows[0], rows[1])
            made.spread = Spread(rows[2], int(batches), weight, rows[3:])
        return made


def vector_length(layer: NormLayer) -> int:
    """Return the length of the vector that `Pool.to_vector` makes."""
    return _COUNTS + 8 * layer.module.get_buffer("running_mean").numel()


def worst_error(pools: Iterable[Pool]) -> float | None:
    """Return the largest error of any layer that was reached; None before it can be told."""
    errors = [pool.error() for pool in pools if pool.calls]
    if not errors or None in errors:
        return None
    return max((e for e in errors if e is not None), default=math.nan)
