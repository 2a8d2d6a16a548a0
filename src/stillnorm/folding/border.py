"""A convolution with zero padding that has absorbed the norm before it, exact at the border.

    y = conv(x, W * s) + b + conv(ones, w)       w[o] = Σ_i W[o, i] t[i]

The second convolution has one input channel and a batch of one. The module is a `torch.fx` graph of
plain torch layers: it pickles and exports where stillnorm is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from stillnorm.convolutions import Geometry

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def with_border(conv: nn.Module, ones_weight: Tensor, geometry: Geometry) -> nn.Module:
    """Return a module that adds to a convolution that of a channel of ones.

    Args:
        conv: The convolution, of weight W * s.
        ones_weight: w, (C_out, 1, *), transposed (1, C_out, *).
        geometry: The convolution's geometry.

    Shape:
        - as the convolution's
    """
    rank = ones_weight.dim() - 2
    channels = ones_weight.shape[1] if geometry.transposed else ones_weight.shape[0]
    settings = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "bias": False,
    }
    if geometry.transposed:
        settings["output_padding"] = geometry.output_padding
    kinds = _TRANSPOSED if geometry.transposed else _CONV
    size = ones_weight.shape[2:]
    border = nn.utils.skip_init(kinds[rank], 1, channels, size, **settings)  # type: ignore[no-untyped-call]
    border.weight = nn.Parameter(ones_weight, requires_grad=False)

    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("conv", (x,))
    size_of = [graph.call_method("size", (x, i)) for i in range(2, 2 + rank)]
    ones = graph.call_method("new_ones", (x, [1, 1, *size_of]))
    graph.output(graph.call_function(torch.add, (y, graph.call_module("border", (ones,)))))
    root = nn.ModuleDict({"conv": conv, "border": border})
    return fx.GraphModule(root, graph, class_name=f"Bordered{type(conv).__name__}").eval()
