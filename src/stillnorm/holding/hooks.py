"""Whether anybody looks: hooks that see what goes into a layer or comes out of it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as everywhere


def sees_output(layer: nn.Module) -> bool:
    """Tell whether a hook looks at what the layer returns, or at the gradient there."""
    return bool(
        layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def sees_input(layer: nn.Module) -> bool:
    """Tell whether a hook looks at what the layer receives, or at the gradient there."""
    return bool(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_hooks
    )
