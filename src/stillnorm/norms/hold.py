"""The record that marks a layer as held by stillnorm.

It lives in the layer's own ``__dict__``: deepcopy and pickle take it along, `state_dict` never
sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from stillnorm.norms.pair import Pair

Affine = Literal["frozen", "trains"]

HOLD = "_stillnorm_hold"


@dataclass
class Hold:
    """What a held layer remembers.

    Args:
        affine: Whether the affine parameters are frozen too, or train.
        asked: The mode that `train()` and `eval()` calls have asked for since; what `training`
            would be had the layer never been held.
        required_grad: `requires_grad` of the affine parameters before they were frozen, by name;
            empty while they train.
        shadowed_module: The instance's own ``__module__`` entry before the hold, if it had one.
        pair: What it shares with the convolutions in whose weights it may be computed, if any.
    """

    affine: Affine
    asked: bool
    required_grad: dict[str, bool]
    shadowed_module: str | None = None
    pair: Pair | None = None


def hold_of(module: nn.Module) -> Hold | None:
    """Return the layer's hold, or None when stillnorm does not hold it."""
    hold = module.__dict__.get(HOLD)
    return (
        hold if isinstance(hold, Hold) and getattr(type(module), "is_held_class", False) else None
    )
