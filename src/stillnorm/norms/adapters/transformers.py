"""The copies of FrozenBatchNorm2d in transformers (DETR and its descendants).

They have no `eps`: the forward of every copy says ``epsilon = 1e-5``, whatever the layer they
replaced had.

Source: transformers/models/detr/modeling_detr.py, `DetrFrozenBatchNorm2d`.
"""

from stillnorm.norms.adapters.adapter import Adapter, comes_from, is_frozen_batch_norm

FROZEN = Adapter(
    "transformers",
    "frozen",
    lambda module: is_frozen_batch_norm(module) and comes_from(module, "transformers"),
    eps=lambda module: 1e-5,
)
