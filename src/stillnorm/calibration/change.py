"""New running statistics for one layer, in the dtype of its buffers, not yet written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stillnorm.calibration.moments import Moments
from stillnorm.calibration.pool import Pool, statistics_of
from stillnorm.calibration.report import Recalibrated, mean_moved, var_ratio
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer


@dataclass(frozen=True, eq=False)
class Change:
    """What is to change in one layer.

    Args:
        pool: What the layer received.
        before: Its statistics by name, copied.
        after: The same with new values, in the dtype and on the device of the buffers.
    """

    pool: Pool
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @property
    def layer(self) -> NormLayer:
        """The layer."""
        return self.pool.layer

    @classmethod
    def of(cls, pool: Pool, moments: Moments) -> Change:
        """Prepare the change of a layer to new statistics, from what it received.

        Raises:
            CalibrationError: The statistics do not fit the dtype of the buffers.
        """
        layer = pool.layer
        new = statistics_of(layer, moments)
        tracked = layer.num_batches_tracked
        if layer.family == "batch" and tracked is not None:
            # torch's instance norm never counts.
            new["num_batches_tracked"] = tracked.new_tensor(pool.counted + pool.calls)
        before = {name: layer.tensors()[name].detach().clone() for name in new}
        after = {name: value.to(before[name]) for name, value in new.items()}
        for name, value in after.items():
            if not value.isfinite().all():
                raise CalibrationError(
                    f"{layer.path}: its {name} of {new[name].abs().max():.3g} does not fit "
                    f"{str(value.dtype).removeprefix('torch.')}",
                    help="keep norm layers in float32; nothing was changed",
                )
        return cls(pool, before, after)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors to write, each with its new value."""
        return [(self.layer.tensors()[name], value) for name, value in self.after.items()]

    def reported(self) -> Recalibrated:
        """Return the change as the report has it."""
        mean = self.before["running_mean"], self.after["running_mean"]
        var = self.before["running_var"], self.after["running_var"]
        eps = self.layer.eps
        errors = self.pool.standard_errors()
        return Recalibrated(
            path=self.layer.path,
            paths=self.layer.paths,
            samples=self.pool.samples,
            count=self.pool.count,
            mean_before=mean[0],
            mean_after=mean[1],
            var_before=var[0],
            var_after=var[1],
            eps=eps,
            mean_moved=mean_moved(*mean, var[1], eps),
            var_ratio=var_ratio(*var, eps),
            mean_error=None if errors is None else errors[0],
            var_error=None if errors is None else errors[1],
            standard_error=self.pool.error(),
        )
