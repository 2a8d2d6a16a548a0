"""Seeing every call of every norm layer while a model runs.

What a forward really used is read from the call that normalises, `F.batch_norm` and its kind, not
from flags: a TorchFunctionMode sees it, whatever class the layer is of. Global module hooks tell
whose call it is; hooks on the model itself would be missed where parts of it are compiled.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from stillnorm.norms import NormalizesBy, NormLayer
from stillnorm.tracing.batches import tensors_in
from stillnorm.tracing.kernels import Kernel, kernel_of
from stillnorm.tracing.mark import Mark
from stillnorm.tracing.measures import Measure, by_samples
from stillnorm.tracing.samples import largest_half, sample_moments
from stillnorm.tracing.site import Site, calling_site
from stillnorm.tracing.visits import visits


@dataclass(frozen=True, eq=False)
class Normalization:
    """One input that a layer normalised.

    Args:
        layer: The layer.
        site: The user's line that called it.
        shape: The input's shape, (N, C, *).
        dtype: The input's dtype.
        used: The statistics that were used.
        moments: The moments of the input, (3, G, C); see `measures`.
        mark: The mark of the output.
        largest: The largest magnitude in a float16 input, (); None for other dtypes.
        masked: Whether a layer of Keras was given a mask: training leaves out what is masked.
    """

    layer: NormLayer
    site: Site | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    used: NormalizesBy
    moments: Tensor
    mark: Mark | None
    largest: Tensor | None = None
    masked: bool = False

    @property
    def samples(self) -> int:
        """The number of samples, N."""
        return self.shape[0]

    @property
    def values(self) -> int:
        """The number of values in each channel."""
        return self.samples * math.prod(self.shape[2:])


@dataclass(frozen=True, eq=False)
class Stray:
    """A call that normalises and is made by none of the model's norm layers.

    Args:
        site: The user's line that called it.
        within: The modules that were running, from the outermost; the last may be a norm layer that
            is not registered in the model.
        layer: The norm layer whose statistics it was given, if any.
        shape: The input's shape, (N, C, *).
        used: The statistics that were used.
    """

    site: Site | None
    within: tuple[nn.Module, ...]
    layer: NormLayer | None
    shape: tuple[int, ...]
    used: NormalizesBy

    @property
    def module(self) -> nn.Module | None:
        """The norm layer that made the call, registered nowhere; None where a function did."""
        last = self.within[-1] if self.within else None
        return last if isinstance(last, _NormBase) else None


@dataclass(eq=False)
class _Visit:
    """A norm layer whose forward is running."""

    layer: NormLayer
    site: Site | None
    normalized: bool = False


class Instrument(TorchFunctionMode):
    """Records what the norm layers of a model normalise, and by which statistics.

    A call of a layer that would update running statistics gets none to update.

    Args:
        layers: The layers to watch.
        by_batch: The layers in train mode for the sake of batch statistics. An input with one
            value per channel, at which torch raises, passes them by their running statistics.
        measure: How to measure what a call normalises.
    """

    def __init__(
        self,
        layers: Collection[NormLayer],
        by_batch: Collection[NormLayer],
        measure: Measure = by_samples,
    ) -> None:
        super().__init__()
        self.seen: list[Normalization] = []
        self.strays: list[Stray] = []
        self.failed: tuple[BaseException | None, NormLayer] | None = None
        self._layers = {layer.module: layer for layer in layers}
        self._by_batch = {layer.module for layer in by_batch}
        self._measure = measure
        self._visits: list[_Visit] = []
        self._running: list[nn.Module] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the block runs."""
        with visits(self._enter, self._leave), self:
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        if (layer := self._layers.get(module)) is not None:
            self._visits.append(_Visit(layer, calling_site()))

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()
        if not self._visits or self._visits[-1].layer.module is not module:
            return
        visit = self._visits.pop()
        if len(rest) == 1:  # the forward raised: torch passes no keyword arguments then
            self.failed = (sys.exception(), visit.layer)
        elif not visit.normalized:  # a foreign frozen layer, or a formula of the user's own
            kwargs, output = rest
            training = module in self._by_batch or visit.layer.called_in_training(kwargs)
            used = visit.layer.normalizes_by(training)
            with torch._C.DisableTorchFunction():  # what we compute is none of the model's
                for x in map(visit.layer.channels_first, tensors_in((args, kwargs))):
                    masked = visit.layer.family == "keras" and kwargs.get("mask") is not None
                    self._record(visit, x, used, sample_moments(x), output, masked)
                    return

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kernel = kernel_of(func, args, kwargs)
        if kernel is None:
            return func(*args, **kwargs)
        if not self._visits:
            self._note_stray(kernel)
            return func(*args, **kwargs)
        visit = self._visits[-1]
        visit.normalized = True
        kernel = self._chosen(kernel, visit.layer)
        output, moments = self._measure(kernel)
        self._record(visit, kernel.input, kernel.used, moments, output)
        return output

    def _note_stray(self, kernel: Kernel) -> None:
        """Note a call of no layer."""
        mean = kernel.arguments.get("running_mean")
        layers = self._layers.values()
        owner = next((x for x in layers if mean is not None and x.running_mean is mean), None)
        shape = tuple(kernel.input.shape)
        self.strays.append(Stray(calling_site(), tuple(self._running), owner, shape, kernel.used))

    def _chosen(self, kernel: Kernel, layer: NormLayer) -> Kernel:
        """Return the call to make in place of `kernel`: one that updates nothing."""
        by_batch = layer.module in self._by_batch
        if kernel.used == "running" and not (by_batch and _syncs(layer) and kernel.values > 1):
            return kernel
        mean, var = layer.running_mean, layer.running_var
        if kernel.values < 2 and by_batch and mean is not None and var is not None:
            return kernel.by_running(*_usable(mean, var))
        return kernel.by_input()

    def _record(
        self,
        visit: _Visit,
        x: Tensor,
        used: NormalizesBy,
        moments: Tensor,
        output: object,
        masked: bool = False,
    ) -> None:
        mark = next((Mark.of(y) for y in tensors_in(output)), None)
        shape = tuple(x.shape)
        largest = largest_half(x)
        self.seen.append(
            Normalization(
                visit.layer, visit.site, shape, x.dtype, used, moments, mark, largest, masked
            )
        )


def _syncs(layer: NormLayer) -> bool:
    """Tell whether the layer would wait for other ranks in train mode, where it is not put."""
    return isinstance(layer.module, nn.SyncBatchNorm)


def _usable(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return running statistics with a fresh layer's 0 and 1 in broken channels."""
    sound = mean.isfinite() & var.isfinite() & (var > 0)
    return mean.where(sound, 0), var.where(sound, 1)
