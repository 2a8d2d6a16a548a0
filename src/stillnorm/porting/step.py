"""One forward in train mode on either side, and what it makes of the running statistics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from stillnorm.norms import write
from stillnorm.norms.adapters.keras import complement
from stillnorm.porting.keras.parts import KerasPart
from stillnorm.porting.matching import Pair
from stillnorm.porting.torch_layers import TorchPart
from stillnorm.tracing import call_example, tensors_in

Moments = tuple[Tensor, Tensor]

_STATISTICS = ("running_mean", "running_var")
_SQUARES = 1e-3


def forward_in_training(model: nn.Module, given: object) -> str:
    """Run a torch model in train mode, nothing dropped; return why that says nothing."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    before = _random_state()
    try:
        call_example(model, given)
    except (ValueError, RuntimeError) as error:  # one value in each channel; inference tensors
        return f"in train mode the torch model does not take the example: {error}"
    if not all(map(torch.equal, before, _random_state())):  # a functional dropout, a dropped path
        return "the torch model is random in train mode, dropout layers off"
    return ""


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def learns(one: KerasPart, twin: TorchPart) -> bool:
    """Tell whether both norms update their statistics in train mode."""
    return one.updates and twin.norm is not None and twin.norm.updates_statistics(training=True)


def start_from_zero(twin: TorchPart, one: KerasPart | None = None) -> None:
    """Let the statistics of a norm that learns be what one batch adds, and nothing besides."""
    for name in _STATISTICS:
        tensor = twin.tensors()[name]
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
        write(tensor, zeros)
        if one is not None:
            one.write(name, zeros)


@contextmanager
def counted(norms: Sequence[Pair]) -> Iterator[dict[nn.Module, list[int]]]:
    """Count the values in each channel of what the norms receive, per call; in order of calls."""
    counts: dict[nn.Module, list[int]] = defaultdict(list)

    def count(module: nn.Module, args: Any, output: object) -> None:
        for x in tensors_in(args):
            counts[module].append(x.numel() // x.shape[1])
            break

    handles = [twin.module.register_forward_hook(count) for _, twin in norms]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def expected(
    one: KerasPart, twin: TorchPart, there: Moments, here: Moments, calls: list[int]
) -> tuple[int | None, Moments]:
    """Return n, and what the statistics should be after what Keras made of its own."""
    if not one.updates or not calls:
        return None, here
    _, var = moments(twin.tensors().get)
    mean_there, var_there = moments(one.read)
    n, most = min(calls), max(calls)
    kept = (1 - complement(one.layer.momentum)) ** len(calls)
    added = var_there - kept * there[1]
    # Several calls may have several n: the variance is between what they would make of it.
    bounds = [kept * here[1] + added * (k / max(k - 1, 1)) for k in (most, n)]
    return n, (kept * here[0] + (mean_there - kept * there[0]), var.clamp(*bounds))


def moments(get: Callable[[str], Tensor | None]) -> Moments:
    """Return copies of mean and variance in float64."""
    mean, var = (_double(get(name)) for name in _STATISTICS)
    return mean, var


def _double(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("a norm without statistics")  # callers ask for those that have some
    return tensor.detach().cpu().double().clone()


def relative(here: Moments, right: Moments) -> tuple[float, float]:
    """Return how far mean and variance are off, relative to the largest of the layer."""
    (mean, var), (right_mean, right_var) = here, right
    largest_mean, largest_var = magnitude(right_mean), magnitude(right_var)
    # Keras takes the mean of squares less the square of the mean: that rounds by the latter.
    scale = max(largest_var, _SQUARES * largest_mean**2)
    return (
        _share(magnitude(mean - right_mean), max(largest_mean, largest_var**0.5)),
        _share(magnitude(var - right_var), scale),
    )


def _share(off: float, largest: float) -> float:
    return off / (largest or 1.0) if math.isfinite(off) else off


def magnitude(values: Tensor) -> float:
    """Return the largest magnitude; infinity where there is NaN."""
    largest = values.abs().max().item() if values.numel() else 0.0
    return largest if largest == largest else float("inf")
