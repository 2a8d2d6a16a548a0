"""timm's FrozenBatchNormAct2d: torchvision's frozen layer with dropout and activation after it.

timm's trainable BatchNormAct2d is a subclass of BatchNorm2d and needs no adapter of its own.

Source: timm/layers/norm_act.py.
"""

from stillnorm.norms.adapters.adapter import Adapter, comes_from, is_frozen_batch_norm

FROZEN = Adapter(
    "timm",
    "frozen",
    lambda module: is_frozen_batch_norm(module) and comes_from(module, "timm"),
)
