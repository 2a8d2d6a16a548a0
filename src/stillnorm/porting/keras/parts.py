"""The layers of a Keras 3 model that have weights.

Keras keeps kernels as (*k, in, out) and knows its backend's tensors only; what this file gives and
takes is torch's, in torch's layout, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import torch
from keras import layers
from torch import Tensor

from stillnorm.norms.hold import hold_of
from stillnorm.porting.algebra import (
    depthwise_to_keras,
    depthwise_to_torch,
    kernel_to_keras,
    kernel_to_torch,
)
from stillnorm.porting.keras.features import Graph, feature_order, graph_of
from stillnorm.porting.part import Geometry, Refusal, a

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """A Keras variable, and how its value becomes torch's and back."""

    variable: Any
    to_torch: Map = lambda value: value
    to_keras: Map = lambda value: value


@dataclass(frozen=True, eq=False)
class KerasPart:
    """A layer, or the half of a separable convolution, as the torch layer that does the same.

    Args:
        name: Its name, those of the layers around it before it: "encoder/conv1".
        layer: The Keras layer.
        geometry: What its torch twin must be.
        stored: Its variables by torch's names; absent what the layer does without.
    """

    name: str
    layer: Any
    geometry: Geometry
    stored: Mapping[str, Stored] = field(repr=False)

    @property
    def updates(self) -> bool:
        """Whether a batch norm updates its statistics in train mode."""
        return bool(self.layer.trainable) and hold_of(self.layer) is None

    def read(self, name: str) -> Tensor | None:
        """Return a value as torch has it; None where the layer has none."""
        one = self.stored.get(name)
        return None if one is None else one.to_torch(read(one.variable)).contiguous()

    def write(self, name: str, value: Tensor) -> None:
        """Write a value that is as torch has it."""
        one = self.stored[name]
        assign(one.variable, one.to_keras(value.detach().cpu()))


def read(variable: Any) -> Tensor:
    """Return a copy of a variable's value, on the CPU."""
    return as_torch(variable.value)


def as_torch(value: Any) -> Tensor:
    """Return a copy of an array of any framework, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    half = keras.backend.standardize_dtype(getattr(value, "dtype", "float32")) == "bfloat16"
    array = keras.ops.convert_to_numpy(keras.ops.cast(value, "float32") if half else value)
    tensor = torch.tensor(array)
    return tensor.bfloat16() if half else tensor  # NumPy has no bfloat16


def assign(variable: Any, value: Tensor) -> None:
    """Write a value into a variable, in place on the torch backend."""
    if value.dtype == torch.bfloat16:
        value = value.float()
    # A copy of its own: JAX takes over the memory of an array, and torch would go on writing to it.
    variable.assign(value.contiguous().clone().numpy())


def is_keras_model(model: object) -> bool:
    """Tell whether this is a Keras layer or model."""
    return isinstance(model, layers.Layer)


def parts_of(model: Any) -> tuple[list[KerasPart], list[tuple[str, str]]]:
    """Return the layers that can be ported, in the model's order; (name, reason) of the others."""
    parts: list[KerasPart] = []
    others: list[tuple[str, str]] = []
    graph = graph_of(layer for _, layer in all_layers(model))
    for name, layer in all_layers(model):
        if not layer.built:
            others.append(
                (name, f"{a(type(layer).__name__)} in Keras that has not been called yet")
            )
            continue
        try:
            found = list(_parts(name, layer, graph))
        except Refusal as reason:
            others.append((name, str(reason)))
            continue
        known = {id(one.variable) for part in found for one in part.stored.values()}
        if extra := [weight for weight in _own(layer) if id(weight) not in known]:
            kind = type(layer).__name__
            what = a(kind) if not found else f"{a(kind)} with more than kernel and bias"
            names = ", ".join(weight.name for weight in extra[:3])
            if not isinstance(layer, layers.BatchNormalization):  # renorm: refused where it matters
                others.append((name, f"{what} in Keras: its {names} cannot be ported"))
                continue
        parts += found
    return parts, others


def all_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield every layer once, with its name."""
    seen: set[int] = set()

    def inside(layer: Any, name: str) -> Iterator[tuple[str, Any]]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield name, layer
        for child in _children(layer):
            yield from inside(child, f"{name}/{child.name}" if layer is not model else child.name)

    yield from inside(model, model.name)


def _children(layer: Any) -> list[Any]:
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _own(layer: Any) -> list[Any]:
    """Return the weights of a layer that no layer in it has."""
    inside = {id(weight) for child in _children(layer) for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in inside]


def _parts(name: str, layer: Any, graph: Graph) -> Iterator[KerasPart]:
    """Yield what torch layers a Keras layer is; nothing for an unknown one."""
    # With LoRA or quantisation the kernel is a value computed from other variables.
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return
    if isinstance(layer, layers.BatchNormalization):
        yield _batch_norm(name, layer, feature_order(layer, graph))
    elif isinstance(layer, layers.Dense):
        into = _kernel(layer.kernel, feature_order(layer, graph))
        geometry = Geometry("dense layer", tuple(layer.kernel.shape[::-1]), layer.bias is not None)
        yield KerasPart(name, layer, geometry, {"weight": into, **_bias(layer.bias)})
    elif isinstance(layer, _DEPTHWISE):
        yield _depthwise(name, layer, layer.kernel, layer.bias)
    elif isinstance(layer, _SEPARABLE):
        yield _depthwise(f"{name}/depthwise", layer, layer.depthwise_kernel, None)
        ones = (1,) * layer.rank
        pointwise = Geometry(
            "convolution", _shape(layer.pointwise_kernel), layer.bias is not None, ones, ones
        )
        stored = {"weight": _kernel(layer.pointwise_kernel), **_bias(layer.bias)}
        yield KerasPart(f"{name}/pointwise", layer, pointwise, stored)
    elif isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        geometry = Geometry(
            "transposed convolution" if isinstance(layer, _TRANSPOSED) else "convolution",
            _shape(layer.kernel),
            layer.bias is not None,
            tuple(layer.strides),
            tuple(layer.dilation_rate),
            layer.groups if isinstance(layer, _CONVOLUTIONS) else 1,
        )
        stored = {"weight": _kernel(layer.kernel), **_bias(layer.bias)}
        yield KerasPart(name, layer, geometry, stored)


def _batch_norm(name: str, layer: Any, order: Tensor | None) -> KerasPart:
    variables = {
        "weight": layer.gamma,
        "bias": layer.beta,
        "running_mean": layer.moving_mean,
        "running_var": layer.moving_variance,
    }
    there, back = partial(_there, order), partial(_back, order)
    stored = {key: Stored(one, there, back) for key, one in variables.items() if one is not None}
    return KerasPart(name, layer, Geometry("batch norm", tuple(layer.moving_mean.shape)), stored)


def _depthwise(name: str, layer: Any, kernel: Any, bias: Any) -> KerasPart:
    *size, channels, multiplier = kernel.shape
    geometry = Geometry(
        "convolution",
        (channels * multiplier, 1, *size),
        bias is not None,
        tuple(layer.strides),
        tuple(layer.dilation_rate),
        channels,
    )
    back = partial(depthwise_to_keras, channels=channels)
    return KerasPart(
        name, layer, geometry, {"weight": Stored(kernel, depthwise_to_torch, back), **_bias(bias)}
    )


def _shape(kernel: Any) -> tuple[int, ...]:
    *size, a, b = kernel.shape
    return (b, a, *size)


def _kernel(variable: Any, order: Tensor | None = None) -> Stored:
    return Stored(
        variable,
        lambda value: kernel_to_torch(_there(order, value)),
        lambda value: _back(order, kernel_to_keras(value)),
    )


def _there(order: Tensor | None, value: Tensor) -> Tensor:
    """Put the features on the first axis in torch's order."""
    return value if order is None else value[order]


def _back(order: Tensor | None, value: Tensor) -> Tensor:
    return value if order is None else value[order.argsort()]


def _bias(variable: Any) -> dict[str, Stored]:
    return {} if variable is None else {"bias": Stored(variable)}
