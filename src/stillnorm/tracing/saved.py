"""The bytes that autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Count the bytes that a forward keeps for its backward, each storage once.

    The model's own parameters and buffers are left out: they are there anyway.

    Args:
        model: The model.
        call: Runs it, with gradients.

    Cost:
        One forward; what it saves is alive until it ends.
    """
    own = {_pointer(_storage(tensor)) for tensor in (*model.parameters(), *model.buffers())}
    # Storages and not tensors: a tensor that the hook holds would hold the graph, which holds the
    # hook, and no garbage collector sees that circle.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage is not None and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # an output that its own graph saves would be another such circle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()  # noqa: F841, its graph keeps the storages apart
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return a tensor's memory; None where it has none (under torch.func, sharded)."""
    try:
        storage = tensor.untyped_storage()
        storage.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    return storage


def _pointer(storage: torch.UntypedStorage | None) -> int | None:
    return None if storage is None else storage.data_ptr()
