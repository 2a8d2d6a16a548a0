r"""Measuring what a call normalises: sample by sample, or the batch as a whole.

A measure makes the call and returns its output and the moments of its input: m, r and var of
`samples`, stacked, (3, G, C), for G groups of values.

The batch as a whole is one group, measured by the same algorithm: around its own mean, so that
nothing cancels, whatever \|mean\| / sigma is and however the values are sorted. A call that would
normalise by the batch is then given these moments: to compute its own costs it as much again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stillnorm.tracing.kernels import Kernel
from stillnorm.tracing.samples import batch_moments, sample_moments

Measure = Callable[[Kernel], tuple[Any, Tensor]]


def by_samples(kernel: Kernel) -> tuple[Any, Tensor]:
    """Make the call and return its output and the moments of each sample, (3, N, C)."""
    moments = sample_moments(kernel.input)
    return kernel(), moments


def by_whole_batch(kernel: Kernel) -> tuple[Any, Tensor]:
    """Make the call and return its output and the moments of the batch, (3, 1, C).

    Instance norm is measured by samples. The output is that of the call itself up to rounding.
    """
    if kernel.statistics != "batch" or kernel.input.numel() == 0:
        return by_samples(kernel)
    moments = batch_moments(kernel.input)
    returns_statistics = kernel.function is torch.native_batch_norm
    if kernel.used == "batch" and kernel.values > 1 and not returns_statistics:
        kernel = _given(kernel, moments)
    return kernel(), moments


def _given(kernel: Kernel, moments: Tensor) -> Kernel:
    """Return the call normalising by the moments, in their precision."""
    mean, var = moments[0, 0] + moments[1, 0], moments[2, 0]
    affine = {
        name: given.to(mean.dtype)
        for name in ("weight", "bias")
        if (given := kernel.arguments.get(name)) is not None and given.dtype != mean.dtype
    }
    if affine:
        kernel = Kernel(kernel.function, {**kernel.arguments, **affine}, kernel.statistics)
    return kernel.by_running(mean, var)
