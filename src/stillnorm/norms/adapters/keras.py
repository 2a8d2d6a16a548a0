"""Keras 3's BatchNormalization on the torch backend, where every Keras layer is a torch module.

Its variables are parameters inside Keras variables, its momentum is 1 minus torch's, its channels
are where `axis` says. Its mode is not the flag `training` of the module: it normalises by the batch
where the call has ``training=True``, as `fit` makes it, and the layer is `trainable`; `train()` and
`eval()` change nothing. Layers inside others are in lists of Keras', not among torch's children.

Source: keras/src/layers/normalization/batch_normalization.py, keras/src/backend/torch/layer.py.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from torch import Tensor, nn

from stillnorm.norms.adapters.adapter import Adapter, comes_from

_TENSORS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}

# What a layer with ``renorm=True`` has besides; training makes the variance of the deviation.
RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")

_KEEPERS = ("Variable", "BaseOptimizer", "Metric", "SeedGenerator")


def is_keras(module: nn.Module) -> bool:
    """Tell whether the module is a layer or model of Keras."""
    return hasattr(type(module), "_flatten_layers") and comes_from(module, "keras")


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers inside a Keras layer, by their names there."""
    inside: Any = module
    layers = inside._flatten_layers(include_self=False, recursive=False)
    torch_modules = [(n, m) for n, m in module.named_children() if not comes_from(m, "keras")]
    named = [(layer.name, layer) for layer in layers] + [
        (name, m) for name, m in torch_modules if name != "_torch_params"
    ]
    return _told_apart(named)


def _told_apart(named: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Number names that come again: in a subclassed model two layers may be called the same."""
    taken, first = {name for name, _ in named}, set[str]()
    children = []
    for name, module in named:
        path = name
        if name in first:
            path = next(n for k in itertools.count(1) if (n := f"{name}_{k}") not in taken)
        taken.add(path)
        first.add(path)
        children.append((path, module))
    return children


def is_called_unseen(module: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
    """Tell whether the model around the layer calls it past torch, where no hook hears of it."""
    return (
        bool(ancestors) and is_keras(module) and type(ancestors[-1]).__name__ == "TimeDistributed"
    )


def trains(module: nn.Module) -> bool:
    """Tell whether the layer is trainable: otherwise it is in inference mode always."""
    return bool(getattr(module, "trainable", True))


@contextlib.contextmanager
def normalizing_by_batch(module: nn.Module) -> Iterator[None]:
    """Call the layer as with ``training=True`` inside the block, whatever the caller says."""
    call: Any = module.call
    position = position_of_training(call)
    replaced = "call" in module.__dict__  # by the user, on the instance

    def by_batch(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = in_mode(position, args, kwargs, training=True)
        return call(*args, **kwargs)

    module.__dict__["call"] = by_batch  # Keras' own __setattr__ would track it
    try:
        yield
    finally:
        del module.__dict__["call"]
        if replaced:
            module.__dict__["call"] = call


def position_of_training(call: Callable[..., Any]) -> int | None:
    """Return the position of ``training=`` among the arguments of a call; None if it takes none.

    Of a class' function the layer itself, its first parameter, is one of them.

    Example:
        >>> class Norm:
        ...     def call(self, inputs, training=None): ...
        >>> position_of_training(Norm.call), position_of_training(Norm().call)
        (2, 1)
    """
    parameters = list(inspect.signature(call).parameters.values())
    for position, parameter in enumerate(parameters):
        if parameter.name == "training":
            return position
    by_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return len(parameters) if by_name else None


def in_mode(
    position: int | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with ``training=`` as given.

    Example:
        >>> in_mode(1, ("x",), {}, training=False)
        (('x',), {'training': False})
        >>> in_mode(1, ("x", True), {}, training=False)
        (('x', False), {})
    """
    if position is None:
        return args, kwargs
    if position < len(args):
        return (*args[:position], training, *args[position + 1 :]), kwargs
    return args, kwargs | {"training": training}


def is_symbolic() -> bool:
    """Tell whether Keras runs the model to learn its shapes, as `fit` does before it trains."""
    scope = sys.modules.get("keras.src.backend.common.symbolic_scope")
    return scope is not None and bool(scope.in_symbolic_scope())


def axis(module: nn.Module) -> int:
    """Return the axis of the channels, which may count from the end."""
    return int(getattr(module, "axis", -1))


def complement(momentum: float) -> float:
    """Return Keras' momentum of torch's, and torch's of Keras'.

    Exact in decimals, as people write it: what is turned over twice is what it was.

    Example:
        >>> complement(0.99), complement(complement(0.99)), complement(0.1)
        (0.01, 0.99, 0.9)
    """
    return float(1 - Decimal(repr(float(momentum))))


def set_switch(module: Any, switch: str, value: Any) -> None:
    """Set a switch of a layer of Keras that has one of torch's names, or is its `trainable`."""
    if switch == "momentum":
        module.momentum = complement(value)
    elif switch == "eps":
        module.epsilon = value
    elif switch == "trainable":
        module.trainable = value
    else:
        getattr(module, _TENSORS[switch.removesuffix(".requires_grad")]).trainable = value


# Why an operation of torch's kind leaves such a layer alone.
FOREIGN = "is a layer of Keras: port the model with sn.port, do this in torch, and port it back"


def core_of(kind: type) -> type | None:
    """Return Keras' own BatchNormalization among a class and its bases; None if there is none."""
    return next((base for base in kind.__mro__ if _is_core(base)), None)


def _is_core(kind: type) -> bool:
    is_keras_own = kind.__module__.partition(".")[0] == "keras" and "held_base" not in vars(kind)
    return kind.__name__ == "BatchNormalization" and is_keras_own


def renorm_statistics(module: Any) -> dict[str, Tensor]:
    """Return the statistics that a layer with ``renorm=True`` has besides, by name."""
    if not getattr(module, "renorm", False) or module.moving_mean is None:
        return {}
    return {name: getattr(module, name).value for name in RENORM}


def others(module: Any) -> dict[str, Tensor]:
    """Return what the layer counts and keeps besides its four tensors, by name."""
    known = {id(getattr(module, name, None)) for name in _TENSORS.values()}
    return {v.name: v.value for v in module._non_trainable_variables if id(v) not in known}


def keeps_state(thing: object) -> bool:
    """Tell whether it is of those of Keras that keep state outside layers, optimizers for one."""
    return any(
        kind.__name__ in _KEEPERS and kind.__module__.startswith("keras.")
        for kind in type(thing).__mro__
    )


def state_of(modules: Iterable[Any]) -> list[Any]:
    """Return the variables of layers that do not train: statistics, counters, seeds."""
    return [
        variable
        for module in modules
        if is_keras(module)
        for variable in (
            *module._non_trainable_variables,
            *(generator.state for generator in module._seed_generators),
        )
    ]


def _recognizes(module: nn.Module) -> bool:
    return is_keras(module) and core_of(type(module)) is not None


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    variable = getattr(module, _TENSORS.get(name, ""), None)
    value = getattr(variable, "value", None)
    return value if isinstance(value, Tensor) else None


KERAS = Adapter(
    "keras",
    "keras",
    _recognizes,
    eps=lambda module: float(module.epsilon),  # type: ignore[arg-type]
    tensor=_tensor,
    momentum=lambda module: complement(module.momentum),  # type: ignore[arg-type]
)
