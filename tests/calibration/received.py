"""The oracle: what each norm layer received, recorded by plain hooks, pooled in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from support.oracles import pooled_moments
from support.tolerances import STATISTICS_RTOL

Received = dict[nn.Module, list[Tensor]]


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[Received]:
    """Record the inputs of every norm layer inside the block."""
    received: Received = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        received.setdefault(module, []).append(x.detach().clone())

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, _NormBase)
    ]
    yield received
    for handle in handles:
        handle.remove()


def assert_statistics(layer: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Assert promise 8: the mean to the buffer's own rounding, the variance to 1e-6."""
    eps = torch.finfo(layer.running_mean.dtype).eps
    error = (layer.running_mean.double() - mean).abs()
    assert (error <= eps * mean.abs() + STATISTICS_RTOL * var.sqrt()).all(), error.max()
    error = (layer.running_var.double() - var).abs() / var.clamp_min(torch.finfo().tiny)
    assert (error <= max(STATISTICS_RTOL, eps)).all(), error.max()


def assert_exact(received: Received) -> None:
    """Assert that every layer that received anything has the pooled moments of it."""
    assert received
    for layer, inputs in received.items():
        assert_statistics(layer, *pooled_moments(inputs))
