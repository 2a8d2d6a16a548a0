"""One instrumented look at a model on data: which norm is called, where, on what, in which mode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillnorm.errors import StateError
from stillnorm.norms import NormalizesBy, NormLayer
from stillnorm.tracing.batches import each_batch, tensors_in
from stillnorm.tracing.calling import Forward
from stillnorm.tracing.flow import Flow, running
from stillnorm.tracing.instrument import Normalization, Stray
from stillnorm.tracing.mark import Mark
from stillnorm.tracing.samples import read
from stillnorm.tracing.site import Site


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one norm layer.

    Args:
        path: The layer's path.
        occurrence: Which call of this layer it is within its forward, from 0.
        order: Which of all norm calls it is within its forward, from 0.
        batch: Which batch it belongs to, from 0.
        site: The user's line that called the layer, if any.
        shape: The input's shape, (N, C, *).
        dtype: The input's dtype.
        used: The statistics that the forward really used.
        sample_mean: The mean over the positions of each sample, (N, C), float64.
        sample_var: The biased variance over them, (N, C), float64.
        is_output: Whether the layer's output, or an unmodified view of it, is in the model's.
        largest: The largest magnitude in a float16 input, NaN where there is one; None for other
            dtypes and for no values.
        masked: Whether a layer of Keras was given a mask.
    """

    path: str
    occurrence: int
    order: int
    batch: int
    site: Site | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    used: NormalizesBy
    sample_mean: Tensor
    sample_var: Tensor
    is_output: bool
    largest: float | None = None
    masked: bool = False

    @property
    def samples(self) -> int:
        """The number of samples, N."""
        return self.shape[0]

    @property
    def positions(self) -> int:
        """The number of positions in each sample."""
        return math.prod(self.shape[2:])

    @property
    def values(self) -> int:
        """The number of values in each channel."""
        return self.samples * self.positions


@dataclass(frozen=True, eq=False)
class Trace:
    """What the norm layers of a model did on some batches.

    Args:
        calls: Every call, in order.
        reached: The paths of the layers that were called.
        unreached: The paths of those that were not, in registration order.
        batches: The number of batches.
        seconds: The time it took.
        strays: Calls in the first batch that normalise and belong to no layer of the model.
    """

    calls: tuple[Call, ...]
    reached: frozenset[str]
    unreached: tuple[str, ...]
    batches: int
    seconds: float
    strays: tuple[Stray, ...] = ()

    def by_layer(self, path: str) -> tuple[Call, ...]:
        """Return the calls of one layer, in order."""
        return tuple(call for call in self.calls if call.path == path)

    def sites(self, path: str) -> tuple[tuple[Call, ...], ...]:
        """Return the calls of one layer grouped by their occurrence within a forward."""
        calls = self.by_layer(path)
        occurrences = 1 + max((call.occurrence for call in calls), default=-1)
        return tuple(
            tuple(call for call in calls if call.occurrence == i) for i in range(occurrences)
        )


def trace(
    model: nn.Module,
    batches: object,
    *,
    forward: Forward | None = None,
    flow: Flow = "eval",
    on_output: Callable[[object, object], object] | None = None,
) -> Trace:
    """Run a model on batches and record every call of its norm layers.

    Args:
        model: The model.
        batches: The batches; see `each_batch`.
        forward: ``(model, batch) -> output``, where the model cannot be called on a batch itself.
        flow: "eval": the whole model in eval mode. "batch": the same, but norms that nothing holds
            normalise as in train mode. "as_is": the model's present modes.
        on_output: Called with ``(output, batch)`` after each batch.

    Returns:
        The calls.

    Raises:
        BatchError: A batch does not fit, or the forward raised.
        StateError: The model has lazy modules, or TorchScript's norm layers.

    Mutates:
        Nothing: modes, statistics, hooks, gradients and random states are as found, also after an
        exception.

    Cost:
        One forward per batch; about half a train-mode batch norm more per norm; (N, C) float64
        kept per call.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> trace(net, torch.randn(2, 3, 8, 8)).calls[0].used
        'running'
    """
    begun = time.perf_counter()
    calls: list[Call] = []
    strays: tuple[Stray, ...] = ()
    with running(model, forward=forward, flow=flow) as run:
        _refuse_scripted(run.norms)
        for batch in each_batch(batches):
            index = run.batches
            output, seen = run(batch)
            if index == 0:
                strays = tuple(run.strays)
            calls += _calls(seen, output, index)
            if on_output is not None:
                on_output(output, batch)
        paths = [layer.path for layer in run.norms]
        count = run.batches
    reached = frozenset(call.path for call in calls)
    unreached = tuple(path for path in paths if path not in reached)
    seconds = time.perf_counter() - begun
    return Trace(tuple(calls), reached, unreached, count, seconds, strays)


def _refuse_scripted(norms: Collection[NormLayer]) -> None:
    for layer in norms:
        if layer.is_scripted:
            raise StateError(
                f"{layer.path} is TorchScript's: what it is called with cannot be seen",
                help="use the Python model, before torch.jit.script",
            )


def _calls(seen: list[Normalization], output: object, batch: int) -> list[Call]:
    """Number what was seen in one forward and compare it with what came out."""
    outputs = {Mark.of(tensor) for tensor in tensors_in(output)} - {None}
    times: dict[str, int] = {}
    calls = []
    for order, one in enumerate(seen):
        path = one.layer.path
        occurrence = times[path] = times.get(path, -1) + 1
        mean, var = read(one.moments)
        calls.append(
            Call(
                path,
                occurrence,
                order,
                batch,
                one.site,
                one.shape,
                one.dtype,
                one.used,
                mean,
                var,
                one.mark in outputs,
                None if one.largest is None else float(one.largest),
                one.masked,
            )
        )
    return calls
