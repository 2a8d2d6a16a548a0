"""torch.nn: BatchNorm1d/2d/3d, SyncBatchNorm, InstanceNorm, their lazy kinds, any subclass of them.

The lookup goes by the class tree, never by exact type: timm's BatchNormAct2d and users' own
subclasses are norm layers too. Scripted modules lose their Python class; they are recognised by
the name that TorchScript keeps.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from stillnorm.norms.adapters.adapter import Adapter, is_frozen_batch_norm


def _is_scripted(module: nn.Module) -> bool:
    name = getattr(module, "original_name", "")
    return (
        isinstance(module, torch.jit.ScriptModule)
        and "BatchNorm" in name
        and not is_frozen_batch_norm(module)
        and hasattr(module, "running_mean")
    )


def _is_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or (
        isinstance(module, _LazyNormBase) and not isinstance(module, _InstanceNorm)
    )


BATCH = Adapter("torch", "batch", _is_batch)
INSTANCE = Adapter("torch", "instance", lambda module: isinstance(module, _InstanceNorm))
SCRIPTED = Adapter("torch", "batch", _is_scripted)
