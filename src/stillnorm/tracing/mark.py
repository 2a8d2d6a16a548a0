"""A mark by which a tensor is known again in another object that shares its memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Mark:
    """A tensor's memory and the number of writes to it, without keeping either alive.

    The weak reference also keeps the memory's address from being given to another tensor.
    """

    storage: StorageWeakRef
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Mark | None:
        """Return the tensor's mark; None for tensors without memory or without a version."""
        if tensor.is_inference():
            return None
        try:
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError):  # under vmap, and wrapper subclasses
            return None
        return cls(storage, tensor._version)
