r"""The forward and backward of a batch norm whose statistics and affine parameters are constants.

    y  = (x - mean) / sqrt(var + eps) * weight + bias
    dx = dy * s        with  s = weight / sqrt(var + eps)

dx needs no activation, yet `F.batch_norm` in eval mode saves its whole input: its backward also
computes the gradients of weight and bias. `NormByConstants` saves two vectors of C elements. Its
forward is `torch.batch_norm` itself, so the output has the same bits.

Source: detectron2/layers/batch_norm.py names the cost; torch/csrc/autograd/FunctionsManual.cpp
(`batchnorm_double_backward`) has the formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_by_constants(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise by given statistics and affine parameters, all constants to autograd.

    Args:
        x: The input.
        mean: The mean of each channel.
        var: The variance of each channel.
        weight: The scale of each channel, or None for 1.
        bias: The shift of each channel, or None for 0.
        eps: Added to the variance.

    Returns:
        What `F.batch_norm(..., training=False)` returns, bit for bit.

    Shape:
        - x: ``(N, C, *)``; the others ``(C,)``.

    Cost:
        One read and one write of x forward and backward; saves 2 C elements.
    """
    weight, bias = constant(weight), constant(bias)
    if x.requires_grad and torch.is_grad_enabled() and not needs_plain_ops():
        y: Tensor = NormByConstants.apply(x, (mean, var, weight, bias, eps))  # type: ignore[no-untyped-call]
        return y
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def constant(parameter: Tensor | None) -> Tensor | None:
    """Cut a parameter off from autograd, also when `requires_grad` was switched on again."""
    return parameter.detach() if parameter is not None and parameter.requires_grad else parameter


def needs_plain_ops() -> bool:
    """Tell whether something records or transforms the operations: it must see the plain one.

    A compiler already saves nothing it can recompute (measured: the same bytes as without norms).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


# mean, var, weight, bias, eps
_Constants = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]

# Elements up to which torch's kernel is faster than the product (benchmarks/frozen_layer.py).
_SMALL = 1 << 13

_kernel = torch.ops.aten.native_batch_norm_backward.default


class NormByConstants(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with a gradient to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: _Constants) -> Tensor:
        """Compute y with the operator that the plain layer uses.

        The constants come as one tuple: autograd then handles two arguments instead of six, which
        is a tenth of the time on a small map.
        """
        mean, var, weight, bias, eps = constants
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return torch.batch_norm(
            x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """Compute dx = dy * s."""
        var, weight = ctx.saved_tensors
        return input_gradient(dy, var, weight, ctx.eps), None


def input_gradient(dy: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute dx = dy * weight / sqrt(var + eps).

    In float32 and float64 as one product, within 2 ulp of torch's kernel and faster. On small maps
    the small operations before the product cost more than the map, and in half precision s must
    not be rounded to half before it (1e-2 off in bfloat16): there torch's own kernel computes dx,
    with dy and var standing in for the input and the mean, which that gradient does not read. That
    kernel cannot be differentiated so, and divides by zero on an empty batch: those take the
    product.

    Shape:
        - dy, dx: ``(N, C, *)``; var, weight: ``(C,)``.
    """
    half = dy.dtype in (torch.float16, torch.bfloat16)
    by_whole_batch = half or dy.numel() <= _SMALL
    if by_whole_batch and dy.numel() and not torch.is_grad_enabled():
        dx: Tensor = _kernel(
            dy, dy, weight, var, var, None, None, False, eps, [True, False, False]
        )[0]
        return dx
    dtype = torch.float32 if half else dy.dtype
    # As torch's CPU kernel: the inverse deviation in double, then rounded (Normalization.cpp).
    s = (var.to(torch.float64 if var.is_cpu else dtype) + eps).rsqrt_().to(dtype)  # (C,)
    if weight is not None:
        s.mul_(weight)
    dx = dy * s.view(-1, *[1] * (dy.dim() - 2))
    return dx.to(dy.dtype) if half else dx
