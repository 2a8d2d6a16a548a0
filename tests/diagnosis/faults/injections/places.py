"""Where a fault goes in an architecture that was not made for it."""

from __future__ import annotations

from itertools import combinations, pairwise

import torch
from torch import nn

from diagnosis.faults.grid import Subject
from stillnorm.norms import NormLayer


def convolution_and_norm(it: Subject) -> tuple[nn.Module, NormLayer]:
    """Return a convolution in the middle of the model, and the norm that follows it."""
    modules = [m for m in it.model.modules() if not any(m.children()) or is_norm(it, m)]
    layers = {layer.module: layer for layer in it.layers}
    pairs = [
        (a, layers[b])
        for a, b in pairwise(modules)
        if isinstance(a, nn.modules.conv._ConvNd)
        and b in layers
        and a.out_channels == layers[b].num_features
    ]
    return pairs[len(pairs) // 2]


def is_norm(it: Subject, module: nn.Module) -> bool:
    return any(layer.module is module for layer in it.layers)


def alike(it: Subject) -> tuple[NormLayer, NormLayer]:
    """Return the first two layers of one class, size and activation."""
    return next(
        (a, b)
        for a, b in combinations(it.layers, 2)
        if type(a.module) is type(b.module)
        and a.num_features == b.num_features
        and str(a.module) == str(b.module)
    )


def classes(it: Subject) -> int:
    with torch.no_grad():
        return int(it.call(it.model, it.batches()[0][:2]).shape[1])


def widest_in_variance(it: Subject) -> NormLayer:
    """Return the layer whose channels differ most in variance."""
    return max(it.layers, key=lambda x: float(x.running_var.log().std()))


def unlike_in_variance(it: Subject) -> NormLayer:
    """Give the channels before a norm scales of their own, as training does; return the norm."""
    conv, layer = convolution_and_norm(it)
    scale = torch.randn(layer.num_features).mul(1.5).exp()
    with torch.no_grad():
        conv.weight *= scale.view(-1, *[1] * (conv.weight.dim() - 1))
    layer.module.running_mean *= scale
    layer.module.running_var *= scale.square()
    return layer


def freeze_parameters_up_to(it: Subject) -> tuple[str, ...]:
    """Freeze the first parameters of the model, the last of them the victim's."""
    last = it.victim
    for module in it.model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if module is last.module:
            return it.paths[: it.paths.index(last.path) + 1]
    raise AssertionError
