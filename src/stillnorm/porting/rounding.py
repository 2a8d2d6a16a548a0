r"""How far two models that compute the same may be apart, by rounding alone.

The torch model is run again as a copy in float64 (a float64 model as one in float32). How far an
output of both is apart, :math:`\rho`, relative to its largest value, is what the depth makes of
rounding; the same sums in another order are off as far. Allowed are

.. math:: \max(10 \rho \, \epsilon / \epsilon_t, \; 64 \epsilon)

where :math:`\epsilon_t` is the precision of the torch model and :math:`\epsilon` the coarser one of
both models. In half precision 10 and 64 are 4 and 4; 0.1 is the most, of the largest output. Of an
output of n < 8 numbers, which may happen to be exact, :math:`\rho` counts 8 / n times.

Measured by benchmarks/port_tolerance.py: Keras' ResNet50, DenseNet121, MobileNetV2, InceptionV3
and VGG16, random and calibrated, on torch and on JAX, are at most :math:`5 \rho` from their torch
twins; a GELU by tanh for one by erf is some :math:`400 \rho` off.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

UNMEASURED = 1e-3  # allowed where there is no such copy; statistics of few values need it anyway
FLOAT32 = torch.finfo(torch.float32).eps
_TF32 = 2.0**-10  # what accelerators multiply float32 in
_TIMES, _FLOOR, _HALF, _MOST = 10, 64, 4, 0.1


def precision(tensors: Iterable[Tensor]) -> float:
    """Return the coarsest precision that a model of these tensors computes in."""
    return max(
        (
            of_dtype(x.dtype, accelerated=x.device.type != "cpu")
            for x in tensors
            if x.is_floating_point()
        ),
        default=FLOAT32,
    )


def of_dtype(dtype: torch.dtype, *, accelerated: bool) -> float:
    """Return the precision of a dtype; of float32 on an accelerator, that of its products."""
    return _TF32 if accelerated and dtype == torch.float32 else torch.finfo(dtype).eps


def allowed(own: float, eps: float, eps_torch: float, beside: float = 1.0) -> float:
    """Return how far off the Keras model may be, where the torch model is `own` off its copy.

    Args:
        own: How far.
        eps: The precision of the coarser model.
        eps_torch: That of the torch model.
        beside: How many times larger the largest output is than this one.

    Example:
        >>> eps = torch.finfo(torch.float32).eps
        >>> [f"{allowed(own, eps, eps):.1e}" for own in (1e-7, 1e-5, 1)]
        ['7.6e-06', '1.0e-04', '1.0e-01']
    """
    times, floor = (_TIMES, _FLOOR) if eps <= FLOAT32 else (_HALF, _HALF)
    # A float64 model was compared with itself in float32.
    return min(max(times * own * eps / max(eps_torch, FLOAT32), floor * eps), _MOST * beside)
