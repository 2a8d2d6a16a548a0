"""What an adapter tells about one kind of norm layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Family = Literal["batch", "instance", "frozen", "keras"]


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _momentum(module: nn.Module) -> float | None:
    momentum = getattr(module, "momentum", None)
    return None if momentum is None else float(momentum)


@dataclass(frozen=True)
class Adapter:
    """How the layers of one provider are recognised and read.

    Args:
        provider: The library's name.
        family: "batch", "instance", "frozen" for another library's layer that always normalises by
            its buffers, or "keras" for one whose mode is an argument of its call.
        recognizes: Whether a module is such a layer.
        eps: The eps that the layer's forward uses.
        tensor: Its tensor of one of torch's names, or None.
        momentum: The weight of the new batch in the statistics.
    """

    provider: str
    family: Family
    recognizes: Callable[[nn.Module], bool]
    eps: Callable[[nn.Module], float] = lambda module: float(module.eps)  # type: ignore[arg-type]
    tensor: Callable[[nn.Module, str], Tensor | None] = _tensor
    momentum: Callable[[nn.Module], float | None] = _momentum


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Tell by name and buffers whether this is a layer with fixed statistics and affine.

    Its class, or a base of it, is called something like FrozenBatchNorm2d, and the four tensors
    are buffers.
    """
    names = [c.__name__ for c in type(module).__mro__]
    if isinstance(module, torch.jit.ScriptModule):
        names = [getattr(module, "original_name", "")]
    if not any("Frozen" in name and "BatchNorm" in name for name in names):
        return False
    buffers = {name for name, _ in module.named_buffers(recurse=False)}
    return {"weight", "bias", "running_mean", "running_var"} <= buffers


def comes_from(module: nn.Module, package: str) -> bool:
    """Tell whether the module's class, or a base of it, is defined in `package`."""
    return any(
        c.__module__ == package or c.__module__.startswith(package + ".")
        for c in type(module).__mro__
    )
