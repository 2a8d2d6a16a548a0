"""torchvision.ops.FrozenBatchNorm2d: four buffers, ``x * scale + bias``.

Source: torchvision/ops/misc.py.
"""

from stillnorm.norms.adapters.adapter import Adapter, comes_from, is_frozen_batch_norm

FROZEN = Adapter(
    "torchvision",
    "frozen",
    lambda module: is_frozen_batch_norm(module) and comes_from(module, "torchvision"),
)
