"""What a recalibration tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillnorm.reports.numbers import count, short


@dataclass(frozen=True)
class Progress:
    """How far a recalibration is, after a batch.

    Args:
        batches: The number of batches run, of this process; each time a batch is run again for
            further layers counts.
        samples: The number of samples in them.
        settled: The number of layers whose statistics are final; 0 until all are where the method
            is "pooled".
        layers: The number of layers being recalibrated.
        error: The largest standard error of any layer, as in the report; None as long as it cannot
            be told.
    """

    batches: int
    samples: int
    settled: int
    layers: int
    error: float | None

    def __str__(self) -> str:
        parts = [count(self.batches, "batch"), count(self.samples, "sample")]
        if self.settled:
            parts.append(f"{self.settled} of {count(self.layers, 'layer')}")
        if self.error is not None:
            parts.append(f"standard error {short(self.error)}")
        return ", ".join(parts)


OnProgress = Callable[[Progress], object]
