"""How far right twins of Keras networks are off, beside what `sn.port.compare` allows.

Networks of `keras.applications` with random weights, as built and with the statistics of a batch;
their torch twins made of the same graph. ``times`` is the error in units of the twin's own
rounding, its difference from itself in float64. Last a wrong twin: GELU by tanh, for one by erf.

    KERAS_BACKEND=torch python benchmarks/port_tolerance.py
    KERAS_BACKEND=jax python benchmarks/port_tolerance.py
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from keras import layers
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn

NETWORKS = ("ResNet50", "DenseNet121", "MobileNetV2", "VGG16", "InceptionV3", "ResNet50V2")
ACTIVATIONS = {"linear": lambda x: x, "relu": F.relu, "relu6": F.relu6}


class Twin(nn.Module):
    """A torch model that computes what a functional Keras model does, call by call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        numbers = {id(model.inputs[0]): 0}
        self.calls: list[tuple[Callable[..., Tensor], str, list[int]]] = []
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                layer = node.operation
                if (made := _with_weights(layer)) is not None:
                    self.add_module(layer.name, made)
                given = [numbers[id(tensor)] for tensor in node.input_tensors]
                self.calls.append((_function(layer), layer.name if made else "", given))
                numbers[id(node.outputs[0])] = len(self.calls)

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the Keras model does, of (N, C, H, W)."""
        values = [x]
        for function, name, given in self.calls:
            module = (self._modules[name],) if name else ()
            values.append(function(*module, *(values[i] for i in given)))
        return values[-1]


def _with_weights(layer: Any) -> nn.Module | None:
    """Make the torch layer, values aside."""
    if isinstance(layer, layers.BatchNormalization):
        return nn.BatchNorm2d(layer.moving_mean.shape[0])
    if isinstance(layer, layers.Dense):
        return nn.Linear(*layer.kernel.shape, bias=layer.bias is not None)
    if not isinstance(layer, layers.Conv2D | layers.DepthwiseConv2D):
        return None
    *size, before, after = layer.kernel.shape
    depthwise = isinstance(layer, layers.DepthwiseConv2D)
    groups, after = (before, before * after) if depthwise else (layer.groups, after)
    before = before if depthwise else before * groups
    has_bias = layer.bias is not None
    return nn.Conv2d(before, after, tuple(size), layer.strides, groups=groups, bias=has_bias)


def _function(layer: Any) -> Callable[..., Tensor]:
    """Return what a layer computes: of its torch layer, if it has weights, and its inputs."""
    activation = ACTIVATIONS[getattr(getattr(layer, "activation", None), "__name__", "linear")]
    match layer:
        case layers.BatchNormalization() | layers.Dense():
            return lambda module, x: activation(module(x))
        case layers.Conv2D() | layers.DepthwiseConv2D():
            pads = _pads(layer, layer.kernel_size)
            return lambda module, x: activation(module(F.pad(x, pads(x))))
        case layers.MaxPooling2D():
            pads, size, step = _pads(layer, layer.pool_size), layer.pool_size, layer.strides
            return lambda x: F.max_pool2d(F.pad(x, pads(x), value=-float("inf")), size, step)
        case layers.AveragePooling2D():
            padding = tuple(k // 2 if layer.padding == "same" else 0 for k in layer.pool_size)
            size, step = layer.pool_size, layer.strides
            return lambda x: F.avg_pool2d(x, size, step, padding, count_include_pad=False)
        case layers.GlobalAveragePooling2D():
            return lambda x: x.mean((2, 3))
        case layers.ZeroPadding2D():
            (top, bottom), (left, right) = layer.padding
            return lambda x: F.pad(x, (left, right, top, bottom))
        case layers.ReLU():
            return F.relu if layer.max_value is None else F.relu6
        case layers.Activation():
            return activation
        case layers.Add():
            return lambda *xs: sum(xs[1:], xs[0])
        case layers.Concatenate():
            return lambda *xs: torch.cat(xs, 1)
        case layers.Flatten():
            return lambda x: x.flatten(1)
        case layers.Dropout():
            return lambda x: x
    raise NotImplementedError(type(layer).__name__)


def _pads(layer: Any, size: Sequence[int]) -> Callable[[Tensor], list[int]]:
    """Return the padding of an input: with "same" Keras puts the odd one right and below."""

    def pads(x: Tensor) -> list[int]:
        if layer.padding != "same":
            return [0, 0, 0, 0]
        found = []
        for n, k, s in zip(x.shape[:1:-1], reversed(size), reversed(layer.strides), strict=True):
            whole = max((-(-n // s) - 1) * s + k - n, 0)
            found += [whole // 2, whole - whole // 2]
        return found

    return pads


def measured(name: str, there: Any, here: nn.Module, x: Tensor) -> None:
    """Compare, and print a row."""
    got = sn.port.compare(there, here, x)
    error, own = got.error / got.largest, got.rounding or float("nan")
    says = "agree" if got.same_outputs else "differ"
    row = f"{name:22} {error:8.1e} {own:9.1e} {error / own:6.1f} {got.tolerance:8.1e}  {says}"
    print(row, flush=True)


def calibrate(model: Any, x: Tensor) -> None:
    """Give a network the statistics of a batch."""
    norms = [one for one in model.layers if isinstance(one, layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    model(keras.ops.convert_to_tensor(x.numpy()), training=True)
    for norm in norms:
        norm.momentum = 0.99


def wrong_activation() -> None:
    keras.utils.set_random_seed(0)
    given = keras.Input((8, 8, 3))
    y = layers.Activation("gelu", name="gelu")(layers.Conv2D(8, 3, name="conv")(given))
    there = keras.Model(given, layers.Dense(5, name="fc")(layers.Flatten()(y)))
    for approximate in ("none", "tanh"):
        gelu = nn.GELU(approximate)
        here = nn.Sequential(nn.Conv2d(3, 8, 3), gelu, nn.Flatten(), nn.Linear(288, 5))
        sn.port.from_keras(there, here)
        measured(f"GELU, {approximate}", there, here, torch.randn(16, 8, 8, 3))


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, keras {keras.__version__} on {keras.backend.backend()}")
    print(f"{'network':22} {'error':>8} {'rounding':>9} {'times':>6} {'allowed':>8}")
    with torch.no_grad():
        for name in NETWORKS:
            size = 96 if name == "InceptionV3" else 64
            x = torch.randn(4, size, size, 3)
            build = getattr(keras.applications, name)
            keras.utils.set_random_seed(0)
            there = build(
                weights=None, input_shape=(size, size, 3), classes=7, classifier_activation=None
            )
            has_norms = any(isinstance(one, layers.BatchNormalization) for one in there.layers)
            for statistics in ("as built", "of a batch") if has_norms else ("as built",):
                if statistics == "of a batch":
                    calibrate(there, x)
                here = Twin(there)
                sn.port.from_keras(there, here, names=lambda path: path)
                measured(f"{name} {statistics}", there, here, x)
        wrong_activation()


if __name__ == "__main__":
    main()
