"""The one call that is exported: a module, its arguments, and the same with other batch sizes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from stillnorm.tracing import Forward, copied, eager


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
        """Return the call of a model on an example, as `torch.export` takes it.

        Inputs are copied, each by itself: of two that are one tensor exporters make one.
        """
        example = copied(example)
        if forward is not None:
            return cls(Called(model, forward), (example,), {})
        if isinstance(example, Mapping):
            order = list(inspect.signature(model.forward).parameters)
            if not example.keys() <= set(order):  # **kwargs, whose sizes cannot be left open
                return cls.of(model, dict(example), lambda model, given: model(**given))
            return cls(model, (), {name: example[name] for name in order if name in example})
        return cls(model, tuple(example) if isinstance(example, tuple | list) else (example,), {})

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.module.model if isinstance(self.module, Called) else self.module

    @property
    def leaves(self) -> list[Any]:
        """The inputs, flat, as `torch.export` numbers them."""
        return tree_leaves((self.args, self.kwargs))

    def run(self) -> object:
        """Return what the model returns, on a copy of the inputs: models write to them."""
        args, kwargs = tree_map(copied, (self.args, self.kwargs))
        with eager():
            output: object = self.module(*args, **kwargs)
        return output

    def in_float64(self) -> Call:
        """Return the same of a copy of the model in float64."""
        args, kwargs = tree_map(_doubled_precision, (self.args, self.kwargs))
        return Call(copy.deepcopy(self.module).double(), args, kwargs)

    def resized(self, size: int, varies: Callable[[int], bool]) -> Call:
        """Return the call with another batch size; `varies` says which inputs have it."""
        numbers = iter(range(len(self.leaves)))
        args, kwargs = tree_map(
            lambda leaf: _resized(leaf, size) if varies(next(numbers)) else leaf,
            (self.args, self.kwargs),
        )
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
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def size_of(example: object) -> int | None:
    """Return the batch size of an example: the length of its first tensor that has one."""
    return next((len(x) for x in tree_leaves(example) if isinstance(x, Tensor) and x.dim()), None)


def numbers(tree: object) -> list[Tensor]:
    """Return the tensors and the numbers among outputs, all as tensors."""
    leaves = tree_leaves(tree)
    return [torch.as_tensor(x) for x in leaves if isinstance(x, Tensor | bool | int | float)]


def doubled(example: object) -> object:
    """Return an example of one sample with that sample twice."""
    return tree_map(
        lambda x: _resized(x, 2) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x,
        example,
    )


def _doubled_precision(leaf: object) -> object:
    floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if floats else leaf  # type: ignore[attr-defined]


def _resized(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor with that many samples: its own, in turn."""
    return tensor[torch.arange(size, device=tensor.device) % len(tensor)]
