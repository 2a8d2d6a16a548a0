"""Plain formulas in float64, written down independently of the library."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.double().reshape(1, -1, *[1] * (x.dim() - 2))


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, in float64."""
    y = (x.double() - _channels(mean, x)) / torch.sqrt(_channels(var, x) + eps)
    if weight is not None:
        y = y * _channels(weight, x)
    if bias is not None:
        y = y + _channels(bias, x)
    return y


def pooled_moments(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, (C,), of all values of each channel over all inputs together."""
    flat = torch.cat([x.double().movedim(1, 0).flatten(1) for x in inputs], dim=1)
    return flat.mean(1), flat.var(1, correction=1)


def ulp_distance(a: Tensor, b: Tensor) -> float:
    """The largest distance between two tensors of one dtype, in units in the last place of b."""
    spacing = torch.finfo(b.dtype).eps * torch.exp2(torch.floor(torch.log2(b.double().abs())))
    spacing = torch.where(b == 0, torch.finfo(b.dtype).tiny, spacing)
    return float(((a.double() - b.double()).abs() / spacing).max()) if a.numel() else 0.0


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # a tensor would hold the graph, and that us

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(storage.nbytes() for storage in storages.values())
