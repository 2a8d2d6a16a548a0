"""Keras 3's BatchNormalization on the torch backend, where every Keras layer is a torch module.

Its variables are parameters inside Keras variables, its momentum is 1 minus torch's, its channels
are where `axis` says. Its mode is not the flag `training` of the module: it normalises by the batch
where the call has ``training=True``, as `fit` makes it, and the layer is `trainable`; `train()` and
`eval()` change nothing. Layers inside others are in lists of Keras', not among torch's children.

Source: keras/src/layers/normalization/batch_normalization.py, keras/src/backend/torch/layer.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stillnorm.norms.adapters.adapter import Adapter, comes_from

_TENSORS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def is_keras(module: nn.Module) -> bool:
    """Tell whether the module is a layer or model of Keras."""
    return hasattr(type(module), "_flatten_layers") and comes_from(module, "keras")


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers inside a Keras layer, by their names there."""
    inside: Any = module
    layers = inside._flatten_layers(include_self=False, recursive=False)
    torch_modules = [(n, m) for n, m in module.named_children() if not comes_from(m, "keras")]
    return [(layer.name, layer) for layer in layers] + [
        (name, m) for name, m in torch_modules if name != "_torch_params"
    ]


def trains(module: nn.Module) -> bool:
    """Tell whether the layer is trainable: otherwise it is in inference mode always."""
    return bool(getattr(module, "trainable", True))


@contextlib.contextmanager
def normalizing_by_batch(module: nn.Module) -> Iterator[None]:
    """Call the layer as with ``training=True`` inside the block, whatever the caller says."""
    call: Any = module.call

    def by_batch(inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(inputs, **(kwargs | {"training": True}))

    module.__dict__["call"] = by_batch  # Keras' own __setattr__ would track it
    try:
        yield
    finally:
        del module.__dict__["call"]


def axis(module: nn.Module) -> int:
    """Return the axis of the channels, which may count from the end."""
    return int(getattr(module, "axis", -1))


# Why an operation of torch's kind leaves such a layer alone.
FOREIGN = "is a layer of Keras: port the model with sn.port, do this in torch, and port it back"


def how_to_freeze(path: str) -> str:
    """Say how a layer is frozen in Keras."""
    layer = "".join(f".get_layer({name!r})" for name in path.split(".") if name)
    return (
        "in Keras the mode is an argument of the call, and `trainable` decides: "
        f"model{layer}.trainable = False, and compile() again"
    )


def _recognizes(module: nn.Module) -> bool:
    return is_keras(module) and any(
        kind.__name__ == "BatchNormalization" for kind in type(module).__mro__
    )


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    variable = getattr(module, _TENSORS.get(name, ""), None)
    value = getattr(variable, "value", None)
    return value if isinstance(value, Tensor) else None


def _momentum(module: nn.Module) -> float:
    return round(1 - float(module.momentum), 12)  # type: ignore[arg-type]


KERAS = Adapter(
    "keras",
    "keras",
    _recognizes,
    eps=lambda module: float(module.epsilon),  # type: ignore[arg-type]
    tensor=_tensor,
    momentum=_momentum,
)
