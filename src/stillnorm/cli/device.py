"""``--device``: the model and its batches on another device."""

from __future__ import annotations

from collections.abc import Iterator

import click
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stillnorm.tracing import each_batch


def existing(name: str) -> torch.device:
    """Return the device, or say that this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise click.BadParameter(reason, param_hint="--device") from None
    return device


class Moved:
    """Batches, moved to a device one by one; as long as what they come from."""

    def __init__(self, batches: object, device: torch.device) -> None:
        self._batches = batches
        self._device = device

    def __iter__(self) -> Iterator[object]:
        for batch in each_batch(self._batches):
            yield moved(batch, self._device)


def moved(value: object, device: torch.device) -> object:
    """Return a batch or an example with its tensors on the device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
