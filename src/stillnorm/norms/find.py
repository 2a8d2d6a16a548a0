"""Finding the norm layers of a model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from stillnorm.norms.adapters import adapter_of
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
    found: dict[nn.Module, NormLayer] = {}
    for path, module, ancestors in walk(model):
        if (first := found.get(module)) is not None:
            more = (m for m in ancestors if m not in first.above)
            found[module] = replace(
                first,
                paths=tuple(dict.fromkeys((*first.paths, path))),
                elsewhere=(*first.elsewhere, *more),
            )
        elif (adapter := adapter_of(module)) is not None:
            found[module] = NormLayer((path,), module, ancestors, adapter)
    return tuple(found.values())
