"""Finding the norm layers of a model."""

from __future__ import annotations

from torch import nn

from stillnorm.norms.adapters import adapter_of
from stillnorm.norms.adapters.adapter import Adapter
from stillnorm.norms.layer import NormLayer
from stillnorm.norms.paths import walk


def find_norms(model: nn.Module) -> tuple[NormLayer, ...]:
    """Return every layer that has, or could have, running statistics.

    That is batch norm, instance norm, and other libraries' frozen batch norms. LayerNorm and
    GroupNorm normalise by the sample whatever the mode and keep nothing; there is nothing in them
    to see or to hold.

    Returns:
        One view per module object, in registration order, with all its paths.

    Example:
        >>> find_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        (NormLayer(1: BatchNorm2d(4)),)
    """
    found: dict[int, tuple[list[str], nn.Module, tuple[nn.Module, ...], Adapter]] = {}
    for path, module, ancestors in walk(model):
        if id(module) in found:
            found[id(module)][0].append(path)
        elif (adapter := adapter_of(module)) is not None:
            found[id(module)] = ([path], module, ancestors, adapter)
    return tuple(
        NormLayer(tuple(dict.fromkeys(paths)), module, ancestors, adapter)
        for paths, module, ancestors, adapter in found.values()
    )
