"""What a recalibration reads, how much of it, and to whom it tells how far it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from stillnorm.calibration.pool import Pools
from stillnorm.calibration.progress import OnProgress, Progress
from stillnorm.errors import CalibrationError
from stillnorm.tracing import Forward, each_batch

# Before that many batches a standard error is too uncertain itself to stop at.
LEAST_BATCHES = 8


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
        if self.tolerance is not None and not (
            isinstance(self.tolerance, int | float) and self.tolerance > 0
        ):
            raise CalibrationError(
                f"tolerance={self.tolerance!r}: no number of batches gives that",
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

    def error(self, pools: Pools) -> float | None:
        """Return the largest standard error, if anyone wants to know it."""
        wanted = self.tolerance is not None or self.on_progress is not None
        return pools.error() if wanted else None

    def tell(self, progress: Progress) -> None:
        """Report progress."""
        if self.on_progress is not None:
            self.on_progress(progress)
