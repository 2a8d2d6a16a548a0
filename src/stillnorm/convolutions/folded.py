r"""A convolution and the batch norm by constants after it, computed as one convolution.

    y  = conv(x, W') + b'        W' = W * s,   b' = (b - mean) * s + beta,   s = gamma / deviation

    dx = conv'(dy, W')           dW' = conv''(x, dy),   db' = sum(dy)
    dW = dW' * s                 dgamma = (sum(dW' * W) + sum(db' * (b - mean))) / deviation
    db = db' * s                 dbeta  = db'

No activation is saved but x, which the convolution alone saves too. W' is not kept either: autograd
is given a recipe in its place and computes W' again in backward. Nothing is cached between calls:
no write to a weight is ever missed.

All of it are torch's own differentiable operators: an autograd function in Python that does the
same costs about 80 us more a layer and step (benchmarks/folded_network.py).

Source: the gradients, by the chain rule; arXiv 2305.11624 keeps W', one copy of every weight; the
recipe, torch's notes on autograd, "Hooks for saved tensors".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillnorm.convolutions.algebra import (
    convolve,
    folded_bias,
    inverse_deviation,
    over_weight,
)
from stillnorm.convolutions.geometry import Geometry


def convolve_normalized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    geometry: Geometry | None,
) -> Tensor:
    """Convolve and normalise by constant statistics, in one convolution.

    Args:
        x: The input, in the dtype to compute in.
        weight: The convolution's weight; in another dtype (float32 under autocast) it is cast
            after it was scaled.
        bias: The convolution's bias, or None for 0.
        gamma: The norm's weight, or None for 1.
        beta: The norm's bias, or None for 0.
        mean: The norm's running mean, a constant.
        var: The norm's running variance, a constant.
        eps: Added to the variance.
        geometry: The convolution's geometry; None for a linear layer.

    Returns:
        What the norm returns, to rounding, in the dtype of x, with exact gradients to the first
        five arguments, of any order.

    Shape:
        - x: ``(N, C_in, *)``; bias, gamma, beta, mean, var: ``(C_out,)``

    Cost:
        The convolution, and a few passes over the weight. Saves x, the parameters themselves, and
        vectors of C elements.
    """
    if torch.is_autocast_enabled(x.device.type):  # the dtypes are what they shall be
        with torch.autocast(x.device.type, enabled=False):
            return convolve_normalized(x, weight, bias, gamma, beta, mean, var, eps, geometry)
    s = inverse_deviation(var, eps)
    if gamma is not None:
        s = s * gamma
    s_w = over_weight(s, weight, geometry)
    b = folded_bias(bias, mean, s, beta)
    if b.dtype != x.dtype:
        b = b.to(x.dtype)
    recipe = _Recipe(weight, s_w.detach(), x.dtype)
    return recipe.convolve(x, _folded(weight, s_w, x.dtype), b, geometry)


def _folded(weight: Tensor, s_w: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute W * s, in the wider of their dtypes and rounded once."""
    w = weight * s_w
    return w if w.dtype == dtype else w.to(dtype)


# How autograd names the weight that it saves: of a convolution, of a linear layer (transposed).
_SAVED = ("_raw_saved_weight", "_raw_saved_mat2")

# Since torch 2.7; before, W' is kept where saved tensors are hooked.
_outer_hooks: Any = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)


def are_saved_tensors_hooked() -> bool:
    """Tell whether somebody watches what autograd saves: offloading, checkpointing, counting."""
    return _outer_hooks(False) is not None


class _Recipe:
    """How to compute W' again, in the place of W' among the saved tensors.

    Args:
        weight: W.
        s_w: s, shaped to multiply it.
        dtype: The dtype of W'.
    """

    __slots__ = ("dtype", "s_w", "transposed", "version", "weight")

    def __init__(self, weight: Tensor, s_w: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.s_w, self.dtype = weight, s_w, dtype
        self.version = weight._version
        self.transposed = False

    def convolve(self, x: Tensor, w: Tensor, b: Tensor, geometry: Geometry | None) -> Tensor:
        """Convolve with W'; what autograd saves of it is the recipe.

        Hooks of others on saved tensors (offloading, checkpointing) see x, as they would without
        the norm, and not W'.
        """
        outer = _outer_hooks(False) if torch.is_grad_enabled() else None
        if outer is None:
            y = convolve(x, w, b, geometry)
            node = y.grad_fn
            # A linear layer keeps its weight for the gradient of its input alone.
            if node is not None and (geometry is not None or x.requires_grad):
                self.transposed = geometry is None
                saved = getattr(node, _SAVED[self.transposed], None)
                if saved is not None:  # other devices have other nodes: they keep W'
                    saved.register_hooks(self._pack, _compute)
            return y
        pack, unpack = outer
        pointer = w.data_ptr()

        def pack_others(tensor: Tensor) -> Any:
            if tensor.data_ptr() != pointer:
                return pack(tensor)
            self.transposed = tensor.shape != w.shape or tensor.stride() != w.stride()
            return self

        def unpack_others(packed: Any) -> Any:
            return _compute(packed) if isinstance(packed, _Recipe) else unpack(packed)

        with torch.autograd.graph.saved_tensors_hooks(pack_others, unpack_others):
            return convolve(x, w, b, geometry)

    def _pack(self, weight: Tensor) -> _Recipe:
        return self


def _compute(recipe: _Recipe) -> Tensor:
    if recipe.weight._version != recipe.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: the weight {tuple(recipe.weight.shape)} of a convolution whose norm is "
            f"computed in it is at version {recipe.weight._version}; "
            f"expected version {recipe.version} instead"
        )
    w = _folded(recipe.weight.detach(), recipe.s_w, recipe.dtype)
    return w.t() if recipe.transposed else w
