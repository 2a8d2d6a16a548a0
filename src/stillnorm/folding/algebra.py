r"""Absorbing a norm into the weight and bias of the layer beside it, in float64, cast once.

    norm(z) = z * s + t          s = gamma / sqrt(var + eps),   t = beta - mean * s

after a convolution     (conv(x, W) + b) * s + t   =  conv(x, W * s) + b * s + t
before a convolution    conv(x * s + t, W) + b     =  conv(x, W * s) + b + conv(t, W)

s and t have one value per channel: of the output behind a convolution, of the input before it.
conv(t, W) is one value per output channel where every position of the output sees a full window;
zero padding makes it differ at the border: there the padding is 0 and not t. It is the convolution
of a single channel of ones by  w[o] = Σ_i W[o, i] t[i].

Source: Jacob et al., arXiv 1712.05877, section 3.2, for the first; the second by linearity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillnorm.convolutions import Geometry, convolve, over_weight


@dataclass(frozen=True)
class Affine:
    """A norm by constant statistics: x * scale + shift for each channel.

    Args:
        scale: s, (C,), float64.
        shift: t, (C,), float64.
    """

    scale: Tensor
    shift: Tensor


def affine_of(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Affine:
    """Return the norm's scale and shift.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> norm = affine_of(one, 4 * one, None, zero, 0.0)
        >>> norm.scale.item(), norm.shift.item()
        (0.5, -0.5)
    """
    scale = (wide(var) + eps).rsqrt()
    if gamma is not None:
        scale = scale * wide(gamma)
    shift = -wide(mean) * scale
    return Affine(scale, shift if beta is None else shift + wide(beta))


def wide(tensor: Tensor) -> Tensor:
    """Return the values in float64, on the CPU: not every device has it."""
    return tensor.detach().to("cpu", torch.float64)


def fold_after(
    weight: Tensor, bias: Tensor | None, norm: Affine, geometry: Geometry | None
) -> tuple[Tensor, Tensor]:
    """Absorb the norm after a convolution or linear layer.

    Args:
        weight: The weight, float64.
        bias: The bias, float64, or None.
        norm: The norm.
        geometry: The convolution's geometry; None for a linear layer.

    Returns:
        Weight and bias of the one layer that does both.
    """
    folded = norm.shift if bias is None else bias * norm.scale + norm.shift
    return weight * over_weight(norm.scale, weight, geometry), folded


def fold_before(
    weight: Tensor, bias: Tensor | None, norm: Affine, geometry: Geometry | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Absorb the norm before a convolution or linear layer.

    Args:
        weight: The weight, float64.
        bias: The bias, float64, or None.
        norm: The norm.
        geometry: The convolution's geometry; None for a linear layer.

    Returns:
        Weight and bias of the layer that does both; and the weight that convolves a channel of
        ones to what is to be added, where that is not one value per channel, else None.
    """
    folded = weight * _over_input(norm.scale, weight, geometry)
    shifted = _sum_over_input(weight * _over_input(norm.shift, weight, geometry), geometry)
    if not norm.shift.any():
        return folded, bias, None
    if geometry is None or not (geometry.transposed or any(geometry.padding)):
        constant = shifted.flatten(1).sum(1)
        return folded, constant if bias is None else bias + constant, None
    return folded, bias, shifted.movedim(0, 1) if geometry.transposed else shifted


def two_layers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Affine,
    geometry: Geometry | None,
    *,
    before: bool,
) -> Tensor:
    """Compute a norm and a convolution one after the other, in float64.

    Args:
        x: The input of the two.
        weight: The weight.
        bias: The bias, or None.
        norm: The norm.
        geometry: The convolution's geometry; None for a linear layer.
        before: Whether the norm comes first.
    """

    def normalize(z: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (z.dim() - 2))
        return z * norm.scale.view(shape) + norm.shift.view(shape)

    x, weight, bias = wide(x), wide(weight), None if bias is None else wide(bias)
    if before:
        return convolve(normalize(x), weight, bias, geometry)
    return normalize(convolve(x, weight, bias, geometry))


def _over_input(v: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """Shape one value per input channel so that it multiplies a weight."""
    ones = (1,) * (weight.dim() - 2)
    if geometry is None:
        return v.view(1, -1)
    if geometry.transposed:
        return v.view(-1, 1, *ones)
    g, c_out, c_in = geometry.groups, weight.shape[0], weight.shape[1]
    return v.view(g, 1, c_in).expand(g, c_out // g, c_in).reshape(c_out, c_in, *ones)


def _sum_over_input(q: Tensor, geometry: Geometry | None) -> Tensor:
    """Sum over the input channels of each output channel.

    Shape:
        - q: as the weight
        - returned: ``(C_out, 1, *)``
    """
    if geometry is None or not geometry.transposed:
        return q.sum(1, keepdim=True)
    per_group = q.view(geometry.groups, -1, *q.shape[1:]).sum(1)  # (g, C_out / g, *)
    return per_group.flatten(0, 1).unsqueeze(1)


def cast(tensor: Tensor, like: Tensor) -> Tensor:
    """Round to the dtype of `like`, on its device, contiguous as it is.

    Raises:
        OverflowError: A value is too large for the dtype.
    """
    rounded = tensor.to(like.device, like.dtype)
    if not bool(rounded.isfinite().all()):
        raise OverflowError(f"a folded value is not finite in {str(like.dtype)[6:]}")
    channels_last = tensor.dim() == like.dim() == 4 and like.is_contiguous(
        memory_format=torch.channels_last
    )
    return rounded.contiguous(memory_format=torch.channels_last) if channels_last else rounded
