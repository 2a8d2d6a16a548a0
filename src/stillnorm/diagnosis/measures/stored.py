"""What the tensors of a layer hold, as numbers to compute with, whatever state they are in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from stillnorm.norms import NormLayer


def values(tensor: Tensor | None) -> Tensor | None:
    """Return the numbers of a tensor, float64 on the CPU; None where it has none to read.

    That is: no tensor, one on the meta device, one that waits for a first forward, one that is
    spread over ranks.

    Example:
        >>> values(torch.tensor([1, 2], dtype=torch.float16))
        tensor([1., 2.], dtype=torch.float64)
        >>> values(torch.empty(2, device="meta")) is None
        True
    """
    if tensor is None or isinstance(tensor, UninitializedBuffer | UninitializedParameter):
        return None
    if tensor.is_meta or hasattr(tensor, "full_tensor"):
        return None
    return tensor.detach().to("cpu", torch.float64)


def updates(layer: NormLayer) -> int:
    """Return how many updates the layer has counted; 0 where it does not say."""
    counted = values(layer.num_batches_tracked)
    return int(counted) if counted is not None and counted.numel() == 1 else 0


def scale(layer: NormLayer) -> Tensor | None:
    """Return the magnitude of the weight, float64; ones for a layer without one.

    None where the weight cannot be read.
    """
    if layer.weight is None:
        return torch.ones(layer.num_features, dtype=torch.float64)
    weight = values(layer.weight)
    return None if weight is None else weight.abs()
