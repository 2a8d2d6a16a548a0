r"""Scaling the output channels of a convolution by scaling its weight.

    z = conv(x, W) + b
    y = (z - mean) * s + beta  =  conv(x, W * s) + (b - mean) * s + beta

    with  s = gamma / sqrt(var + eps), one value per output channel.

A linear layer has no geometry: its output channels are the rows of its weight, as of an ungrouped
convolution without positions.

Source: Jacob et al., arXiv 1712.05877, section 3.2; You et al., arXiv 2305.11624, for the gradients
through the folded weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillnorm.convolutions.geometry import Geometry


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """Convolve, with the operator that torch's own functions end in; linear without a geometry."""
    if geometry is None:
        return F.linear(x, weight, bias)
    return torch.convolution(x, weight, bias, *geometry)


def inverse_deviation(var: Tensor, eps: float) -> Tensor:
    """Compute 1 / sqrt(var + eps), in float32 at least.

    Shape:
        - var: ``(C,)``
    """
    wide = var if var.dtype in (torch.float32, torch.float64) else var.float()
    return (wide + eps).rsqrt_()


def over_weight(s: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """Shape one value per output channel so that it multiplies a weight.

    Shape:
        - s: ``(C_out,)``
        - weight: ``(C_out, C_in / g, *)``, transposed ``(C_in, C_out / g, *)``, linear
          ``(C_out, C_in)``
        - returned: broadcasts against weight

    Example:
        >>> over_weight(torch.ones(6), torch.ones(6, 2, 3, 3), None).shape
        torch.Size([6, 1, 1, 1])
    """
    ones = (1,) * (weight.dim() - 2)
    if geometry is None or not geometry.transposed:
        return s.view((-1, 1, *ones))
    g, c_in, c_out = geometry.groups, weight.shape[0], weight.shape[1]
    if g == 1:
        return s.view(1, c_out, *ones)
    return s.view(g, 1, c_out).expand(g, c_in // g, c_out).reshape(c_in, c_out, *ones)


def folded_bias(bias: Tensor | None, mean: Tensor, s: Tensor, beta: Tensor | None) -> Tensor:
    """Compute (b - mean) * s + beta.

    Shape:
        - all ``(C_out,)``
    """
    mean = mean if mean.dtype == s.dtype else mean.to(s.dtype)
    if beta is None:
        return (-mean if bias is None else bias - mean) * s
    beta = beta if beta.dtype == s.dtype else beta.to(s.dtype)
    if bias is None:
        return torch.addcmul(beta, mean, s, value=-1)
    return torch.addcmul(beta, bias - mean, s)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of a convolution to input, weight and bias: those that are needed.

    Args:
        dy: The gradient to the output.
        x: The input; where no gradient to the weight is needed, any tensor of its shape.
        weight: The weight that was used.
        geometry: The geometry; None for linear.
        needed: Which of the three.
    """
    if geometry is None:
        dx = dy @ weight if needed[0] else None
        dw = dy.t() @ x if needed[1] else None
        return dx, dw, dy.sum(0) if needed[2] else None
    dx, dw, db = torch.ops.aten.convolution_backward.default(
        dy, x, weight, [dy.shape[1]], *geometry, list(needed)
    )
    return dx, dw, db
