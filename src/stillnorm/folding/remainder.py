"""What is left of a norm layer when its normalization is folded away."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from stillnorm.norms import NormLayer
from stillnorm.norms.adapters.keras import FOREIGN

# Forwards that normalise and do nothing else.
_ONLY_NORMALISE = (_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward)


def why_not_replace(norm: NormLayer) -> str | None:
    """Return the reason why plain torch has nothing to put in the layer's place, or None."""
    module = norm.module
    if norm.family == "keras":
        return FOREIGN
    if norm.normalizes_by(training=False) != "running":
        return f"in eval it normalises by the {norm.normalizes_by(training=False)}"
    if parametrize.is_parametrized(module) or "forward" in vars(module):
        return "it is parametrized, or its forward was replaced on the instance"
    if norm.family == "frozen" or type(module).forward in _ONLY_NORMALISE or _is_norm_act(module):
        return None
    return f"the forward of {norm.kind} does more than normalise, and stillnorm does not know what"


def _is_norm_act(module: nn.Module) -> bool:
    """Tell whether the layer is timm's, with dropout and activation after the norm."""
    return any(
        c.__module__.startswith("timm.") and "BatchNormAct" in c.__name__
        for c in type(module).__mro__
    ) and all(isinstance(getattr(module, name, None), nn.Module) for name in ("drop", "act"))


def remainder(module: nn.Module) -> nn.Module:
    """Return what the layer does after normalising: nothing, or dropout and activation."""
    if not _is_norm_act(module):
        return nn.Identity()
    parts = OrderedDict((name, getattr(module, name)) for name in ("drop", "act"))
    left = OrderedDict((n, part) for n, part in parts.items() if type(part) is not nn.Identity)
    return nn.Sequential(left) if left else nn.Identity()
