"""One file per provider of norm layers: how its layers are recognised and read.

Foreign providers are recognised by the names of their classes, so that none of them is imported.
"""

from __future__ import annotations

from torch import nn

from stillnorm.norms.adapters import detectron2, keras, timm, torch, torchvision, transformers
from stillnorm.norms.adapters.adapter import Adapter

# Specific providers first: the last entry takes any other layer that looks like detectron2's.
_ADAPTERS: tuple[Adapter, ...] = (
    torch.BATCH,
    torch.INSTANCE,
    torch.SCRIPTED,
    keras.KERAS,
    torchvision.FROZEN,
    timm.FROZEN,
    transformers.FROZEN,
    detectron2.FROZEN,
)


def adapter_of(module: nn.Module) -> Adapter | None:
    """Return the adapter that reads `module`, or None when it is not a norm layer."""
    return next((adapter for adapter in _ADAPTERS if adapter.recognizes(module)), None)
