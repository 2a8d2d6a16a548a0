"""A norm for every call: the module that takes the place of a layer called several times."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.errors import StateError


class SplitNorm(nn.Module):
    """One norm per call of a layer, told apart by their order in the owner's forward.

    The owner is the smallest module whose forward encloses all calls; when its forward begins, the
    count begins anew. Fewer calls are fine; one too many raises.

    Args:
        norm: The layer that is called several times.
        path: Its path, for errors.
        calls: The number of calls.
        shared: Whether the norms share their parameters: the same objects.

    Shape:
        That of the layer.
    """

    def __init__(self, norm: nn.Module, path: str, calls: int, *, shared: bool) -> None:
        super().__init__()
        self.training = norm.training
        self.sites = nn.ModuleList(twin(norm, shared=shared or i == 0) for i in range(calls))
        self.path = path
        self._next = 0
        self._within = -1  # the backward that the owner's forward belongs to; -1: to none

    def restart(self) -> None:
        """Begin counting anew: the owner's forward begins."""
        self._next = 0
        self._within = _backward()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the norm whose turn it is."""
        turn, calls = self._next, len(self.sites)
        if _backward() != self._within:
            raise StateError(
                f"{self.path}: a part of the forward that calls it {calls} times is computed again "
                "in backward (activation checkpointing), where the calls cannot be told apart",
                help="checkpoint the whole module that makes these calls, or none of it",
            )
        if turn == calls:
            raise StateError(
                f"{self.path}: call {turn + 1} of {calls} in one forward; when it was split, there "
                f"were {calls}",
                help="undo, and split again with batches that make all the calls",
            )
        self._next = turn + 1
        output: Tensor = self.sites[turn](*args, **kwargs)
        return output

    def __getattr__(self, name: str) -> Any:
        """Answer for the layer (`num_features`, `eps`, `weight`, ...) by its first norm."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "sites":
                raise
            return getattr(self.sites[0], name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the tensors of a checkpoint from before the split, each for every norm."""
        own = {f"{prefix}{name}": name for name in self.sites[0].state_dict()}
        for key, name in own.items():
            if key in state_dict:
                value = state_dict.pop(key)
                for i in range(len(self.sites)):
                    state_dict.setdefault(f"{prefix}sites.{i}.{name}", value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say how many calls there are."""
        return f"{len(self.sites)} calls"


class Restart:
    """A hook on the owner, to be called before its forward.

    Args:
        norm: The norm whose calls are to be counted anew.
    """

    def __init__(self, norm: SplitNorm) -> None:
        self.norm = norm

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Begin counting anew."""
        self.norm.restart()


def twin(norm: nn.Module, *, shared: bool) -> nn.Module:
    """Return a copy of a layer with statistics of its own, and parameters shared or of its own."""
    memo: dict[int, Any] = {id(p): p for p in norm.parameters()} if shared else {}
    return copy.deepcopy(norm, memo)


def _backward() -> int:
    """Return the number of the backward that is running, -1 outside; compilers see none."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
