"""The pooled pass: the moments of everything that each layer receives, in one go over the batches.

The layers being recalibrated normalise by the batch, as they did in training; the rest of the model
is in eval mode. What they receive is measured and kept here: no buffer of the model is touched.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from stillnorm.calibration.moments import Statistics, average, pool
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer
from stillnorm.tracing import (
    Forward,
    Normalization,
    by_kernel,
    each_batch,
    read,
    running,
    train_by_input,
)


@dataclass
class Pool:
    """What one layer has received.

    Args:
        statistics: The statistics of all of it; None before there are any values.
        samples: The number of samples.
        calls: The number of times that the layer was called.
    """

    statistics: Statistics | None = None
    samples: int = 0
    calls: int = 0

    def estimate(self) -> Statistics | None:
        """Return the statistics if there are values enough for a variance."""
        ready = self.statistics is not None and self.statistics.has_variance
        return self.statistics if ready else None

    def add(self, received: Normalization, mean: Tensor, var: Tensor) -> None:
        """Add one input, given the mean and biased variance of groups of its values, (G, C)."""
        self.calls += 1
        self.samples += received.samples
        convention, least = (average, 2) if received.layer.family == "instance" else (pool, 1)
        if received.values < least * len(mean) or not len(mean):
            return  # instance norm has no variance for samples of one position
        new = convention(mean, var, received.values)
        self.statistics = new if self.statistics is None else self.statistics.merge(new)


@dataclass(frozen=True)
class Pass:
    """What one pass over the batches has gathered.

    Args:
        pools: By layer; empty for a layer that was not reached.
        batches: The number of batches.
        samples: The number of samples in them, as the first norm of each forward counts them.
    """

    pools: dict[NormLayer, Pool]
    batches: int
    samples: int


def pooled_pass(
    model: nn.Module, layers: Collection[NormLayer], batches: object, forward: Forward | None
) -> Pass:
    """Run the model over the batches once and gather what each of `layers` receives.

    Raises:
        CalibrationError: There is no batch, or a layer receives NaN or infinity.
        BatchError: A batch does not fit, or the forward raised.
    """
    pools = {layer: Pool() for layer in layers}
    pool_of = {layer.module: pool for layer, pool in pools.items()}
    by_batch = train_by_input(model, layers)
    samples = 0
    with running(model, forward=forward, flow="batch", by_batch=by_batch, measure=by_kernel) as run:
        for index, batch in enumerate(each_batch(batches)):
            _, seen = run(batch)
            samples += seen[0].samples if seen else 0
            for received in seen:
                if received.layer.module in pool_of:
                    mean, var = read(received.moments)
                    _refuse_non_finite(received.layer, index, mean, var)
                    pool_of[received.layer.module].add(received, mean, var)
    if run.batches == 0:
        raise CalibrationError(
            "there is no batch in batches=",
            help="an iterator can be read only once: give the DataLoader or the list itself",
        )
    return Pass(pools, run.batches, samples)


def _refuse_non_finite(layer: NormLayer, batch: int, mean: Tensor, var: Tensor) -> None:
    """Raise when a channel of what the layer received has no finite mean and variance."""
    broken = ~(mean.isfinite() & var.isfinite()).all(0)  # (C,)
    if broken.any():
        channels = broken.nonzero().flatten().tolist()
        raise CalibrationError(
            f"batch {batch}: {layer.path} receives NaN, infinity or values too large to square, "
            f"in {len(channels)} of {len(broken)} channels, first channel {channels[0]}",
            help="look at that batch, and at the layers before; nothing was changed",
        )
