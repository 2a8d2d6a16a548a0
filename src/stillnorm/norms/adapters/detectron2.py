"""detectron2's FrozenBatchNorm2d and the many copies of it in other repositories.

Any class called Frozen...BatchNorm... with the four buffers is read as one of them; a copy without
`eps` adds none (the first published ones).

Source: detectron2/layers/batch_norm.py.
"""

from __future__ import annotations

from torch import nn

from stillnorm.norms.adapters.adapter import Adapter, comes_from, is_frozen_batch_norm


def _eps(module: nn.Module) -> float:
    eps = getattr(module, "eps", 0.0)
    return float(eps) if isinstance(eps, int | float) else 0.0


FROZEN = Adapter("detectron2", "frozen", is_frozen_batch_norm, _eps)


def provider_of_copy(module: nn.Module) -> str:
    """Name the package that a copy of the layer comes from."""
    if comes_from(module, "detectron2"):
        return "detectron2"
    return type(module).__module__.partition(".")[0]
