"""What layers have received so far: their statistics, and how well these are known.

The channels of all layers stand after each other in one set of tensors: a batch is added, and what
another rank has received is merged, with one operation for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillnorm.calibration.moments import Moments, average, pool
from stillnorm.calibration.spread import Spread
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer
from stillnorm.tracing import Normalization, read


@dataclass(frozen=True, eq=False)
class Pool:
    """What one layer has received.

    Args:
        layer: The layer.
        moments: The moments of all of it.
        spread: How far the batches lie apart.
        samples: The number of samples.
        calls: The number of times that the layer was called.
        counted: Its `num_batches_tracked` before; 0 where it has none.
        repeats: The number of batches in which it was called more than once.
    """

    layer: NormLayer
    moments: Moments
    spread: Spread
    samples: int
    calls: int
    counted: int
    repeats: int

    @classmethod
    def empty(cls, layer: NormLayer) -> Pool:
        """Return the pool of a layer that has received nothing."""
        return next(iter(Pools([layer])))

    @property
    def count(self) -> int:
        """The number of values, or of samples of an instance norm, in each channel."""
        return int(self.moments.n.max()) if self.moments.n.numel() else 0

    @property
    def is_shared(self) -> bool:
        """Whether the layer was called more than once in a forward."""
        return self.repeats > 0

    def estimate(self) -> Moments | None:
        """Return the moments if there are values enough for a variance."""
        return self.moments if self.calls and self.moments.has_variance else None

    def standard_errors(self) -> tuple[Tensor, Tensor] | None:
        """Return the standard errors of mean and variance, (C,) each; None of a single batch."""
        if not (self.spread.batches > 1).all():
            return None
        return self.spread.standard_errors(self.moments)

    def error(self) -> float | None:
        """Return how far the statistics may be off; None where one batch alone reached the layer.

        The larger of two standard errors, each the root mean square over the channels: of the mean,
        in deviations of what the layer receives; of the variance, relative to it.
        """
        if (errors := self.standard_errors()) is None:
            return None
        scale = self.moments.biased_variance() + self.layer.eps
        of_mean = (errors[0].square() / scale).mean().sqrt()
        of_var = (errors[1] / scale).square().mean().sqrt()
        return float(torch.maximum(of_mean, of_var))


class Pools:
    """What several layers have received.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[NormLayer]) -> None:
        self.layers = layers
        self.samples = [0] * len(layers)
        self.calls = [0] * len(layers)
        self.counted = [_tracked(layer) for layer in layers]
        self.repeats = [0] * len(layers)
        self._sizes = [layer.tensors()["running_mean"].numel() for layer in layers]
        between = [float(layer.family != "instance") for layer in layers]
        self._between = torch.tensor(between, dtype=torch.float64).repeat_interleave(
            torch.tensor(self._sizes, dtype=torch.long)
        )
        self._index = {layer.module: i for i, layer in enumerate(layers)}
        self._moments = Moments.none(self._between)
        self._spread = Spread.none(len(self._between))

    def __iter__(self) -> Iterator[Pool]:
        """Yield what each layer has received."""
        yield from map(
            Pool,
            self.layers,
            self._moments.split(self._sizes),
            self._spread.split(self._sizes),
            self.samples,
            self.calls,
            self.counted,
            self.repeats,
        )

    def __contains__(self, module: nn.Module) -> bool:
        """Tell whether a module is one of the layers."""
        return module in self._index

    def take(self, seen: Sequence[Normalization], batch: int) -> None:
        """Add what the layers received in one batch.

        Raises:
            CalibrationError: A layer received NaN or infinity, or in Keras a mask.
        """
        received = [one for one in seen if one.layer.module in self]
        for one in received:
            if one.masked:
                raise CalibrationError(
                    f"batch {batch}: {one.layer.path} is given a mask, and training leaves out "
                    "what is masked",
                    help="select the other layers with layers=; nothing was changed",
                )
        found: dict[int, Moments] = {}
        before = list(self.calls)
        for one, (mean, var) in zip(received, _read(received, batch), strict=True):
            i = self._index[one.layer.module]
            self.calls[i] += 1
            self.samples[i] += one.samples
            convention, least = (average, 2) if one.layer.family == "instance" else (pool, 1)
            if one.values >= least * len(mean) > 0:
                # Instance norm has no variance for samples of one position.
                new = convention(mean, var, one.values)
                found[i] = found[i].merge(new) if i in found else new
        for i, calls in enumerate(before):
            self.repeats[i] += self.calls[i] > calls + 1
        nothing = Moments.none(self._between).split(self._sizes)
        parts = [found.get(i, none) for i, none in enumerate(nothing)]
        of_batch = Moments.joined(parts)
        self._spread = self._spread.add(of_batch)
        self._moments = self._moments.merge(of_batch)

    def merge(self, other: Pools) -> None:
        """Add what the same layers received on another rank."""
        self.samples = [a + b for a, b in zip(self.samples, other.samples, strict=True)]
        self.calls = [a + b for a, b in zip(self.calls, other.calls, strict=True)]
        self.repeats = [a + b for a, b in zip(self.repeats, other.repeats, strict=True)]
        self._spread = self._spread.merge(other._spread, self._between)
        self._moments = self._moments.merge(other._moments)

    def error(self) -> float | None:
        """Return the largest error of a layer that was reached; None before it can be told."""
        errors = [one.error() for one in self if one.calls]
        known = [error for error in errors if error is not None]
        return max(known) if known and len(known) == len(errors) else None

    # ------------------------------------------------------------------ as numbers

    def to_vector(self) -> Tensor:
        """Return all of it as one vector, float64, of a length that the layers alone decide."""
        counts = torch.tensor(
            [*self.samples, *self.calls, *self.counted, *self.repeats], dtype=torch.float64
        )
        moments, spread = self._moments, self._spread
        rows = (moments.n, moments.mean, moments.m, spread.origin, spread.batches, *spread.sums)
        return torch.cat((counts, *rows))

    @property
    def length(self) -> int:
        """The length of that vector."""
        return 4 * len(self.layers) + 11 * len(self._between)

    @classmethod
    def of_vector(cls, layers: Sequence[NormLayer], vector: Tensor) -> Pools:
        """Return what `to_vector` made a vector of."""
        made, k = cls(layers), len(layers)
        counts = vector[: 4 * k].long().reshape(4, k).tolist()
        made.samples, made.calls, made.counted, made.repeats = counts
        n, mean, m, origin, batches, *sums = vector[4 * k :].reshape(11, -1)
        made._moments = Moments(n, mean, m, made._between)
        made._spread = Spread(origin, batches, torch.stack(sums))
        return made


def statistics_of(layer: NormLayer, moments: Moments) -> dict[str, Tensor]:
    """Return moments as the layer keeps them, by name: Keras keeps the biased variance."""
    is_keras = layer.family == "keras"
    var = moments.biased_variance() if is_keras else moments.variance()
    return {"running_mean": moments.mean, "running_var": var}


def _tracked(layer: NormLayer) -> int:
    """Return how many batches the layer has counted; 0 for what can only be unwritten memory."""
    counted = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    return counted if 0 <= counted < 10**9 else 0


def _read(received: Sequence[Normalization], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mean and variance of each group, (G, C): of all layers in one go, for each waits."""
    if not received:
        return
    shapes = [one.moments.shape[1:] for one in received]
    mean, var = read(torch.cat([one.moments.flatten(1) for one in received], 1))
    if not (mean.isfinite() & var.isfinite()).all():
        for one in received:
            _refuse_non_finite(one, batch)
    sizes = [groups * channels for groups, channels in shapes]
    parts = zip(torch.split(mean, sizes), torch.split(var, sizes), shapes, strict=True)
    for part_mean, part_var, shape in parts:
        yield part_mean.view(shape), part_var.view(shape)


def _refuse_non_finite(received: Normalization, batch: int) -> None:
    """Raise when a channel of what the layer received has no finite mean and variance."""
    mean, var = read(received.moments)
    broken = ~(mean.isfinite() & var.isfinite()).all(0)  # (C,)
    if broken.any():
        channels = broken.nonzero().flatten().tolist()
        raise CalibrationError(
            f"batch {batch}: {received.layer.path} receives NaN, infinity or values too large to "
            f"square, in {len(channels)} of {len(broken)} channels, first channel {channels[0]}",
            help="look at that batch, and at the layers before; nothing was changed",
        )
