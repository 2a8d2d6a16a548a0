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
    own = {_pointer(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = _pointer(tensor)
        if pointer is not None and pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()  # noqa: F841, its graph keeps the storages apart
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _pointer(tensor: Tensor) -> int | None:
    """Return where a tensor's memory begins; None where it has none (under torch.func, sharded)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
