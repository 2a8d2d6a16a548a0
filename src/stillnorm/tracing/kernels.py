"""The calls that normalise: `F.batch_norm` and its kind, with their arguments by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillnorm.norms import NormalizesBy

_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_INSTANCE = (*_BATCH[:5], "use_input_stats", *_BATCH[6:])
_ATEN_BATCH = ("input", "weight", "bias", "running_mean", "running_var", *_BATCH[5:])
_ATEN_INSTANCE = (*_ATEN_BATCH[:5], *_INSTANCE[5:])

_BY_BATCH: dict[object, tuple[str, ...]] = {
    F.batch_norm: _BATCH,
    torch.batch_norm: (*_ATEN_BATCH, "cudnn_enabled"),
    torch.native_batch_norm: _ATEN_BATCH,
}
_UNSEEN = 1e-12
_BY_SAMPLE: dict[object, tuple[str, ...]] = {
    F.instance_norm: _INSTANCE,
    torch.instance_norm: (*_ATEN_INSTANCE, "cudnn_enabled"),
}


@dataclass(frozen=True)
class Kernel:
    """One call of a function that normalises, not yet made.

    Args:
        function: The function.
        arguments: All its arguments by name.
        statistics: Which statistics it uses when it does not use the running ones.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    statistics: NormalizesBy

    @property
    def _switch(self) -> str:
        return "training" if self.statistics == "batch" else "use_input_stats"

    @property
    def input(self) -> Tensor:
        """What is normalised, (N, C, *)."""
        tensor: Tensor = self.arguments["input"]
        return tensor

    @property
    def used(self) -> NormalizesBy:
        """What the call normalises by."""
        by_input = self.arguments.get(self._switch, self.statistics == "sample")
        return self.statistics if by_input else "running"

    @property
    def values(self) -> int:
        """The number of values behind one mean when it normalises by its input."""
        n, c = self.input.shape[:2]
        return self.input.numel() // max(1, c if self.statistics == "batch" else n * c)

    def by_input(self, mean: Tensor | None = None, var: Tensor | None = None) -> Kernel:
        """Return the call normalising by its input; `mean` and `var` receive the statistics.

        torch allows an eps of 0 with running statistics only: it becomes too small to be seen.
        """
        kernel = self._with(True, mean, var)
        if kernel.arguments.get("eps") == 0:
            return Kernel(self.function, {**kernel.arguments, "eps": _UNSEEN}, self.statistics)
        return kernel

    def by_running(self, mean: Tensor, var: Tensor) -> Kernel:
        """Return the call normalising by the given statistics."""
        return self._with(False, mean, var)

    def _with(self, by_input: bool, mean: Tensor | None, var: Tensor | None) -> Kernel:
        changed = {
            self._switch: by_input,
            "running_mean": mean,
            "running_var": var,
            "momentum": 1.0,
        }
        return Kernel(self.function, {**self.arguments, **changed}, self.statistics)

    def __call__(self) -> Any:
        """Make the call."""
        return self.function(**self.arguments)


def kernel_of(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kernel | None:
    """Return the call if its function is one that normalises, else None."""
    if (names := _BY_BATCH.get(function)) is not None:
        return Kernel(function, {**dict(zip(names, args, strict=False)), **kwargs}, "batch")
    if (names := _BY_SAMPLE.get(function)) is not None:
        return Kernel(function, {**dict(zip(names, args, strict=False)), **kwargs}, "sample")
    return None
