"""Norms that the model does not know: in a plain list, built in a forward, a function's buffers.

`eval()` does not reach them and `modules()` does not find them, so that a forward that should only
look updates their statistics. They are kept when they are about to be called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from stillnorm.norms import every_module, keep_tensors
from stillnorm.tracing.kernels import kernel_of
from stillnorm.tracing.visits import visits


def is_stranger(module: nn.Module, known: set[nn.Module]) -> bool:
    """Tell whether a module is one of torch's norm layers and none of those that are known."""
    return isinstance(module, _NormBase) and module not in known


@contextlib.contextmanager
def strangers_kept(model: nn.Module) -> Iterator[None]:
    """Let forwards inside the block update nothing of norms that are not registered in the model.

    Cost:
        A copy of their statistics.
    """
    with contextlib.ExitStack() as kept:
        keep = _Keep(model, kept)
        with visits(keep.enter, keep.leave), keep:
            yield


class _Keep(TorchFunctionMode):
    """Keeps tensors that are about to be updated."""

    def __init__(self, model: nn.Module, kept: contextlib.ExitStack) -> None:
        super().__init__()
        self._known = set(every_module(model))
        self._kept = kept
        # Those of the model are others' to keep. `keep_tensors` keeps alive what is in it.
        self._done = {id(tensor) for tensor in model.buffers()}

    def enter(self, module: nn.Module, args: Any) -> None:
        if is_stranger(module, self._known):
            self._keep(module.buffers())

    def leave(self, module: nn.Module, *_: Any) -> None:
        pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kernel = kernel_of(func, args, kwargs or {})
        if kernel is not None and kernel.used != "running":
            given = (kernel.arguments.get(name) for name in ("running_mean", "running_var"))
            self._keep(x for x in given if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        new = [tensor for tensor in tensors if id(tensor) not in self._done]
        self._done.update(map(id, new))
        self._kept.enter_context(keep_tensors(new))
