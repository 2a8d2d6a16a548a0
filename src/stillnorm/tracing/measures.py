r"""Measuring what a call normalises: sample by sample, or at no cost from the call itself.

A measure makes the call and returns its output and the moments of its input: m, r and var of
`samples`, stacked, (3, G, C), for G groups of values; the groups are the samples, or all values are
one group.

A norm that normalises by the batch computes the batch's mean and variance anyway, and with momentum
1 leaves them in its buffers. They serve where the kernel sums in double precision. What remains is
the rounding of the mean to float32, which is harmless where the mean is not large: with batch b
contributing n_b values, mean μ + δ_b, deviation σ_b and \|μ + δ_b\| <= T σ_b, the error of the
pooled sum of squares M is at most

    2 Σ n_b δ_b T σ_b 2^-24  <=  T 2^-24 Σ n_b (δ_b² + σ_b²)  =  T 2^-24 M

With T = 8 that is 5e-7, half of what recalibration promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stillnorm.tracing.kernels import Kernel
from stillnorm.tracing.samples import sample_moments

Measure = Callable[[Kernel], tuple[Any, Tensor]]

_T = 8.0


def by_samples(kernel: Kernel) -> tuple[Any, Tensor]:
    """Make the call and return its output and the moments of each sample, (3, N, C)."""
    moments = sample_moments(kernel.input)
    return kernel(), moments


def by_kernel(kernel: Kernel) -> tuple[Any, Tensor]:
    """Make the call and return its output and the moments of as few groups as are exact.

    Of rows (N, C) all values are one group, and of what the kernel itself sums exactly.
    """
    x = kernel.input
    if kernel.statistics == "batch" and x.numel() == x.shape[0] * x.shape[1] > 0:
        moments = sample_moments(x.reshape(x.shape[:2]).T.unsqueeze(0))  # (1, C, N)
        return kernel(), moments
    if kernel.used != "batch" or kernel.values == 0 or not _sums_in_double(x):
        return by_samples(kernel)
    mean, var = x.new_zeros(2, x.shape[1])
    output = kernel.by_input(mean, var)()
    biased = var.double() * ((kernel.values - 1) / kernel.values)
    if (mean.square() > _T**2 * biased).any():
        return output, sample_moments(x)
    moments = torch.stack((mean.double(), torch.zeros_like(biased), biased))
    return output, moments.unsqueeze(1)


def _sums_in_double(x: Tensor) -> bool:
    """Tell whether torch's kernel for maps such as x sums in double precision.

    On the CPU that is the one for contiguous maps. The one for channels_last (and the one for rows)
    adds up plainly in float32: 1.5e-4 off at 400 000 values (torch 2.13).
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
