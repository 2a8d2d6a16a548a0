"""The one call that is exported: a module, its arguments, and the same with other batch sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from stillnorm.tracing import Forward, copied, eager

PREFIX = "model."  # of the paths in a `Called`


@dataclass(frozen=True, eq=False)
class Call:
    """What is exported: ``module(*args, **kwargs)``.

    Args:
        module: The model, or what calls it as the user does.
        args: Its positional arguments.
        kwargs: Its keyword arguments, in the order of the signature.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example: object, forward: Forward | None) -> Call:
        """Return the call of a model on an example, as `torch.export` takes it."""
        if forward is not None:
            return cls(Called(model, forward), (example,), {})
        if isinstance(example, Mapping):
            order = list(inspect.signature(model.forward).parameters)
            last = len(order)
            names = sorted(example, key=lambda k: order.index(k) if k in order else last)
            return cls(model, (), {name: example[name] for name in names})
        return cls(model, tuple(example) if isinstance(example, tuple | list) else (example,), {})

    @property
    def leaves(self) -> list[Any]:
        """The inputs, flat."""
        return tree_leaves((self.args, self.kwargs))

    @property
    def batch_size(self) -> int | None:
        """The length of the first tensor that has one; None where there is none."""
        sizes = (len(x) for x in self.leaves if isinstance(x, Tensor) and x.dim())
        return next(sizes, None)

    def run(self) -> object:
        """Return what the model returns, on a copy of the inputs: models write to them."""
        args, kwargs = tree_map(copied, (self.args, self.kwargs))
        with eager():
            output: object = self.module(*args, **kwargs)
        return output

    def resized(self, size: int, varies: Callable[[int, Tensor], bool]) -> Call:
        """Return the call with another batch size, from its samples in turn.

        Args:
            size: The batch size.
            varies: Whether the input of that number, a tensor, grows and shrinks with the batch.
        """
        numbers = iter(range(len(self.leaves)))

        def to_size(leaf: object) -> object:
            number = next(numbers)
            if not isinstance(leaf, Tensor) or not leaf.dim() or not varies(number, leaf):
                return leaf
            return leaf[torch.arange(size, device=leaf.device) % len(leaf)]

        args, kwargs = tree_map(to_size, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


class Called(nn.Module):
    """A model called by a function of the user's.

    Args:
        model: The model.
        forward: ``(model, example) -> output``.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._forward = forward

    def forward(self, example: Any) -> Any:
        """Call it."""
        return self._forward(self.model, example)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def dynamic_inputs(program: ExportedProgram, call: Call) -> dict[int, Any]:
    """Return, by number of the input, the first size of those in which it was left open."""
    names = program.graph_signature.user_inputs
    if len(names) != len(call.leaves):
        return {}
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = {}
    for number, name in enumerate(names):
        value = values.get(name) if isinstance(name, str) else None
        if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt):
            found[number] = value.shape[0]
    return found
