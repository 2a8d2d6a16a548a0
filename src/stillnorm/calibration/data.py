"""What a recalibration reads, how much of it, and to whom it tells how far it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from stillnorm.calibration.pool import Pool, worst_error
from stillnorm.calibration.progress import OnProgress, Progress
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer
from stillnorm.tracing import Forward, Normalization, each_batch, read

# Before that many batches a standard error is too uncertain itself to stop at.
LEAST_BATCHES = 8

Pools = dict[nn.Module, Pool]


@dataclass(frozen=True, eq=False)
class Data:
    """What is read, and how it is run.

    Args:
        batches: As in `recalibrate`.
        forward: As in `recalibrate`.
        max_batches: The number of batches after which to stop; None for no limit.
        tolerance: The error at which to stop; None for no such limit.
        on_progress: Called after every batch.
    """

    batches: object
    forward: Forward | None = None
    max_batches: int | None = None
    tolerance: float | None = None
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        if self.max_batches is not None and self.max_batches < 1:
            raise CalibrationError(
                f"max_batches={self.max_batches}: there is nothing to estimate from",
                help="None takes all batches",
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise CalibrationError(
                f"tolerance={self.tolerance}: no number of batches gives that",
                help="0.01 is one percent of a deviation; None takes all batches",
            )

    def each(self) -> Iterator[object]:
        """Yield the batches, and read no further than it is allowed."""
        return islice(each_batch(self.batches), self.max_batches)

    def is_enough(self, batches: int, error: float | None, ranks: int) -> bool:
        """Tell whether to stop after so many batches, given the largest standard error.

        Each of several ranks stops for itself; the error of all together is smaller by the root of
        their number.
        """
        if self.tolerance is None or error is None or batches < LEAST_BATCHES:
            return False
        return error <= self.tolerance * math.sqrt(ranks)

    def error(self, pools: Iterable[Pool]) -> float | None:
        """Return the largest standard error, if anyone wants to know it."""
        wanted = self.tolerance is not None or self.on_progress is not None
        return worst_error(pools) if wanted else None

    def tell(self, progress: Progress) -> None:
        """Report progress."""
        if self.on_progress is not None:
            self.on_progress(progress)


def pools_of(layers: Sequence[NormLayer]) -> Pools:
    """Return empty pools."""
    return {layer.module: Pool(layer) for layer in layers}


def take(pools: Pools, seen: Sequence[Normalization], batch: int) -> None:
    """Add what the layers received in one batch.

    Raises:
        CalibrationError: A layer received NaN or infinity.
    """
    received = [one for one in seen if one.layer.module in pools]
    for one, (mean, var) in zip(received, _read(received, batch), strict=True):
        pools[one.layer.module].add(one, mean, var)
    for pool in pools.values():
        pool.end_batch()


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
